import io
import itertools
import math
from pathlib import Path

import pytest
from helpers_studies import FakeLab, wobble
from rich.console import Console

from sdd.commands.study import Options, run_study
from sdd.lab.definition import Outcome, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.studies import ladder
from sdd.placement import placements
from sdd.train import RunConfig

#: The loss of each arm beside that of prenorm-qk.
GAINS = {"qk+init": -0.01, "qk+embed": -0.05, "peri+qk": -0.15, "peri+qk+alpha": -0.12, "sdd-v1": -0.2, "olmo2": 0.1}


def known(config: RunConfig) -> float:
    return 5.0 + GAINS.get(config.model.placement.name, 0.0) + wobble(config)


def outcome(out: Path, seeds: int = 2) -> Outcome:
    return Engine(PlannedStudy(ladder.DEFINITION, Request(out, "nano", seeds)), Console(file=io.StringIO())).outcome()


def test_every_step_starts_from_an_arm_of_the_study() -> None:
    names = [arm.name for arm in ladder.DEFINITION.arms]
    assert len(names) == len(set(names))
    assert {rung.below for rung in ladder.RUNGS} <= set(names)


@pytest.mark.parametrize("way", [ladder.TO_SDD, ladder.FROM_OLMO])
def test_a_way_is_unbroken_and_ends_at_the_former_default(way: tuple[ladder.Rung, ...]) -> None:
    for below, above in itertools.pairwise(way):
        assert above.below == below.arm.name
    assert way[-1].arm.name == "sdd-v1"


def test_the_last_variant_of_each_way_is_one_kind_of_change_away_from_the_former_default(tmp_path: Path) -> None:
    plan = PlannedStudy(ladder.DEFINITION, Request(tmp_path, "nano", 1))
    for way in (ladder.TO_SDD, ladder.FROM_OLMO):
        last = plan.placement(way[-2].arm)
        differ = {
            site
            for site in {*last.norms, *placements["sdd-v1"].norms}
            if last.norms.get(site) != placements["sdd-v1"].norms.get(site)
        }
        assert differ <= {"attn_in", "ffn_in", "attn_post", "ffn_post", "final"}
        assert last.init == placements["sdd-v1"].init


def test_steps_are_the_differences_of_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(known).install(monkeypatch)
    late = {(step.rung.below, step.rung.arm.name): step.late for step in ladder.measured(outcome(tmp_path))}
    assert late["prenorm-qk", "qk+init"].value == pytest.approx(-0.01)
    assert late["qk+embed", "peri+qk"].value == pytest.approx(-0.1)
    assert late["peri+qk", "peri+qk+alpha"].value == pytest.approx(0.03)
    assert late["sdd-v1", "sdd-v1-decay"].value == pytest.approx(0.0)
    assert late["sdd-v1", "sdd-v1-decay"].n == 2


def test_a_run_that_did_not_converge_leaves_its_steps_without_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(config: RunConfig) -> float:
        return math.nan if (config.model.placement.name, config.seed) == ("olmo2", 0) else known(config)

    FakeLab(breaking).install(monkeypatch)
    late = {step.rung.arm.name: step.late for step in ladder.measured(outcome(tmp_path))}
    assert (late["olmo2+embed"].n, late["qk+embed"].n) == (1, 2)


def test_the_page_names_the_step_that_carries_the_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(known).install(monkeypatch)
    assert run_study("ladder", tmp_path, Options(seeds=2)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "at 3M tokens: norms on both outputs: Peri-LN with norms on q, k (-0.100 ± 0.000 nats)" in text
    assert (tmp_path / "figures" / "steps.png").exists()


@pytest.mark.parametrize("conditions", [("default",), ("default", "half")])
def test_the_page_speaks_of_rates_where_there_are_several(
    conditions: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(known).install(monkeypatch)
    assert run_study("ladder", tmp_path, Options(seeds=2, conditions=conditions)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    several = len(conditions) > 1
    assert ("mean over the rates" in text, "mean over rates" in text) == (several, several)
    assert ("One rate for all" in text) != several


def test_the_page_says_so_where_no_step_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = {"prenorm-qk": (0.0, 0.3), "qk+init": (0.3, 0.0)}

    def noisy(config: RunConfig) -> float:
        return known(config) + noise.get(config.model.placement.name, (0.0, 0.0))[config.seed]

    FakeLab(noisy).install(monkeypatch)
    assert run_study("ladder", tmp_path, Options(seeds=2, placements=tuple(noise))) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "At 3M tokens no step is told apart from zero." in text
