import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_studies import FakeLab, made_result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdd.commands.main import main
from sdd.commands.study import Options, run_study
from sdd.errors import UserError
from sdd.lab.definition import Outcome, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.studies import demo, max_rate
from sdd.lab.studies.max_rate import MARGIN, WINDOW, divergence, ramp_of
from sdd.train import RunConfig
from sdd.train.schedule import learning_rate

HALF = WINDOW // 2
#: By placement: the rate at which the loss leaves its lowest value, with 12 blocks; None never.
LIMITS = {"sdd": None, "postnorm": 0.01, "prenorm-qk": 0.1}


def curve(steps: int, breaks_at: int | None, jump: float = 2.0) -> list[float]:
    """A loss that falls from 8 to 5, and from a step (counted from 1) on stands higher by `jump`."""
    falling = [5.0 + 3.0 * math.exp(-step / (steps / 10)) for step in range(steps)]
    return [loss + jump * (breaks_at is not None and step + 1 >= breaks_at) for step, loss in enumerate(falling)]


@given(st.integers(100, 600), st.floats(0.2, 0.9), st.floats(MARGIN + 0.1, 100) | st.just(math.inf) | st.just(math.nan))
def test_divergence_is_where_the_loss_leaves_its_lowest_value(steps: int, share: float, jump: float) -> None:
    at = round(share * steps)
    levelled = [8.0, *[5.0] * (steps - 1)]
    losses = [loss + (jump if step + 1 >= at else 0) for step, loss in enumerate(levelled)]
    assert divergence(losses) == at


@given(st.integers(100, 600), st.integers(0, 2**32 - 1))
def test_noise_on_a_falling_curve_is_no_divergence(steps: int, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.15, steps)
    assert divergence((np.array(curve(steps, None)) + noise).tolist()) is None


@given(st.integers(100, 600), st.floats(0.2, 0.8), st.integers(1, HALF), st.floats(1, 1e6))
def test_a_spike_that_is_over_within_half_a_window_is_no_divergence(
    steps: int, share: float, width: int, height: float
) -> None:
    losses, at = curve(steps, None), round(share * steps)
    losses[at : at + width] = [loss + height for loss in losses[at : at + width]]
    assert divergence(losses) is None


@given(st.integers(0, 3 * WINDOW))
def test_one_loss_that_is_not_finite_is_divergence_wherever_it_stands(at: int) -> None:
    losses = [5.0] * (3 * WINDOW + 1)
    losses[at] = math.nan
    assert divergence(losses) == at + 1


@pytest.mark.parametrize("steps", [0, 1, WINDOW - 1])
def test_a_curve_shorter_than_the_window_never_diverges_and_never_learns(steps: int) -> None:
    assert divergence([5.0] * steps) is None


def result(losses: list[float], steps: int = 300):
    plan = PlannedStudy(max_rate.DEFINITION, Request(Path(), "nano", 1, overrides={"steps": steps}))
    name, config = plan.run(plan.arms[0], plan.conditions[0], 10.0, 0)
    return replace(made_result(name, config, 5.0), measured={"losses": losses})


@given(st.integers(60, 280))
def test_the_highest_rate_is_that_of_the_step_before(at: int) -> None:
    found = ramp_of(result(curve(300, at)))
    optim = result([]).run_config.optim
    assert not found.survived
    assert found.rate == learning_rate(optim, at - 1, 300)
    assert found.lowest_rate <= found.rate


@given(st.integers(60, 299))
def test_a_run_that_ended_early_diverged_at_its_end(ended: int) -> None:
    found = ramp_of(result(curve(300, None)[:ended]))
    assert (found.survived, found.rate) == (False, learning_rate(result([]).run_config.optim, ended, 300))


def test_a_loss_that_never_rises_survives_and_one_that_never_falls_did_not_learn() -> None:
    assert str(ramp_of(result(curve(300, None)))) == ">10"
    assert str(ramp_of(result([8.0] * 300))) == "-"
    assert str(ramp_of(result([]))) == "-"


def breaking(config: RunConfig) -> dict[str, Any]:
    limit = LIMITS[config.model.placement.name]
    deep = math.sqrt(config.model.n_layers / 12)
    rates = [learning_rate(config.optim, step, config.steps) for step in range(1, config.steps + 1)]
    at = next((step for step, rate in enumerate(rates, 1) if limit and rate > limit / deep), None)
    return {"losses": curve(config.steps, at)}


def install(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    return FakeLab(lambda _: 5.0, measured_of=breaking).install(monkeypatch)


def outcome(out: Path, **asked: Any) -> Outcome:
    request = Request(out, **{"preset": "nano", "seeds": 2, "placements": tuple(LIMITS), "depths": (12, 48), **asked})
    return Engine(PlannedStudy(max_rate.DEFINITION, request), Console(file=io.StringIO())).outcome()


def test_limits_are_found_at_every_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    found = max_rate.ramps(outcome(tmp_path))
    step = (max_rate.LAST / max_rate.FIRST) ** (1 / 1499)
    for condition, factor in (("12-blocks", 1.0), ("48-blocks", 0.5)):
        for arm, limit in LIMITS.items():
            for ramp in found[arm, condition].values():
                assert ramp.survived == (limit is None)
                if limit:
                    assert limit * factor / step <= ramp.rate <= limit * factor


def test_the_page_says_who_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert run_study("max-rate", tmp_path, Options(placements=tuple(LIMITS), seeds=2, depths=(12, 48))) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "sdd bears learning rates up to >10 with 12 blocks and >10 with 48 blocks" in text
    assert "the least by postnorm (0.005" in text
    assert "--depths 12,48" in text
    assert run_study("max-rate", tmp_path, Options()) == 0  # the folder remembers its depths


def test_a_depth_decides_the_blocks_and_more_repeat_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    outcome(tmp_path, depths=(12,))
    lab = install(monkeypatch)
    found = outcome(tmp_path)
    assert {config.model.n_layers for config in lab.finished.values()} == {48}
    assert {cell.results[0].run_config.model.n_layers for cell in found.cells.values()} == {12, 48}


def test_what_a_study_by_depth_sets_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the study max-rate sets model\.n_layers itself: give --depths"):
        PlannedStudy(max_rate.DEFINITION, Request(tmp_path, "nano", 1, overrides={"model.n_layers": 3}))
    with pytest.raises(UserError, match=r"the study demo has no --depths: give --model\.n_layers"):
        PlannedStudy(demo.DEFINITION, Request(tmp_path, "nano", 1, depths=(3,)))


@pytest.mark.parametrize("text", ["0", "12,", "1.5", "-3", "many", "1000000000"])
def test_depths_that_are_none_are_refused_in_a_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "max-rate", "--depths", text, "--out", str(tmp_path / "out")]) == 2
    assert "Traceback" not in (said := capsys.readouterr().err)
    assert text in said
