"""The cost of a token for each method."""

import json
from pathlib import Path

import pytest

from sdd.errors import UserError
from sdd.lab.definition import PlannedStudy, Request
from sdd.lab.grid import timing
from sdd.lab.studies import depth
from sdd.lab.studies.convergence import DEFINITION
from sdd.train import RunConfig


def runs(out: Path) -> dict[str, RunConfig]:
    plan = PlannedStudy(DEFINITION, Request(out, "nano", 1))
    return {arm.name: plan.run(arm, plan.conditions[0], 1e-3, 0)[1] for arm in plan.arms}


def test_methods_take_turns_and_an_odd_round_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def seconds(config: RunConfig, threads: int) -> float:
        name = config.model.placement.name
        asked.append(name)
        assert threads == 2
        slow = asked.count(name) % 3 == 0  # the machine did something else
        return {"sdd": 3.0, "sdd-released": 4.0, "prenorm-qk": 2.0, "olmo2": 2.5}[name] * (10 if slow else 1)

    monkeypatch.setattr(timing, "step_seconds", seconds)
    configs = runs(tmp_path)
    tokens = configs["sdd"].tokens_per_step
    found = timing.seconds_per_token(configs, 2, tmp_path)
    assert found["sdd"] == 3.0 / tokens
    assert found["prenorm-qk"] == 2.0 / tokens
    assert asked == list(configs) * timing.ROUNDS
    assert timing.seconds_per_token(configs, 2, tmp_path) == found
    assert len(asked) == len(configs) * timing.ROUNDS  # from the file
    assert json.loads((tmp_path / "timing.json").read_text())["environment"]["threads"] == 2


def test_a_method_that_was_not_timed_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = runs(tmp_path)
    monkeypatch.setattr(timing, "step_seconds", lambda config, threads: 1.0)
    timing.seconds_per_token({"sdd": configs["sdd"]}, 1, tmp_path)
    monkeypatch.setattr(timing, "step_seconds", lambda config, threads: 2.0)
    assert set(timing.seconds_per_token(configs, 1, tmp_path).values()) == {2.0 / configs["sdd"].tokens_per_step}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds_per_token": {"sdd": "soon"}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "timing.json").write_text(text)
    with pytest.raises(UserError, match=r"timing\.json is damaged: delete it"):
        timing.seconds_per_token(runs(tmp_path), 1, tmp_path)


def test_methods_that_are_not_timed_count_block_for_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = PlannedStudy(depth.DEFINITION, Request(tmp_path, "nano", 1, depths=(8, 16, 64, 256)))
    configs = [plan.run(arm, condition, 1e-3, 0)[1] for condition in plan.conditions for arm in plan.arms]
    clock = iter(range(0, 1000, 6))  # two methods are timed before it is late
    timed: list[int] = []

    def seconds(config: RunConfig, _: int) -> float:
        timed.append(config.model.n_layers)
        return 0.01 * config.model.n_layers

    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(timing, "step_seconds", seconds)
    expected = sum(timing.run_seconds(config, 0.01 * config.model.n_layers) for config in configs)
    assert timing.grid_seconds(configs, 1, 1) == pytest.approx(expected)
    assert len(timed) < len(configs)
