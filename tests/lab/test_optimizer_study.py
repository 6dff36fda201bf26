import io
import math
from pathlib import Path

import pytest
from helpers_studies import FakeLab, wobble
from rich.console import Console

from sdd.commands.study import Options, run_study
from sdd.errors import UserError
from sdd.lab.definition import Outcome, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.studies import optimizers
from sdd.train import RunConfig

#: By optimiser and placement: the best rate, the best init and the loss there.
PAIRS = {
    ("adamw", "sdd"): (8e-3, 0.25, 4.8),
    ("adamw", "peri"): (4e-3, 0.5, 4.9),
    ("adamw", "prenorm-qk"): (8e-3, 1.0, 5.0),
    ("muon", "sdd"): (16e-3, 1.0, 4.75),
    ("muon", "peri"): (8e-3, 0.25, 4.7),
    ("muon", "prenorm-qk"): (4e-3, 0.5, 4.78),
    ("stable-adamw", "sdd"): (8e-3, 0.5, 4.81),
    ("stable-adamw", "peri"): (8e-3, 0.5, 4.92),
    ("stable-adamw", "prenorm-qk"): (8e-3, 0.5, 5.0),
}


def tuned(config: RunConfig) -> float:
    rate, init, loss = PAIRS[config.optim.name, config.model.placement.name]
    off = math.log2(config.optim.lr / rate) ** 2 + math.log2(config.model.init_scale / init) ** 2
    return loss + 0.02 * off + wobble(config)


def outcome(out: Path, **asked: object) -> Outcome:
    asked = {"preset": "nano", "seeds": 2, **asked}
    return Engine(PlannedStudy(optimizers.DEFINITION, Request(out, **asked)), Console(file=io.StringIO())).outcome()  # type: ignore[arg-type]


def test_every_pair_gets_its_best_rate_and_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeLab(tuned).install(monkeypatch)
    found = outcome(tmp_path)
    for (name, placement), (rate, init, _) in PAIRS.items():
        if name != "stable-adamw":
            cell = found.cells[f"{placement}-{name}", "1M"]
            assert (cell.rate, cell.init) == (rate, init)
            assert {run.run_config.optim.name for run in cell.results} == {name}
    assert {config.optim.name for config in lab.finished.values()} == {"adamw", "muon"}


def test_gaps_and_their_changes_are_those_of_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(tuned).install(monkeypatch)
    gaps = {(gap.optimizer, gap.other): gap for gap in optimizers.gaps(outcome(tmp_path))}
    assert {names: round(gap.estimate.value, 6) for names, gap in gaps.items()} == {
        ("adamw", "peri"): -0.1,
        ("adamw", "prenorm-qk"): -0.2,
        ("muon", "peri"): 0.05,
        ("muon", "prenorm-qk"): -0.03,
    }
    assert all(gap.estimate.n == 2 for gap in gaps.values())


def test_a_run_that_did_not_converge_is_in_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(config: RunConfig) -> float:
        broken = (config.optim.name, config.model.placement.name, config.seed) == ("muon", "peri", 0)
        return math.nan if broken else tuned(config)

    FakeLab(breaking).install(monkeypatch)
    gaps = {(gap.optimizer, gap.other): gap for gap in optimizers.gaps(outcome(tmp_path))}
    assert gaps["muon", "peri"].estimate.n == 1
    assert gaps["muon", "prenorm-qk"].estimate.n == 2


def test_the_page_says_how_the_gaps_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(tuned).install(monkeypatch)
    assert run_study("optimizers", tmp_path, Options(seeds=2)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "under Muon it ends 0.050 ± 0.000 nats above peri and 0.030 ± 0.000 nats below prenorm-qk" in text
    assert "From AdamW to Muon the gap of sdd to peri moves by +0.150 ± 0.000 nats." in text
    assert "| sdd against prenorm-qk | -0.200 ± 0.000 | -0.030 ± 0.000 | +0.170 ± 0.000 |" in text
    assert "Muon moves the loss from AdamW's by -0.050 ± 0.000 for sdd" in text


def test_an_optional_arm_joins_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(tuned).install(monkeypatch)
    names = ("sdd-adamw", "peri-adamw", "sdd-stable-adamw", "peri-stable-adamw")
    found = outcome(tmp_path, placements=names)
    assert [arm.name for arm in found.plan.arms] == list(names)
    gaps = {(gap.optimizer, gap.other): gap.estimate.value for gap in optimizers.gaps(found)}
    assert gaps == {("adamw", "peri"): pytest.approx(-0.1), ("stable-adamw", "peri"): pytest.approx(-0.11)}


def test_fields_that_arms_decide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sets optim\.name itself"):
        PlannedStudy(optimizers.DEFINITION, Request(tmp_path, "nano", 1, overrides={"optim.name": "muon"}))


def test_a_part_of_the_study_is_read_without_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(tuned).install(monkeypatch)
    assert run_study("optimizers", tmp_path, Options(seeds=1, placements=("sdd-muon", "prenorm-qk-muon"))) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "under Muon it ends 0.030 nats below prenorm-qk" in text
