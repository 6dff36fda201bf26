import contextlib
import io
import json
import math
from pathlib import Path

import pytest
from helpers_studies import FakeLab, wobble
from rich.console import Console

from sdd.commands.study import Options, run_study
from sdd.draw.style import PLACEMENT_STYLES
from sdd.errors import Interrupted, UserError
from sdd.lab.definition import Outcome, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.figures import styles_of
from sdd.lab.studies import convergence, length
from sdd.train import RunConfig

LENGTHS = (100_000, 400_000, 1_600_000)
#: By placement: the best rate at 0.1M tokens, the best init, and how far the loss lies below that of prenorm-qk there.
METHODS = {"sdd": (16e-3, 0.25, 0.2), "prenorm-qk": (8e-3, 1.0, 0.0), "peri": (4e-3, 0.5, 0.1)}


def falling(config: RunConfig) -> float:
    """Losses whose leads shrink to half with four times the tokens, and whose best rates halve."""
    rate, init, lead = METHODS[config.model.placement.name]
    fourfolds = math.log(config.steps * config.tokens_per_step / LENGTHS[0], 4)
    off = math.log2(config.optim.lr / rate) + fourfolds
    spread = 0.05 * off**2 + 0.05 * math.log2(config.model.init_scale / init) ** 2
    return 6.0 - 0.3 * fourfolds - lead * 2.0**-fourfolds + spread + wobble(config)


def outcome(out: Path, **asked: object) -> Outcome:
    asked = {"preset": "nano", "seeds": 2, "placements": tuple(METHODS), "lengths": LENGTHS, **asked}
    return Engine(PlannedStudy(length.DEFINITION, Request(out, **asked)), Console(file=io.StringIO())).outcome()  # type: ignore[arg-type]


def test_every_method_gets_its_best_rate_and_init_at_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(falling).install(monkeypatch)
    found = outcome(tmp_path)
    for place, condition in enumerate(found.plan.conditions):
        for arm, (rate, init, _) in METHODS.items():
            cell = found.cells[arm, condition.name]
            assert (cell.rate, cell.init) == (rate / 2**place, init)


def test_a_length_decides_steps_and_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeLab(falling).install(monkeypatch)
    outcome(tmp_path)
    configs = list(lab.finished.values())
    assert {config.steps for config in configs} == {round(tokens / 512) for tokens in LENGTHS}
    assert all(config.optim.warmup == round(0.05 * config.steps) for config in configs)
    assert all(10 <= config.steps // config.eval_every <= 60 for config in configs)


def test_seeds_that_settings_were_searched_on_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(falling).install(monkeypatch)
    found = outcome(tmp_path)
    searched = {run.seed for _, tried in found.searches.values() for cell in tried.values() for run in cell.results}
    reported = {run.seed for cell in found.cells.values() for run in cell.results}
    assert (searched, reported) == ({1000}, {0, 1})


@pytest.mark.parametrize("after", [0, 5, 23, 40])
def test_an_interrupted_search_comes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    FakeLab(falling).install(monkeypatch)
    whole = outcome(tmp_path / "whole")
    lab = FakeLab(falling, interrupt_after=after).install(monkeypatch)
    with pytest.raises(Interrupted):
        outcome(tmp_path / "cut")
    lab.interrupt_after = None
    assert outcome(tmp_path / "cut").cells == whole.cells
    assert len(lab.started) == len(set(lab.started))


def test_a_study_is_extended_in_tokens_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(falling).install(monkeypatch)
    outcome(tmp_path, lengths=LENGTHS[:2])
    lab = FakeLab(falling).install(monkeypatch)
    found = outcome(tmp_path)
    assert {config.steps for config in lab.finished.values()} == {round(LENGTHS[2] / 512)}
    assert found.cells == outcome(tmp_path / "at once").cells


def test_leads_factors_and_trend_are_those_of_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(falling).install(monkeypatch)
    lead = next(one for one in length.leads(outcome(tmp_path)) if one.name == "sdd against prenorm-qk")
    assert [lead.difference(at).value for at in LENGTHS] == pytest.approx([-0.2, -0.1, -0.05], abs=1e-3)
    # least squares of -0.2, -0.1, -0.05 against log10 of 1, 4, 16
    assert lead.trend.value == pytest.approx(0.15 / 2 / math.log10(4), rel=1e-2)
    # sdd: 5.8, 5.6, 5.35. It is at 5.4, prenorm-qk's loss at 1.6M, a fifth of the way from its 1.6M back to its 0.4M.
    assert lead.by_length(LENGTHS[2]).value == pytest.approx(4**0.2, rel=1e-2)
    assert math.isnan(lead.by_length(LENGTHS[0]).value)


def test_a_factor_turned_around_is_its_reciprocal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(falling).install(monkeypatch)
    lead = next(one for one in length.leads(outcome(tmp_path)) if one.name == "sdd against prenorm-qk")
    turned = length.Lead("", "", {at: (theirs, ours) for at, (ours, theirs) in lead.cells.items()})
    assert turned.by_length(LENGTHS[1]).value == pytest.approx(1 / lead.by_length(LENGTHS[1]).value)


def test_the_page_names_every_length_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(falling).install(monkeypatch)
    assert run_study("length", tmp_path, Options(placements=tuple(METHODS), lengths=LENGTHS[:2], seeds=2)) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "At 0.4M tokens, each tuned for that length, sdd ends 0.100 ± 0.000 nats below prenorm-qk" in text
    assert "--lengths 0.1M,0.4M" in text
    assert json.loads((tmp_path / "study.json").read_text())["lengths"] == list(LENGTHS[:2])
    assert run_study("length", tmp_path, Options()) == 0  # the folder remembers its lengths


def test_what_a_study_by_length_sets_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the study length sets steps itself: give --lengths"):
        PlannedStudy(length.DEFINITION, Request(tmp_path, "nano", 1, overrides={"steps": 100}))
    with pytest.raises(UserError, match=r"sets model\.init_scale itself"):
        PlannedStudy(length.DEFINITION, Request(tmp_path, "nano", 1, overrides={"model.init_scale": 0.5}))
    with pytest.raises(UserError, match="has no --lengths: give --steps"):
        PlannedStudy(convergence.DEFINITION, Request(tmp_path, "nano", 1, lengths=(100_000,)))


def said_of(out: Path) -> str:
    said = io.StringIO()
    asked = Request(out, "nano", 2, placements=tuple(METHODS), lengths=LENGTHS)
    with contextlib.suppress(Interrupted):
        Engine(PlannedStudy(length.DEFINITION, asked), Console(file=said, width=300)).outcome()
    return said.getvalue()


def test_what_is_still_to_do_follows_the_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeLab(falling).install(monkeypatch)
    said_of(tmp_path)
    assert "All of these runs have a result already." in said_of(tmp_path)
    lost = [name for name in lab.finished if name.startswith("sdd-1.6M-") and name.endswith("-seed1000")]
    for name in lost:  # of a search that begins where the one before ended, far from where the study's grid begins
        (tmp_path / "results" / f"{name}.json").unlink()
        del lab.finished[name]
    lab.interrupt_after = 0
    assert "5 of them still to do" in said_of(tmp_path)


def test_a_variant_is_set_beside_the_method_that_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda config: 5.0 - 0.25 * (config.model.placement.name == "v0.25") + wobble(config)).install(monkeypatch)
    names = ("v0.25", "sdd-v1", "peri")
    assert run_study("length", tmp_path, Options(seeds=2, placements=names, lengths=LENGTHS[:1])) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- v0.25 against sdd-v1: 0.250 ± 0.000 nats below at 0.1M tokens." in text
    assert "peri against sdd-v1" not in text
    assert "v0.25 is a variant of the study variants" in text


@pytest.mark.parametrize("name", ["sdd", "sdd-depth"])
def test_a_later_sdd_is_set_beside_the_first_without_a_baseline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeLab(lambda config: 5.0 - 0.25 * (config.model.placement.name == name)).install(monkeypatch)
    names = ("sdd-v1", name)
    assert run_study("length", tmp_path, Options(seeds=2, placements=names, lengths=LENGTHS[:1])) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{name} ends 0.250 ± 0.000 nats below sdd-v1." in text
    assert "is a variant of the study variants" not in text


def test_a_variant_does_not_look_like_the_placement_that_it_changes() -> None:
    arms = [("mix-depth", "sdd"), ("sdd", "sdd"), ("peri", "peri"), ("all0.25", "sdd"), ("sdd-muon", "sdd-prenorm")]
    styles = styles_of(arms)
    assert styles["sdd"] == PLACEMENT_STYLES["sdd"]
    assert styles["sdd-muon"] == PLACEMENT_STYLES["sdd-prenorm"]
    assert len(set(styles.values())) == len(arms)
    assert styles["mix-depth"].color == styles["sdd"].color


def test_one_length_is_drawn_as_a_point_for_each_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLab(lambda config: 5.0 + wobble(config)).install(monkeypatch)
    names = ("sdd", "prenorm-qk", "peri")
    assert run_study("length", tmp_path, Options(seeds=2, placements=names, lengths=LENGTHS[:1])) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "at 0.1M tokens, mean and range of 2 seeds. Left of zero a method is ahead." in text
    drawn = (tmp_path / "figures" / "lead.svg").read_text(encoding="utf-8")
    assert all(f"{name} against {other}" in drawn for name, other in [("sdd", "peri"), ("peri", "prenorm-qk")])
