"""Studies that change one thing at a time, on made-up results: variants, alpha, decay, eps, precision."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_studies import FakeLab, LossOf, wobble
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdd.commands.study import Options, run_study
from sdd.errors import UserError
from sdd.lab import engine, results
from sdd.lab.definition import Outcome, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.results import RunResult
from sdd.lab.studies import alpha, decay, eps, precision, robustness, studies, variants
from sdd.lab.studies.changes import OneAtATime, views
from sdd.models import model_presets
from sdd.train import OptimConfig, RunConfig, config_io, preset

SHAPES = {
    "variants": variants.SHAPE,
    "alpha": alpha.SHAPE,
    "decay": decay.SHAPE,
    "eps": eps.SHAPE,
    "precision": precision.SHAPE,
}


def outcome(name: str, out: Path, seeds: int = 2, placements: Sequence[str] = ()) -> Outcome:
    plan = PlannedStudy(studies[name], Request(out, "nano", seeds, tuple(placements)))
    return Engine(plan, Console(file=io.StringIO())).outcome()


def page(name: str, out: Path, loss_of: LossOf, monkeypatch: pytest.MonkeyPatch, **options: object) -> str:
    FakeLab(loss_of).install(monkeypatch)
    assert run_study(name, out, Options(seeds=2, **options)) == 0  # pyright: ignore[reportArgumentType]
    return (out / "README.md").read_text(encoding="utf-8")


def answer(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("**Answer:**"))


def differing(name: str, arm: str) -> set[str]:
    """The fields of a run in which an arm differs from the base, a placement's by their own names."""
    plan = PlannedStudy(studies[name], Request(Path("none"), "nano", 1))
    shape = SHAPES[name]
    arms = {change.arm.name: change.arm for change in shape.changes} | {shape.base.name: shape.base}
    one, base = (
        config_io.to_dict(plan.run(arms[each], plan.conditions[0], 4e-3, 0)[1]) for each in (arm, shape.base.name)
    )
    placements = [config["model"].pop("placement") for config in (one, base)]
    flat = [{**config_io.flatten(each), **place} for each, place in zip((one, base), placements, strict=True)]
    return {field for field in flat[0] if flat[0][field] != flat[1][field]} - {"name", "source"}


@pytest.mark.parametrize("name", SHAPES)
def test_every_change_is_a_run_of_its_own_and_changes_one_thing(name: str) -> None:
    shape = SHAPES[name]
    seen = []
    for change in shape.changes:
        fields = differing(name, change.arm.name)
        assert 1 <= len(fields) <= 3, change.arm.name
        seen.append(change.arm.name)
    names = [arm.name for arm in (*studies[name].arms, *studies[name].optional)]
    assert len(names) == len(set(names))
    assert set(seen) <= set(names)


def test_fourteen_variants_and_more_are_compared_by_default() -> None:
    arms = {arm.name for arm in studies["variants"].arms}
    assert sum(change.arm.name in arms for change in variants.CHANGES) >= 14


@pytest.mark.parametrize("preset_name", ["nano", "micro"])
def test_every_variant_is_a_model_at_every_size(preset_name: str) -> None:
    plan = PlannedStudy(studies["variants"], Request(Path("none"), preset_name, 1))
    for arm in (*studies["variants"].arms, *studies["variants"].optional):
        _, config = plan.run(arm, plan.conditions[0], 4e-3, 0)
        assert config.model.n_layers == model_presets[preset_name].n_layers


FEW = ("sdd-v1", "v0.25", "v0.5", "pre", "peri", "peri0.25", "prenorm-qk", "prenorm-qk0.25")


def with_best(config: RunConfig) -> float:
    """v0.25 is best, at half the rate; everything else is best at the base rate."""
    name = config.model.placement.name
    best, loss = (2e-3, 4.9) if name == "v0.25" else (4e-3, {"peri": 5.05, "prenorm-qk": 5.2}.get(name, 5.0))
    return loss + 0.03 * math.log2(config.optim.lr / best) ** 2 + wobble(config)


def test_variants_count_at_their_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page("variants", tmp_path, with_best, monkeypatch, placements=FEW)
    assert "v0.25 (matrices of the blocks x0.25) ends lowest at 3M tokens: 0.100 ± 0.000 nats below sdd-v1, " in answer(
        text
    )
    assert "0.150 ± 0.000 nats below peri and 0.300 ± 0.000 nats below prenorm-qk." in answer(text)
    assert "| v0.25 | matrices of the blocks x0.25 | 0.002 |" in text
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows.index("v0.25") < rows.index("sdd-v1") < rows.index("prenorm-qk")
    assert (tmp_path / "figures" / "changes.png").exists()


def test_where_no_variant_helps_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(config: RunConfig) -> float:
        is_base = config.model.placement.name == "sdd-v1" and config.optim == replace(
            OptimConfig(), lr=config.optim.lr, warmup=config.optim.warmup
        )
        return (5.0 if is_base and config.model.init_scale == 1 else 5.3) + wobble(config)

    text = page("variants", tmp_path, loss, monkeypatch, placements=FEW)
    assert answer(text).startswith("**Answer:** None of ")


def test_a_variant_that_breaks_is_named_and_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(config: RunConfig) -> float:
        return math.nan if config.model.placement.name == "v0.25" and config.seed == 0 else with_best(config)

    text = page("variants", tmp_path, loss, monkeypatch, placements=FEW)
    assert "v0.25 (" not in answer(text)
    assert "Did not converge in every seed: v0.25." in text


@pytest.mark.parametrize("name", SHAPES)
def test_a_part_of_a_study_is_read_without_base_and_rivals(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = (SHAPES[name].changes[0].arm.name,)
    text = page(name, tmp_path, lambda config: 5.0 + wobble(config), monkeypatch, placements=some)
    assert some[0] in text


def test_optional_variants_and_their_robustness_are_to_be_had_by_name(tmp_path: Path) -> None:
    names = ("sdd-v1", "v0.25", "released0.25")
    for study in ("variants", "robustness", "length"):
        plan = PlannedStudy(studies[study], Request(tmp_path, "nano", 1, names))
        assert [arm.name for arm in plan.arms] == list(names)
    plan = PlannedStudy(robustness.DEFINITION, Request(tmp_path, "nano", 1, names))
    hard = {each.name: plan.run(plan.arms[1], each, 1e-3, 0)[1] for each in plan.conditions}
    assert {name: (one.optim.lr, one.model.init_scale, one.optim.warmup) for name, one in hard.items()} == {
        "default": (1e-3, 1.0, 40),
        "lr-x5": (5e-3, 1.0, 40),
        "init-x0.1": (1e-3, 0.1, 40),
        "no-warmup": (1e-3, 1.0, 0),
        "joined": (5e-3, 0.1, 0),
    }
    assert all(one.model.placement.draws["blocks"].factor == 0.25 for one in hard.values())


# --- the size of V


@given(st.floats(1e-4, 1e-2), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_the_formula_comes_to_rest_where_it_says(lr: float, weight_decay: float, start: float) -> None:
    steps = math.ceil(8 / (lr * weight_decay))
    if steps > 200_000:
        return
    optim = OptimConfig(lr=lr, warmup=0, schedule="constant", sdd_weight_decay=weight_decay)
    config = replace(preset("nano"), optim=optim, steps=steps)
    assert decay.expected_rms(config, start)[-1] == pytest.approx(decay.at_rest(config), rel=0.01)


@given(st.floats(1e-4, 1e-2), st.floats(1e-3, 1.0), st.integers(1, 300))
def test_without_decay_the_squares_of_the_rates_add_up(lr: float, start: float, steps: int) -> None:
    optim = OptimConfig(lr=lr, warmup=0, schedule="constant", sdd_weight_decay=0.0)
    config = replace(preset("nano"), optim=optim, steps=steps)
    assert decay.expected_rms(config, start)[-1] == pytest.approx(math.sqrt(start**2 + steps * lr**2))
    assert math.isinf(decay.at_rest(config))


def with_probe(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let made-up runs have a V of so many times the formula's size, and shares of eps."""
    plain = results.harvest

    def harvest(run: Path, held_out: object, measure: object) -> RunResult:
        found = plain(run, held_out, measure)  # pyright: ignore[reportArgumentType]
        config = found.run_config
        last = config.steps
        v = [0.08, factor * decay.expected_rms(config, 0.08)[last - 1]]
        share = max(norm.eps for norm in config.model.placement.norms.values()) / config.model.init_scale**2
        probe = {
            "tokens": [float(config.tokens_per_step), float(last * config.tokens_per_step)],
            "v_rms": v,
            "v_angle": [0.1, 0.01],
            "eps_median": [share, share],
            "eps_max": [10 * share, 10 * share],
        }
        return replace(found, probe=probe)

    monkeypatch.setattr(engine.results, "harvest", harvest)


@pytest.mark.parametrize(
    ("factor", "word"), [(1.02, "On the way there, yes"), (0.9, "On the way there, yes"), (1.5, "Not within a quarter")]
)
def test_v_is_measured_against_the_formula(
    factor: float, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(lambda config: 5.0 + wobble(config)).install(monkeypatch)
    with_probe(factor, monkeypatch)
    assert run_study("decay", tmp_path, Options(seeds=2)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert answer(text).startswith(f"**Answer:** {word}: after 1M tokens rms(V) is {factor:.2f} to {factor:.2f} times")
    assert (tmp_path / "figures" / "rms.png").exists()


def test_v_at_rest_is_told_from_v_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda config: 5.0 + wobble(config)).install(monkeypatch)
    with_probe(1.0, monkeypatch)
    arms, unrested = ("decay0.1", "decay0", "decay1"), "V has not come to rest: it ends at "
    constant = {"optim.schedule": "constant"}
    for name, length, word, said in (
        ("rest", 20_000_000, "Yes", False),
        ("way", 300_000, "On the way there, yes", True),
    ):
        options = Options(seeds=1, placements=arms, conditions=("default",), lengths=(length,), overrides=constant)
        assert run_study("decay", tmp_path / name, options) == 0
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert answer(text).startswith(f"**Answer:** {word}: after ")
        assert (unrested in text) == said


def test_shares_of_eps_are_shown_beside_their_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(config: RunConfig) -> float:
        largest = max(norm.eps for norm in config.model.placement.norms.values())
        return 5.0 + (0.2 if largest / config.model.init_scale**2 > 0.05 else 0.0) + wobble(config)

    FakeLab(loss).install(monkeypatch)
    with_probe(1.0, monkeypatch)
    assert run_study("eps", tmp_path, Options(seeds=2)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    usual, small = answer(text).split("; ")
    assert "at the usual init eps1e-12, eps1e-9, eps1e-5, eps1e-4, eps1e-3 and eps1e-2 cost nothing" in usual
    assert "at init std x0.1 eps1e-12, eps1e-9, eps1e-5 and eps1e-4 cost nothing" in small
    assert "+0.200 ± 0.000 nats" in small
    assert "| eps1e-2 | init std x0.1 | 1e+02% | 1e+03% |" in text


def test_where_the_base_breaks_eps_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(config: RunConfig) -> float:
        return math.nan if config.model.init_scale < 1 else 5.0 + wobble(config)

    text = page("eps", tmp_path, breaking, monkeypatch, placements=("eps1e-6", "eps1e-2"))
    assert "at init std x0.1 nothing can be said, since eps1e-6 did not converge in every seed." in answer(text)


def test_precision_says_what_activations_and_norms_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {("float32", "float32"): 0.0, ("bfloat16", "float32"): 0.01, ("bfloat16", "bfloat16"): 0.03}
    text = page(
        "precision",
        tmp_path,
        lambda config: 5.0 + costs[config.precision, config.model.statistics] + wobble(config),
        monkeypatch,
    )
    assert "bfloat16 ends 0.010 ± 0.000 nats above float32 and bfloat16-norms ends 0.030 ± 0.000 nats above" in answer(
        text
    )
    assert "norms in bfloat16 end 0.020 ± 0.000 nats above norms in float32" in text.replace(" by default", "")


def test_precision_is_no_option_of_the_study_that_compares_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sets precision itself"):
        PlannedStudy(studies["precision"], Request(tmp_path, "nano", 1, overrides={"precision": "float32"}))


def test_conditions_are_views_of_their_own_unless_they_are_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(with_best).install(monkeypatch)
    assert [len(views(shape, outcome(name, tmp_path / name))) for name, shape in SHAPES.items()] == [1, 1, 2, 2, 2]


def test_a_shape_is_complete() -> None:
    for shape in SHAPES.values():
        assert isinstance(shape, OneAtATime)
        assert all(change.text for change in shape.changes)
