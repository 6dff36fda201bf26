"""A part of a study's conditions, on made-up results."""

import io
import json
from pathlib import Path

import pytest
from helpers_studies import FakeLab, wobble
from rich.console import Console

from sdd.commands.main import main
from sdd.commands.study import Options, run_study
from sdd.errors import UserError
from sdd.lab.definition import PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.studies import ladder, studies
from sdd.train import RunConfig

SEVERAL = [name for name, study in studies.items() if len(study.conditions) > 1 and study.divisible]


def loss(config: RunConfig) -> float:
    return 5.0 + wobble(config)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_page_is_drawn_of_the_first_condition_alone_and_says_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = FakeLab(loss)
    lab.install(monkeypatch)
    first, *others = studies[name].conditions
    assert run_study(name, tmp_path, Options(seeds=1, conditions=(first.name,))) == 0
    assert lab.started
    assert not any(other.name in run for run in lab.started for other in others)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    were = "condition was" if len(others) == 1 else "conditions were"
    assert f"This page is a part of its study, of which {len(others)} {were} left out: {others[0].name}" in text
    assert all(other.name in text for other in others)
    assert f"--conditions {first.name}" in text
    assert "{rates}" not in text
    assert ("All are trained at one rate, with" in text) == ("{rates}" in " ".join(studies[name].method))
    assert json.loads((tmp_path / "study.json").read_text())["conditions"] == [first.name]


def test_a_later_command_adds_a_condition_and_runs_that_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeLab(loss)
    lab.install(monkeypatch)
    assert run_study("ladder", tmp_path, Options(seeds=1, conditions=("default",))) == 0
    once = len(lab.started)
    assert run_study("ladder", tmp_path, Options()) == 0  # the folder remembers its conditions
    assert len(lab.started) == once
    assert run_study("ladder", tmp_path, Options(conditions=("half", "default"))) == 0
    assert len(lab.started) == 2 * once
    assert all("half" in run for run in lab.started[once:])
    assert "is a part of its study" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_losses_are_those_of_the_conditions_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(lambda config: config.optim.lr * 1000).install(monkeypatch)
    plan = PlannedStudy(ladder.DEFINITION, Request(tmp_path, "nano", 1, conditions=("default",)))
    found = Engine(plan, Console(file=io.StringIO())).outcome()
    assert {names[1] for names in found.cells} == {"3M"}
    assert {cell.rate for cell in found.cells.values()} == {plan.base.optim.lr}


@pytest.mark.parametrize(
    ("study", "conditions", "message"),
    [
        ("robustness", "lr-x5", "the study robustness measures against its condition default: name it too"),
        ("ladder", "default,haf", "has no condition 'haf' (did you mean 'half'?); choose from default, half"),
        ("length", "default", "the study length has no --conditions: it has one setting"),
        ("demo", "recommended", "the study demo has no --conditions: it is the comparison of recommended and hard"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_in_a_line(
    study: str,
    conditions: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["study", study, "--conditions", conditions, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_condition_is_refused_where_the_study_is_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no condition 'hard'"):
        PlannedStudy(studies["robustness"], Request(tmp_path, "nano", 1, conditions=("default", "hard")))
