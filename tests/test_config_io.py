import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.init_rules import Draw
from sdd.placement import placements
from sdd.train import config_io, preset


def test_a_config_survives_the_file(tmp_path):
    for name in ("nano", "micro", "581m", "2b"):
        config = preset(name)
        config_io.save(config, tmp_path / "config.json")
        assert config_io.load(tmp_path / "config.json") == config


def test_a_placement_may_be_given_by_name():
    values = config_io.to_dict(preset("nano"))
    values["model"]["placement"] = "deepnorm"
    assert config_io.from_dict(values).model.placement == placements["deepnorm"]


def test_every_field_is_explained():
    missing = [name for name, _, about in config_io.fields() if not about]
    assert missing == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stepz": 3}, "unknown field 'stepz' (did you mean 'steps'?)"),
        ({"steps": "many"}, "steps='many'"),
        ({"steps": None}, "steps=None"),
        ({"optim": {"lrr": 1}}, "unknown field 'optim.lrr' (did you mean 'optim.lr'?)"),
        ({"optim": []}, "optim"),
        ({"model": {"d_model": 64}}, "missing"),
        ({"model": 3}, "model"),
        ({"precision": "fp8"}, "precision='fp8'"),
    ],
)
def test_what_is_wrong_is_named(change, expected):
    values = config_io.to_dict(preset("nano")) | change
    with pytest.raises(UserError) as error:
        config_io.from_dict(values)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([name for name, _, _ in config_io.fields()] + ["model", "optim", "data"])


@given(NAMES, JSON)
def test_a_drawn_value_in_any_field_is_taken_or_refused_in_one_line(name, value):
    values = json.loads(json.dumps(config_io.to_dict(preset("moe-nano"))))  # with every optional part
    *path, last = name.split(".")
    target = values
    for key in path:
        target = target[key]
    target[last] = value
    try:
        config_io.from_dict(values)
    except UserError as error:
        problem = str(error)
    else:
        problem = ""
    assert len(problem.splitlines()) <= 1


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_drawn_file_is_refused_in_one_line(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        config_io.load(file)
    assert "\n" not in str(error.value)


def as_written_before(config):
    """The values of a config as the version before `residual`, `scale` and what came later wrote them."""
    values = config_io.to_dict(config)
    placement = values["model"]["placement"]
    del placement["scales"], placement["weights"], placement["draws"]
    rule = placement.pop("residual")
    placement["residual_scale"] = "one" if rule == "x + f" else rule.removesuffix(" x + f")
    for sites in (placement["norms"], *placement["overrides"].values()):
        for norm in filter(None, sites.values()):
            del norm["scale"], norm["depth_factor"]
    return values


#: What that version could not say.
LATER = {"keel", "lns", "ngpt", "peri-depth", "sdd-depth"}


@pytest.mark.parametrize("name", sorted(placements.keys() - LATER))
def test_a_config_of_an_earlier_version_is_the_config_of_today(name):
    values = config_io.to_dict(preset("nano"))
    values["model"]["placement"] = name
    config = config_io.from_dict(values)
    assert config_io.from_dict(as_written_before(config)) == config
    assert config_io.with_current_placement(as_written_before(config)) == config_io.to_dict(config)
    before = as_written_before(config)
    for part, name in (
        ("optim", "weights"),
        ("optim", "sdd_weight_decay"),
        ("optim", "alpha_lr"),
        ("model", "statistics"),
    ):
        del before[part][name]
    assert config_io.from_dict(before) == config


def test_a_placement_that_draws_parts_apart_survives_the_file(tmp_path):
    draws = {"blocks": Draw(factor=0.25), "embed": Draw("unit"), "head": Draw("1/d", 2.0)}
    placement = dataclasses.replace(placements["sdd"], draws=draws)
    config = preset("nano")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, placement=placement))
    config_io.save(config, tmp_path / "config.json")
    assert config_io.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("values", [{}, {"model": 3}, {"model": {}}, {"model": {"placement": {"norms": {"qq": {}}}}}])
def test_a_config_without_a_valid_placement_is_left_to_others(values):
    assert config_io.with_current_placement(values) == values


@pytest.mark.parametrize("name", [name for name, _, _ in config_io.fields()])
def test_a_wrong_type_is_told_in_the_words_of_the_field(name):
    if name == "model.placement":
        return
    values = config_io.to_dict(preset("moe-nano"))
    *path, last = name.split(".")
    target = values
    for key in path:
        target = target[key]
    target[last] = {"x": 1}
    with pytest.raises(UserError) as error:
        config_io.from_dict(values)
    assert str(error.value).startswith(f"{name}={{'x': 1}} must be ")
    assert "input should" not in str(error.value).lower()


def test_a_missing_field_is_explained():
    with pytest.raises(UserError, match=r"the field 'model\.moe\.top_k' is missing: experts"):
        config_io.with_overrides(preset("nano"), {"model.moe.n_experts": "8"})


def test_a_choice_of_words_or_truth():
    for word, found in {"auto": "auto", "true": True, "false": False, True: True}.items():
        assert config_io.with_overrides(preset("nano"), {"compile": word}).compile == found
    with pytest.raises(UserError, match="compile='maybe' must be auto or true or false"):
        config_io.with_overrides(preset("nano"), {"compile": "maybe"})
