"""Placements as data: what they hold, what they refuse, and the way through JSON."""

import json
import math
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.models import ModelConfig, MoEConfig
from sdd.placement import (
    LEARNED_RESIDUAL,
    MODEL_SITES,
    RESIDUALS,
    SCALE_SITES,
    SCALES,
    SITES,
    SUBLAYER_SCALES,
    WIDTHS,
    AlphaName,
    InitName,
    Norm,
    Placement,
    ResidualName,
    Scale,
    ScaleName,
    placements,
)
from sdd.train import config_io
from sdd.train.config import RunConfig

SHAPE = {"d_model": 16, "d_ff": 20, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 29, "context": 12}
BLOCK_SITES = [site for site in SITES if site not in MODEL_SITES]
HEAD_SITES = ("q", "k", "v", "ctx")


def run_of(placement: Placement, n_layers: int = 6) -> RunConfig:
    return RunConfig(ModelConfig(n_layers=n_layers, placement=placement, **SHAPE))


@st.composite
def norms(draw: st.DrawFn, site: str) -> Norm:
    group = draw(st.sampled_from(["full", "head"])) if site in HEAD_SITES else "full"
    return Norm(
        group=group,
        shared_alpha=group == "head" and draw(st.booleans()),
        alpha_init=draw(st.sampled_from(list(SCALES if site in MODEL_SITES else get_args(AlphaName)))),
        alpha_factor=draw(st.floats(-1e3, 1e3)),
        eps=draw(st.floats(0, 1)),
    )


def sites_of(names: list[str], absent: bool = False) -> st.SearchStrategy[dict]:
    none = st.none() if absent else st.nothing()
    return st.fixed_dictionaries({}, optional={site: none | norms(site) for site in names})


drawn_scales = st.builds(
    Scale, st.sampled_from(list(WIDTHS)), st.floats(-1e3, 1e3), stored=st.sampled_from(list(WIDTHS))
)
drawn_placements = st.builds(
    Placement,
    norms=sites_of(list(SITES)),
    name=st.text(max_size=5),
    residual=st.sampled_from(list(RESIDUALS)),
    init=st.sampled_from(get_args(InitName)),
    overrides=st.dictionaries(st.integers(-6, 5), sites_of(BLOCK_SITES, absent=True), max_size=3),
    source=st.text(max_size=5),
    scales=st.dictionaries(st.sampled_from([site for site in SCALE_SITES if site != "mix"]), drawn_scales),
    weights=st.sampled_from(["free", "unit"]),
)

# --- through JSON ---


@given(drawn_placements)
def test_a_placement_survives_json(placement: Placement):
    run = run_of(placement)
    assert config_io.from_dict(json.loads(json.dumps(config_io.to_dict(run)))) == run


@pytest.mark.parametrize("name", placements)
def test_a_name_stands_for_its_definition(name: str):
    values = config_io.to_dict(run_of(placements["prenorm"]))
    values["model"]["placement"] = name
    assert config_io.from_dict(values).model.placement == placements[name]
    assert placements[name].name == name
    assert placements[name].source


def test_each_method_has_its_own_init_rule_and_eps():
    own = {"deepnorm": "deepnorm", "olmo2": "normal-0.02", "peri": "normal-0.02", "peri-depth": "normal-0.02"}
    own |= {"keel": "base", "lns": "base", "ngpt": "1/sqrt(d)", "sdd": "base/2"}
    for name, placement in placements.items():
        assert placement.init == own.get(name, "base" if name.startswith("sdd") else "megatron")
        assert {norm.eps for norm in placement.norms.values()} == {1e-5 if name == "sdd-released" else 1e-6}


def test_an_unknown_name_is_answered_with_the_nearest():
    values = config_io.to_dict(run_of(placements["prenorm"]))
    values["model"]["placement"] = "sdd-relaesed"
    with pytest.raises(UserError, match=r"no placement 'sdd-relaesed' \(did you mean 'sdd-released'\?\)"):
        config_io.from_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("norms", "qq"), {}, "norms.qq"),
        (("norms", "q", "group"), "half", "norms.q.group"),
        (("norms", "q", "alpha_init"), "1/L", "norms.q.alpha_init"),
        (("norms", "q", "epsilon"), 1e-5, "epsilon"),
        (("init",), "xavier", "init"),
        (("overrides", "9"), {"q": None}, r"overrides name the blocks \[9\], but the model has 6 blocks"),
    ],
)
def test_a_mistake_in_a_file_is_named(path: tuple[str, ...], value: object, message: str):
    values = config_io.to_dict(run_of(placements["sdd"]))
    target = values["model"]["placement"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(UserError, match=message):
        config_io.from_dict(values)


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha_init": "1/L"}, "not a named scale"),
        ({"group": "half"}, "choose 'full' or 'head'"),
        ({"shared_alpha": True}, "needs group='head'"),
        ({"eps": -1e-6}, "eps=-1e-06"),
        ({"eps": math.nan}, "eps=nan"),
        ({"alpha_factor": math.inf}, "alpha_factor=inf"),
    ],
)
def test_a_norm_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Norm(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norms": {"out": Norm()}}, "'out' is not a norm site"),
        ({"norms": {}, "overrides": {0: {"out": None}}}, "'out' is not a norm site"),
        ({"norms": {"gate": Norm(group="head")}}, "'gate' has no heads"),
        ({"norms": {}, "overrides": {1: {"attn_out": Norm(group="head")}}}, "'attn_out' has no heads"),
        ({"norms": {}, "overrides": {0: {"final": None}}}, "stand once in a model"),
        ({"norms": {"gate": Norm()}, "joint_gate_up": True}, "give both"),
        ({"norms": {"gate": Norm(), "up": Norm(eps=1e-5)}, "joint_gate_up": True}, "one eps"),
        (
            {"norms": {"gate": Norm(), "up": Norm()}, "joint_gate_up": True, "overrides": {1: {"up": Norm(eps=1.0)}}},
            "one eps",
        ),
        ({"norms": {}, "residual": "2 x + f"}, "residual='2 x"),
        ({"norms": {}, "residual": LEARNED_RESIDUAL}, "need each other"),
        ({"norms": {}, "scales": {"mix": Scale()}}, "need each other"),
        ({"norms": {}, "scales": {"q": Scale()}}, "scales names 'q'"),
        ({"norms": {}, "weights": "round"}, "weights='round'"),
        ({"norms": {"q": Norm(depth_factor="1/sqrt(l)")}}, "depth_factor fits RMSNorms only"),
        ({"norms": {"final": Norm(alpha_init="1/sqrt(k)")}}, "stands in no block"),
        ({"norms": {}, "init": "xavier"}, "init='xavier' is not an init rule"),
    ],
)
def test_a_placement_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Placement(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"init": "2"}, "init='2'"), ({"stored": "d"}, "stored='d'"), ({"factor": math.nan}, "factor=nan")],
)
def test_a_scale_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Scale(**arguments)


def test_experts_refuse_what_they_do_not_know():
    moe = MoEConfig(n_experts=2, top_k=1)
    for placement, message in [
        (placements["ngpt"], "ngpt has a learned scale at gate, up, which experts do not know"),
        (Placement({"ffn_out": Norm(scale=False)}, name="mine"), "mine has a norm without alpha at ffn_out"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelConfig(n_layers=2, placement=placement, moe=moe, **SHAPE)
        values = config_io.to_dict(run_of(placement))
        values["model"]["moe"] = {"n_experts": 2, "top_k": 1}
        with pytest.raises(UserError, match=message):
            config_io.from_dict(values)


# --- what is meant ---


def test_residual_rules_are_numbered_by_sublayer():
    assert {*RESIDUALS, LEARNED_RESIDUAL} == set(get_args(ResidualName))
    for L in (1, 2, 7, 32):
        keel = [RESIDUALS["2L x + f from k=3"](k, L) for k in range(1, 2 * L + 1)]
        assert keel == [(1, 1)] * 2 + [(2 * L, 1)] * (2 * L - 2)
        for k in range(1, 2 * L + 1):
            c_x, c_f = RESIDUALS["sqrt(k/(k+1)) x + f/sqrt(k+1)"](k, L)
            assert (c_x, c_f) == pytest.approx((math.sqrt(k / (k + 1)), 1 / math.sqrt(k + 1)))
            assert c_x**2 + c_f**2 == pytest.approx(1)


def test_named_scales_are_what_they_say():
    assert set(SCALES) == set(get_args(ScaleName))
    assert {*SCALES, *SUBLAYER_SCALES} == set(get_args(AlphaName))
    for L in (1, 2, 7, 32):
        assert SCALES["one"](L) == 1
        assert SCALES["1/sqrt(L)"](L) == pytest.approx(1 / math.sqrt(L))
        assert SCALES["1/sqrt(2L)"](L) == pytest.approx(1 / math.sqrt(2 * L))
        assert SCALES["(2L)^(1/4)"](L) == pytest.approx(math.sqrt(math.sqrt(2 * L)))
        assert SCALES["(8L)^(-1/4)"](L) == pytest.approx(1 / math.sqrt(math.sqrt(8 * L)))
    assert Norm(alpha_init="1/sqrt(2L)", alpha_factor=8.0).alpha(32) == pytest.approx(1.0)


@given(drawn_placements)
def test_overrides_change_their_blocks_and_no_other(placement: Placement):
    plain = {site: norm for site, norm in placement.norms.items() if site not in MODEL_SITES}
    for index in range(6):
        expected = plain | placement.overrides.get(index, {}) | placement.overrides.get(index - 6, {})
        named = placement.named_layer(index, 6)
        assert named == {site: norm for site, norm in expected.items() if norm}
        numbered = placement.layer(index, 6)
        assert numbered.keys() == named.keys()
        for site, norm in named.items():
            k = 2 * index + (2 if site.startswith("ffn") or site in ("gate", "up") else 1)
            by_k = {"1/sqrt(k)": k, "1/sqrt(k+L)": k + 6}
            root = by_k.get(norm.alpha_init)
            value = norm.alpha_factor / math.sqrt(root) if root else norm.alpha(6)
            assert numbered[site].alpha(6) == pytest.approx(value)
            assert replace(numbered[site], alpha_init=norm.alpha_init, alpha_factor=norm.alpha_factor) == norm


def test_an_override_counts_from_the_end_and_none_removes():
    changed = Norm(alpha_init="1/sqrt(L)")
    placement = replace(placements["peri"], overrides={-1: {"attn_out": changed, "ffn_out": None}})
    layers = [placement.layer(index, 3) for index in range(3)]
    assert layers[0] == layers[1] == placements["peri"].layer(0, 3)
    assert layers[2] == {**{s: n for s, n in layers[0].items() if s != "ffn_out"}, "attn_out": changed}


@pytest.mark.parametrize("layer", [3, -4])
def test_an_override_of_a_block_that_is_not_there_is_refused(layer: int):
    placement = replace(placements["peri"], overrides={layer: {"ffn_out": None}})
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        placement.check_depth(3)
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        run_of(placement, n_layers=3)
    run_of(placement, n_layers=4)


def test_replace_eps_reaches_every_norm_and_nothing_else():
    placement = replace(placements["sdd-released"], overrides={0: {"q": Norm(), "k": None}})
    changed = placement.replace_eps(0.25)
    assert {norm.eps for norm in changed.norms.values()} == {0.25}
    assert changed.overrides == {0: {"q": Norm(eps=0.25), "k": None}}
    assert changed.replace_eps(1e-5) == replace(placement, overrides={0: {"q": Norm(eps=1e-5), "k": None}})
