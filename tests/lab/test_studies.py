"""The sentences of studies about made-up results, for every outcome."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from helpers_studies import INITIAL, FakeLab, LossOf, wobble
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdd.errors import UserError
from sdd.lab.arms import DEFAULT
from sdd.lab.definition import Definition, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.figures import Axis, draw_dots
from sdd.lab.findings import Findings, Measured, Table
from sdd.lab.statistics import Estimate
from sdd.lab.studies import convergence, lr_sensitivity, moe, robustness, studies
from sdd.lab.studies.convergence import factor
from sdd.models import model_presets
from sdd.placement import placements
from sdd.train import RunConfig, config_io

BROKEN_AS_PUBLISHED = {
    "postnorm": {"lr x5", "init std x0.1", "no warm-up"},
    "deepnorm": {"lr x5", "init std x0.1"},
}


def condition_of(config: RunConfig) -> str:
    """The title of a robustness run's condition."""
    named = {
        (1e-3, 1.0, 40): "default",
        (5e-3, 1.0, 40): "lr x5",
        (1e-3, 0.1, 40): "init std x0.1",
        (1e-3, 1.0, 0): "no warm-up",
        (5e-3, 0.1, 0): "joined",
    }
    return named[config.optim.lr, config.model.init_scale, config.optim.warmup]


def breaking(broken: dict[str, set[str]]) -> LossOf:
    def loss(config: RunConfig) -> float:
        breaks = condition_of(config) in broken.get(config.model.placement.name, set())
        return math.nan if breaks else 5.0 + wobble(config)

    return loss


def findings(
    monkeypatch: pytest.MonkeyPatch, definition: Definition, loss_of: LossOf, out: Path, **asked: object
) -> Findings:
    FakeLab(loss_of).install(monkeypatch)
    plan = PlannedStudy(definition, Request(out, **{"preset": "nano", "seeds": 3, **asked}))  # type: ignore[arg-type]
    return definition.read(Engine(plan, Console(file=io.StringIO())).outcome())


def sentences(found: Findings) -> str:
    return " ".join([found.answer, *found.conclusions])


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (BROKEN_AS_PUBLISHED, ["Yes: all 16 cells", "No condition breaks sdd, sdd-released"]),
        (
            {"postnorm": {"joined"}},
            ["In part: 11 of the 16", "postnorm was published to break under lr x5, init std x0.1 and no warm-up and "
             "converges: here it begins to break at: lr x5, init std x0.1, no warm-up",
             "deepnorm was published to break under lr x5 and init std x0.1 and converges: here nothing"],
        ),
        (
            {**BROKEN_AS_PUBLISHED, "sdd-released": {"lr x5"}},
            ["In part: 15 of the 16", "sdd-released was published to converge under lr x5 and does not here"],
        ),
        ({"peri": {"default"}}, ["peri does not converge even by default"]),
    ],
)  # fmt: skip
def test_robustness_says_where_it_agrees_and_where_it_begins_to_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: dict[str, set[str]], expected: list[str]
) -> None:
    found = findings(monkeypatch, robustness.DEFINITION, breaking(broken), tmp_path)
    for part in expected:
        assert part in sentences(found)
    assert not re.search(r"\bnan\b", sentences(found))


def test_narrow_models_do_not_start_from_an_init_for_wide_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, robustness.DEFINITION, breaking({}), tmp_path)
    assert any("olmo2 and peri start from std 1/sqrt(2.5 d)" in limit for limit in found.limits)
    for preset, init in (("nano", "base"), ("581m", "normal-0.02")):
        plan = PlannedStudy(robustness.DEFINITION, Request(tmp_path, preset, 1))
        inits = {arm.name: plan.run(arm, plan.conditions[0], 1e-3, 0)[1].model.placement.init for arm in plan.arms}
        assert inits["olmo2"] == inits["peri"] == init
        assert inits["prenorm-qk"] == "megatron"


def test_robustness_pairs_changes_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def loss(config: RunConfig) -> float:
        return 5.0 + wobble(config) + (0.3 if condition_of(config) == "no warm-up" else 0.0)

    found = findings(monkeypatch, robustness.DEFINITION, loss, tmp_path)
    table = next(table for table in found.tables if table.name == "change")
    row = table.json()["rows"][0]["no warm-up"]
    assert (row["value"], row["low"], row["high"], row["n"]) == pytest.approx((0.3, 0.3, 0.3, 3))


def test_robustness_of_one_seed_has_no_interval_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, robustness.DEFINITION, breaking(BROKEN_AS_PUBLISHED), tmp_path, seeds=1)
    assert any("here there is none" in sentence for sentence in found.limits)
    assert "±" not in found.tables[0].markdown()
    assert "| - |" in found.tables[0].markdown()


def test_every_seed_that_did_not_converge_is_a_cross() -> None:
    cells = [{0: 5.0, 1: 5.2, 2: math.nan}, dict.fromkeys(range(3), math.nan)]
    figure = draw_dots(["one", "other"], {"default": cells}, Axis("loss"), "a seed did not converge")
    crosses = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [round(height) for _, height in crosses] == [0, 1, 1, 1]
    assert crosses[0][0] == crosses[1][0] < crosses[2][0] < crosses[3][0]


def test_sensitivity_is_that_of_the_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = PlannedStudy(lr_sensitivity.DEFINITION, Request(tmp_path, "nano", 1)).first_rates

    def loss(config: RunConfig) -> float:
        if config.model.placement.name == "sdd":
            return 5.0 + 0.1 * abs(rates.index(config.optim.lr) - 3) + wobble(config)
        return math.nan if config.optim.lr > rates[4] else 5.0 + 0.2 * (config.optim.lr != rates[3]) + wobble(config)

    found = findings(monkeypatch, lr_sensitivity.DEFINITION, loss, tmp_path, placements=("sdd", "postnorm"))
    rows = {row["method"]: row for row in found.tables[0].json()["rows"]}
    assert rows["sdd"]["LR sensitivity"]["value"] == pytest.approx(2 * (0.1 + 0.2 + 0.3) / 7)
    for seed, value in rows["postnorm"]["LR sensitivity"]["seeds"].items():
        lost = INITIAL - 5.0 - 0.05 * math.sin(1 + int(seed))
        assert value == pytest.approx((4 * 0.2 + 2 * lost) / 7)
    assert rows["postnorm"]["highest rate"] == f"{rates[4]:g}"
    assert "The sensitivity is higher than sdd's for postnorm" in sentences(found)
    assert f"postnorm: most seeds do not converge at {rates[5]:g}, {rates[6]:g}" in sentences(found)


def test_a_loss_is_not_reported_on_the_seed_that_chose_its_rate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates = PlannedStudy(lr_sensitivity.DEFINITION, Request(tmp_path, "nano", 1)).first_rates

    def loss(config: RunConfig) -> float:  # seed 0 alone is better at another rate, by luck
        lucky = config.seed == 0 and config.optim.lr == rates[2]
        return 5.0 + 0.1 * (config.optim.lr != rates[3]) - (0.5 if lucky else 0.0)

    found = findings(monkeypatch, lr_sensitivity.DEFINITION, loss, tmp_path, placements=("sdd",))
    assert found.conclusions == []  # there is nothing to compare
    reported = found.tables[0].json()["rows"][0]["loss at the best rate"]["seeds"]
    assert reported["0"] == 5.0


@given(st.floats(4.5, 7.0), st.floats(4.5, 7.0))
def test_factor_is_the_inverse_the_other_way_round_and_above_one_for_the_better(ours: float, theirs: float) -> None:
    from helpers_studies import made_result

    plan = PlannedStudy(convergence.DEFINITION, Request(Path(), "nano", 1))
    name, config = plan.run(plan.arms[0], plan.conditions[0], 1e-3, 0)
    method, base = (made_result(name, config, loss) for loss in (ours, theirs))
    for column in ("tokens", "seconds"):
        there, back = factor(method, base, column), factor(base, method, column)
        assert there * back == pytest.approx(1)
        assert (there >= 1) == (ours <= theirs)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.2, "as fast as prenorm-qk in tokens"),
        (-0.2, "above prenorm-qk, more than seeds"),
        (0.0, "not told apart from"),
    ],
)
def test_convergence_is_concluded_either_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gain: float, expected: str
) -> None:
    def loss(config: RunConfig) -> float:
        sdd = config.model.placement.name.startswith("sdd")
        noise = 0.01 * math.sin(7 * config.seed + 3 * sdd)
        return 5.5 - gain * sdd + 0.1 * math.log2(config.optim.lr / 4e-3) ** 2 + noise

    found = findings(monkeypatch, convergence.DEFINITION, loss, tmp_path)
    assert expected in sentences(found)
    cells = found.tables[0].json()["rows"][0]
    factors = cells["tokens, factor (t interval)"]
    assert (factors["value"] > 1.05, factors["value"] < 0.95) == (gain > 0, gain < 0)
    assert factors["low"] <= cells["tokens, factor (bootstrap)"]["low"] + 1e-9
    (along,) = (table.json()["rows"][0] for table in found.tables if table.name == "lead")
    for share, part in ((10, 0.1), (50, 0.9), (100, 1.0)):  # of the final difference, by the shape of these curves
        expected_lead = pytest.approx(part * cells["final loss, difference"]["value"])
        assert along[f"at {share}% of the tokens"]["value"] == expected_lead


def test_convergence_without_a_run_that_converged_is_concluded_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = findings(monkeypatch, convergence.DEFINITION, lambda _: math.nan, tmp_path)
    assert "have no seed in which both converged" in sentences(found)
    assert not re.search(r"\bnan\b", sentences(found))


@pytest.mark.parametrize("gain", [0.3, -0.3])
def test_mixtures_are_set_beside_dense_models_of_their_placement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gain: float
) -> None:
    def loss(config: RunConfig) -> float:
        return (
            5.5 - gain * (config.model.moe is not None) + 0.1 * math.log2(config.optim.lr / 4e-3) ** 2 + wobble(config)
        )

    found = findings(monkeypatch, moe.DEFINITION, loss, tmp_path, preset="moe-nano")
    table = next(table for table in found.tables if table.name == "experts").json()["rows"]
    assert [row["placement"] for row in table] == ["sdd", "prenorm-qk"]
    for row in table:
        assert row["difference"]["value"] == pytest.approx(-gain)
        assert (row["tokens, factor"]["value"] > 1) == (gain > 0)
    assert f"0.300 nats {'below' if gain > 0 else 'above'} the dense model" in sentences(found)
    lines = [line for line in found.pictures[0].draw().axes[0].get_lines() if len(line.get_xdata()) > 2]
    assert len({(line.get_color(), line.is_dashed()) for line in lines}) == len(lines) == len(moe.DEFINITION.arms)


def test_a_study_of_mixtures_takes_mixtures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nano is none: choose one of moe-nano"):
        PlannedStudy(moe.DEFINITION, Request(tmp_path, "nano", 1))
    plan = PlannedStudy(moe.DEFINITION, Request(tmp_path, "moe-588m-3b", 1))
    dense = next(arm for arm in plan.arms if arm.dense)
    shape = plan.run(dense, DEFAULT, 1e-3, 0)[1].model
    assert (shape.moe, shape.d_ff) == (None, 8 * 512)


@pytest.mark.parametrize("name", studies)
def test_a_definition_has_a_question_and_three_sentences(name: str) -> None:
    definition = studies[name]
    assert definition.name == name
    assert definition.question.endswith("?")
    assert len(definition.method) == 3
    assert all(sentence.endswith(".") for sentence in definition.method)


@pytest.mark.parametrize("name", studies)
def test_a_definition_names_what_there_is(name: str) -> None:
    definition = studies[name]
    assert {arm.placement for arm in definition.arms} <= placements.keys()
    assert {definition.preset, *definition.sizes} <= model_presets.keys()
    names = [field for field, _, _ in config_io.fields()]
    for changes in (*(each.changes for each in definition.conditions), *definition.sizes.values()):
        assert changes.keys() <= set(names)


@pytest.mark.parametrize("name", studies)
def test_rates_of_a_definition_ascend(name: str) -> None:
    factors = studies[name].rates.factors
    assert list(factors) == sorted(factors)


def test_the_learning_rates_of_the_measure_span_two_decades() -> None:
    assert lr_sensitivity.FACTORS[-1] / lr_sensitivity.FACTORS[0] == pytest.approx(100)


SEEDS = st.dictionaries(st.integers(0, 9), st.floats(0.1, 9.9) | st.just(math.nan), min_size=1, max_size=5)


@given(st.lists(SEEDS, min_size=1, max_size=4))
def test_a_table_is_the_same_in_every_format(cells: list[dict[int, float]]) -> None:
    rows = [[f"method {place}", Measured(values)] for place, values in enumerate(cells)]
    table = Table("loss", "Loss", ["method", "loss"], rows)
    written = json.loads(json.dumps(table.json(), allow_nan=False))["rows"]
    read = list(csv.DictReader(io.StringIO(table.csv())))
    lines = table.markdown().splitlines()[2:]
    for values, in_json, in_csv, line in zip(cells, written, read, lines, strict=True):
        kept = [value for value in values.values() if math.isfinite(value)]
        assert in_json["loss"]["not_converged"] == int(in_csv["loss not converged"]) == len(values) - len(kept)
        assert ("-" in line.split("|")[2]) == (len(kept) < len(values))
        if kept:
            assert (
                in_json["loss"]["value"] == pytest.approx(float(in_csv["loss"])) == pytest.approx(sum(kept) / len(kept))
            )
            assert f"{in_json['loss']['value']:.3f}" in line


def test_dashes_say_how_many_seeds() -> None:
    assert str(Measured({0: math.nan})) == "-"
    assert str(Measured({0: math.nan, 1: math.nan})) == "- (2 of 2)"
    assert str(Measured({0: 5.0, 1: math.nan})) == "- (1 of 2), else 5.000"
    assert Measured({0: 1.0, 1: 1.0}).estimate == Estimate(1.0, 1.0, 1.0, 2)
