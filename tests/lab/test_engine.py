import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_studies import FakeLab, made_result, wobble
from rich.console import Console

from sdd.commands.study import Options, _request, run_study
from sdd.errors import Interrupted, RunFailed, UserError
from sdd.lab import results
from sdd.lab.definition import Definition, Outcome, PlannedStudy, Request, best_rate
from sdd.lab.engine import Engine
from sdd.lab.studies import convergence, lr_sensitivity, robustness
from sdd.train import RunConfig

BEST = {"sdd": 8e-3, "sdd-released": 4e-3, "prenorm-qk": 4e-3, "olmo2": 1e-3}


def valley(config: RunConfig) -> float:
    """A loss with a best rate of its own for each placement; far above it the run diverges."""
    octaves = math.log2(config.optim.lr / BEST.get(config.model.placement.name, 2e-3))
    return math.nan if octaves > 4 else 5.0 + 0.1 * octaves**2 + wobble(config)


def outcome(definition: Definition, out: Path, **asked: object) -> Outcome:
    request = Request(out, **{"preset": "nano", "seeds": 2, **asked})  # type: ignore[arg-type]
    return Engine(PlannedStudy(definition, request), Console(file=io.StringIO())).outcome()


def test_a_common_rate_makes_one_run_an_arm_condition_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeLab(valley).install(monkeypatch)
    found = outcome(robustness.DEFINITION, tmp_path, seeds=1)
    assert len(lab.started) == 35
    rates = {condition: found.cells["sdd", condition].rate for condition in ("default", "lr-x5", "joined")}
    assert rates == {"default": 1e-3, "lr-x5": 5e-3, "joined": 5e-3}
    configs = {name: lab.finished[name] for name in lab.started}
    plain = configs["sdd-default-lr0.001-seed0"]
    joined = configs["sdd-joined-lr0.005-seed0"]
    assert (joined.model.init_scale, joined.optim.warmup, plain.model.init_scale) == (0.1, 0, 1.0)
    assert replace(joined, model=plain.model, optim=plain.optim) == plain
    assert (plain.guard.nonfinite, plain.guard.spikes) == ("stop", "observe")


def test_each_method_gets_its_best_rate_on_seeds_that_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = FakeLab(valley).install(monkeypatch)
    found = outcome(convergence.DEFINITION, tmp_path)
    assert {arm: cell.rate for (arm, _), cell in found.cells.items()} == BEST
    reported = {result.seed for cell in found.cells.values() for result in cell.results}
    tuned = {result.seed for grid in found.grids.values() for cell in grid.values() for result in cell.results}
    assert reported == {0, 1}
    assert not reported & tuned
    assert len(lab.started) == len(set(lab.started))


def test_a_best_rate_at_the_end_extends_the_grid_until_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(valley).install(monkeypatch)
    found = outcome(convergence.DEFINITION, tmp_path)
    first = PlannedStudy(convergence.DEFINITION, Request(tmp_path, "nano", 2)).first_rates
    olmo = found.grids["olmo2", "default"]
    assert min(first) == BEST["olmo2"]
    assert min(olmo) < BEST["olmo2"]
    assert list(found.grids["sdd", "default"]) == list(first)
    for grid in found.grids.values():
        assert min(grid) < best_rate(grid) < max(grid)


def test_a_grid_whose_loss_falls_for_ever_is_extended_so_far_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(lambda config: 5.0 - math.log10(config.optim.lr)).install(monkeypatch)
    found = outcome(convergence.DEFINITION, tmp_path, seeds=1, placements=("sdd",))
    assert len(found.grids["sdd", "default"]) == len(convergence.DEFINITION.rates.factors) + 4


def test_a_sweep_has_one_grid_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BEST, "peri", 2e-4)
    FakeLab(valley).install(monkeypatch)
    found = outcome(lr_sensitivity.DEFINITION, tmp_path, seeds=1, placements=("sdd", "peri"))
    grids = [list(grid) for grid in found.grids.values()]
    assert grids[0] == grids[1]
    assert min(grids[0]) < 2e-4
    assert max(grids[0]) / min(grids[0]) >= 100


def test_tuning_anew_drops_what_multiplies_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(valley).install(monkeypatch)
    found = outcome(robustness.DEFINITION, tmp_path, seeds=1, tuned=True, placements=("sdd",))
    titles = [condition.title for condition in found.plan.conditions]
    assert titles == ["default", "init std x0.1", "no warm-up", "init std x0.1, no warm-up"]
    assert {cell.rate for cell in found.cells.values()} == {BEST["sdd"]}


@pytest.mark.parametrize("after", [0, 3, 20, 47])
def test_an_interrupted_study_comes_to_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    FakeLab(valley).install(monkeypatch)
    whole = outcome(convergence.DEFINITION, tmp_path / "whole")
    lab = FakeLab(valley, interrupt_after=after).install(monkeypatch)
    with pytest.raises(Interrupted):
        outcome(convergence.DEFINITION, tmp_path / "cut")
    lab.interrupt_after = None
    cut = outcome(convergence.DEFINITION, tmp_path / "cut")
    assert repr(cut.cells) == repr(whole.cells)  # nan, of a run that diverged, is not equal to itself
    assert repr(cut.grids) == repr(whole.grids)
    assert len(lab.started) == len(set(lab.started))


def test_a_study_that_goes_on_first_writes_the_results_of_what_had_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = FakeLab(valley, interrupt_after=5).install(monkeypatch)
    written = []
    for more in (5, 3, 0):
        lab.interrupt_after = more
        with pytest.raises(Interrupted):
            outcome(robustness.DEFINITION, tmp_path)
        written.append(len(list((tmp_path / "results").glob("*.json"))))
    assert written == [0, 5, 8]
    assert len(lab.started) == 8


def test_results_alone_regenerate_a_study_and_more_seeds_run_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(valley).install(monkeypatch)
    before = outcome(convergence.DEFINITION, tmp_path)
    clone = FakeLab(valley).install(monkeypatch)  # there are no run directories
    assert outcome(convergence.DEFINITION, tmp_path).cells == before.cells
    assert clone.started == []
    more = outcome(convergence.DEFINITION, tmp_path, seeds=3)
    assert sorted(clone.started) == sorted(f"{arm}-default-lr{BEST[arm]:g}-seed2" for arm, _ in more.cells)
    assert all(len(cell.results) == 3 for cell in more.cells.values())


def test_a_run_without_a_result_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sdd-default-lr0.001-seed0"
    lab = FakeLab(valley, crash={name}).install(monkeypatch)
    with pytest.raises(RunFailed, match=f"1 of 35 runs ended without a result, {name}: no space left"):
        outcome(robustness.DEFINITION, tmp_path, seeds=1)
    assert len(list((tmp_path / "results").glob("*.json"))) == 34
    lab.crash = set()
    outcome(robustness.DEFINITION, tmp_path, seeds=1)
    assert lab.started.count(name) == 2
    assert len(lab.started) == 36


def test_other_settings_or_data_are_not_taken_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(valley).install(monkeypatch)
    asked = {"seeds": 1, "placements": ("sdd",)}
    outcome(robustness.DEFINITION, tmp_path, **asked)
    with pytest.raises(UserError, match="the result of a run with other settings"):
        outcome(robustness.DEFINITION, tmp_path, **asked, overrides={"steps": "77"})
    file = tmp_path / "results/sdd-default-lr0.001-seed0.json"
    results.save(replace(results.load(file), data="other text"), tmp_path / "results")
    with pytest.raises(UserError, match="saw different data"):
        outcome(robustness.DEFINITION, tmp_path, **asked)


def test_what_is_to_be_run_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(valley, interrupt_after=0).install(monkeypatch)
    said = io.StringIO()
    request = Request(tmp_path, "nano", seeds=1, placements=("sdd", "postnorm"))
    with pytest.raises(Interrupted):
        Engine(PlannedStudy(robustness.DEFINITION, request), Console(file=said, width=300)).outcome()
    tokens = 10 * 400 * 4 * 128
    for part in (
        "10 runs, " + f"{tokens:,} tokens",
        "10 of them still to do",
        "about 10 minutes",
        "sdd, postnorm",
        "0.001",
    ):
        assert part in said.getvalue()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"placements": ("sd",)}, "no 'sd' .did you mean 'sdd'"),
        ({"overrides": {"seed": "3"}}, "the study robustness sets seed itself"),
        ({"preset": "nanno"}, "no preset 'nanno' .did you mean 'nano'"),
        ({"overrides": {"steps": "many"}}, "steps='many'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], message: str
) -> None:
    lab = FakeLab(valley).install(monkeypatch)
    with pytest.raises(UserError, match=message):
        outcome(robustness.DEFINITION, tmp_path, **asked)
    assert lab.started == []


def test_a_study_that_tunes_anyway_has_no_option_for_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="convergence has no --tuned: it tunes every rate anyway"):
        PlannedStudy(convergence.DEFINITION, Request(tmp_path, "nano", 1, tuned=True))


@pytest.fixture
def asked_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study with options of its own."""
    FakeLab(valley).install(monkeypatch)
    asked = Options(seeds=2, placements=("sdd", "olmo2"), overrides={"steps": "200", "device": "cpu"})
    assert run_study("robustness", tmp_path / "study", asked) == 0
    return tmp_path / "study"


@pytest.mark.slow
def test_a_folder_alone_draws_the_same_page_again(asked_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = FakeLab(valley).install(monkeypatch)
    page = (asked_study / "report.html").read_text()
    tables = {file.name: file.read_text() for file in (asked_study / "tables").iterdir()}
    assert run_study("robustness", asked_study) == 0
    assert clone.started == []
    assert (asked_study / "report.html").read_text() == page
    assert {file.name: file.read_text() for file in (asked_study / "tables").iterdir()} == tables


@pytest.mark.slow
def test_a_page_has_the_command_that_makes_it(asked_study: Path) -> None:
    command = "sdd study robustness --preset nano --seeds 2 --placements sdd,olmo2 --steps 200 --device cpu"
    command += f" --precision float32 --out {asked_study}"
    assert command in (asked_study / "README.md").read_text()


@pytest.mark.slow
def test_a_new_study_fixes_what_machines_would_choose_and_an_old_one_keeps_its_own(asked_study: Path) -> None:
    file = asked_study / "study.json"
    stored = json.loads(file.read_text())
    assert stored["overrides"]["precision"] == "float32"
    configs = [json.loads(path.read_text())["config"] for path in (asked_study / "results").iterdir()]
    assert {(config["compile"], config["precision"]) for config in configs} == {(False, "float32")}
    del stored["overrides"]["precision"]
    file.write_text(json.dumps(stored))
    assert "precision" not in _request(robustness.DEFINITION, asked_study, Options()).overrides


def test_a_study_is_compiled_only_if_asked_to_be(tmp_path: Path) -> None:
    for asked, compiled in {None: False, "auto": False, "false": False, "true": True}.items():
        overrides = {} if asked is None else {"compile": asked}
        plan = PlannedStudy(robustness.DEFINITION, Request(tmp_path, "nano", 1, overrides=overrides))
        assert plan.base.compile is compiled


@pytest.mark.slow
def test_the_command_answers_with_its_first_table(asked_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study("robustness", asked_study) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert re.match(r"\| method +\| default +\|", head)
    assert [row.split()[1] for row in rows if row] == ["sdd", "olmo2"]


@pytest.mark.slow
def test_options_that_change_the_runs_of_a_folder_are_refused(asked_study: Path) -> None:
    for other in (Options(preset="micro"), Options(overrides={"steps": "300"}), Options(tuned=True)):
        with pytest.raises(UserError, match="choose another --out"):
            run_study("robustness", asked_study, other)
    with pytest.raises(UserError, match="holds the study robustness"):
        run_study("lr", asked_study)
    assert json.loads((asked_study / "study.json").read_text())["overrides"]["steps"] == "200"


def test_result_files_are_small_and_say_what_they_are(tmp_path: Path) -> None:
    plan = PlannedStudy(robustness.DEFINITION, Request(tmp_path, "nano", 1))
    name, config = plan.run(plan.arms[0], plan.conditions[0], 1e-3, 0)
    for loss in (5.0, math.nan):
        made = made_result(name, config, loss)
        file = results.save(made, tmp_path)
        assert file.stat().st_size < 8000
        assert results.answers(results.load(file), config)
        assert repr(results.load(file)) == repr(made)  # nan is not equal to itself
