"""The studies of depth, gradients, similarity and Pre-Norm read made-up results."""

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_studies import FakeLab, LossOf, wobble
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdd.commands.study import Options, run_study
from sdd.lab.definition import Outcome, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.measures import GROUPS
from sdd.lab.studies import depth, gradients, prenorm, similarity, studies
from sdd.train import RunConfig


def outcome(
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    name: str,
    loss: LossOf,
    measured: Callable[[RunConfig], dict[str, Any]] = lambda _: {},
    **asked: Any,
) -> Outcome:
    FakeLab(loss, measured_of=measured).install(monkeypatch)
    plan = PlannedStudy(studies[name], Request(out, **{"preset": "nano", "seeds": 2, **asked}))
    return Engine(plan, Console(file=io.StringIO())).outcome()


def method(config: RunConfig) -> str:
    return config.model.placement.name


# --- depth: Post-Norm breaks from 32 blocks on, the others gain 0.1 nats a doubling


def deep_loss(config: RunConfig) -> float:
    if method(config) == "postnorm" and config.model.n_layers >= 32:
        return math.nan
    return 5.5 - 0.1 * math.log2(config.model.n_layers / 8) + wobble(config) - 0.2 * (method(config) == "sdd")


def fading(config: RunConfig) -> dict[str, Any]:
    """Gradients that fall by half from block to block on their way down, at the last step only."""
    n = config.model.n_layers
    return {"steps": [1, 600], "grad_rms": [[1e-3] * (n + 1), [1e-3 * 0.5 ** (n - layer) for layer in range(n + 1)]]}


DEEP = {"placements": ("sdd", "postnorm", "keel"), "depths": (8, 16, 32)}


def test_the_page_of_depth_says_what_breaks_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(deep_loss, measured_of=fading).install(monkeypatch)
    assert run_study("depth", tmp_path, Options(seeds=2, **DEEP)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "sdd trains at every depth from 8 to 32 blocks" in text
    assert "keel trains at every depth too; postnorm fails at some depth." in text
    assert "postnorm does not converge with 32 blocks" in text
    assert "sdd ends 0.200 ± 0.000 nats below its own 8 blocks with 32 blocks" in text
    assert (tmp_path / "figures" / "along.png").exists()


def test_one_depth_alone_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(deep_loss, measured_of=fading).install(monkeypatch)
    assert run_study("depth", tmp_path, Options(seeds=1, placements=DEEP["placements"], depths=(32,))) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.search(r"sdd trains with 32 blocks \(loss 5\.1\d+\); keel trains too; postnorm fails\.", text)
    assert (tmp_path / "figures" / "curves.png").exists()
    assert not (tmp_path / "figures" / "depth.png").exists()


def test_depth_where_nothing_trains_has_a_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda _: math.nan).install(monkeypatch)
    assert run_study("depth", tmp_path, Options(seeds=1, **DEEP)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "sdd does not train with 8, 16 and 32 blocks; postnorm and keel fail at some depth." in text
    assert not re.search(r"\bnan\b", text)


def test_gradients_along_the_stream_are_compared_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome(monkeypatch, tmp_path, "depth", deep_loss, fading, **DEEP)
    for cell in found.cells.values():
        for run in cell.results:
            n = run.run_config.model.n_layers
            assert depth.stream_ratio(run, 0) == 1
            assert depth.stream_ratio(run, -1) == pytest.approx(0.5**n)


# --- gradients


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_spread_and_tilt_do_not_depend_on_the_size_of_gradients(norms: list[float], factor: float) -> None:
    scaled = [factor * norm for norm in norms]
    assert gradients.spread(scaled) == pytest.approx(gradients.spread(norms))
    assert gradients.spread(norms) >= 1
    assert gradients.tilt(scaled) == pytest.approx(gradients.tilt(norms), nan_ok=True)
    assert gradients.tilt(norms[::-1]) == pytest.approx(1 / gradients.tilt(norms), nan_ok=True)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_not_finite_has_no_spread(bad: float) -> None:
    assert math.isnan(gradients.spread([1.0, bad]))
    assert math.isnan(gradients.tilt([1.0, bad]))
    assert math.isnan(gradients.spread([]))


def slanted(config: RunConfig) -> dict[str, Any]:
    """Gradients even in sdd; in others 8 times as large in the last layer as in the first, evenly on a logarithm."""
    n = config.model.n_layers
    steep = 1.0 if method(config) == "sdd" else 8.0
    row = [steep ** (layer / (n - 1)) for layer in range(n)]
    return {"steps": [1, 40, 400], "norms": {group: [[1.0] * n, row, row] for group in GROUPS}}


def test_the_page_of_gradients_ranks_methods_by_their_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda _: 5.0, measured_of=slanted).install(monkeypatch)
    assert run_study("gradients", tmp_path, Options(seeds=2, placements=("postnorm", "sdd"))) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "At step 400 the gradient norms of a group differ from layer to layer" in text
    assert "by at most 1.00 (1.00 to 1.00) times in sdd and 8.00 (8.00 to 8.00) times in postnorm." in text
    assert "| postnorm | 1 | 1.00 (1.00 to 1.00) |" in text
    assert len(list((tmp_path / "figures").glob("*.png"))) == len(GROUPS)


# --- similarity


def alike(config: RunConfig) -> dict[str, Any]:
    """Under sdd outputs are less alike and updates more than under others; postnorm has diverged."""
    if method(config) == "postnorm":
        return {}
    outputs, updates = (0.6, 0.4) if method(config) == "sdd" else (0.9, 0.1)
    n, noise = config.model.n_layers, 0.01 * config.seed

    def table(size: int, value: float) -> list[list[float]]:
        return [[1.0 if a == b else value + noise for a in range(size)] for b in range(size)]

    return {"outputs": table(n + 1, outputs), "updates": table(n, updates)}


def test_the_page_of_similarity_settles_both_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda c: math.nan if method(c) == "postnorm" else 5.0, measured_of=alike).install(monkeypatch)
    asked = Options(seeds=2, placements=("sdd", "prenorm-qk", "postnorm"))
    assert run_study("similarity", tmp_path, asked) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "the least alike of 2 methods (mean cosine 0.605 ± 0.064) when outputs of neighbouring blocks are compared"
        in text
    )
    assert (
        "the most alike of 2 methods (mean cosine 0.405 ± 0.064) when updates of neighbouring blocks are compared"
        in text
    )
    assert "The similarity of outputs of neighbouring blocks in sdd is lower than in prenorm-qk." in text
    assert "| postnorm | - (2 of 2)" in text


def test_neighbours_and_pairs_are_read_off_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(config: RunConfig) -> dict[str, Any]:
        return {"outputs": [[1.0, 0.1, 0.5], [0.1, 1.0, 0.3], [0.5, 0.3, 1.0]], "updates": [[1.0, 0.2], [0.2, 1.0]]}

    found = outcome(monkeypatch, tmp_path, "similarity", lambda _: 5.0, counted, placements=("sdd",), seeds=1)
    (run,) = found.results
    assert similarity.neighbours(run, "outputs") == [0.1, 0.3]
    assert similarity.overall(run, "outputs") == pytest.approx(0.3)
    assert (similarity.neighbours(run, "updates"), similarity.overall(run, "updates")) == ([0.2], pytest.approx(0.2))


# --- prenorm


def wired(config: RunConfig) -> float:
    gain = {"sdd-prenorm": 0.1, "sdd-paper": 0.3, "prenorm-qk": 0.05}.get(method(config), 0.0)
    return 5.5 - gain + 0.1 * math.log2(config.optim.lr / 4e-3) ** 2 + wobble(config)


def test_sdd_is_compared_with_its_own_wiring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome(monkeypatch, tmp_path, "prenorm", wired)
    (condition,) = found.plan.conditions
    apart = {
        (pair.method.arm.name, pair.baseline.arm.name): pair.difference.value
        for pair in prenorm.pairs(found, condition.name)
    }
    assert apart == pytest.approx(
        {
            ("sdd-prenorm", "prenorm"): -0.1,
            ("sdd-prenorm", "prenorm-qk"): -0.05,
            ("sdd-paper", "postnorm"): -0.3,
            ("sdd-paper", "sdd-prenorm"): -0.2,
        }
    )


def test_the_page_of_prenorm_answers_on_both_wirings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda c: math.nan if method(c) == "postnorm" else wired(c)).install(monkeypatch)
    assert run_study("prenorm", tmp_path, Options(seeds=2)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "At 1M tokens, each at its best rate: on Pre-Norm sdd-prenorm ends 0.100 ± 0.000 nats below prenorm" in text
    assert "postnorm did not converge in most seeds" in text
    assert "on Post-Norm sdd-paper and postnorm have no seed in which both converged." in text


# --- runs that two studies share


def test_gradients_and_similarity_ask_for_the_same_runs(tmp_path: Path) -> None:
    def runs(name: str) -> dict[str, RunConfig]:
        plan = PlannedStudy(studies[name], Request(tmp_path, "nano", 2))
        return dict(plan.run(arm, plan.conditions[0], plan.base.optim.lr, seed) for arm in plan.arms for seed in (0, 1))

    assert runs("gradients") == runs("similarity")
    assert studies["gradients"].measure == studies["similarity"].measure
