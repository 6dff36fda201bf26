import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_studies import FREQUENCIES, FakeLab
from rich.console import Console

from sdd.commands.study import Options, run_study
from sdd.errors import UserError
from sdd.lab.definition import PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.findings import Findings
from sdd.lab.studies.demo import DEFINITION, HARD, RECOMMENDED
from sdd.train import RunConfig

#: Where the runs end, in nats a token; nan diverges.
ENDS = {
    ("sdd", "recommended"): 5.5,
    ("sdd", "hard"): 5.3,
    ("prenorm-qk", "recommended"): 5.52,
    ("prenorm-qk", "hard"): 6.0,
    ("postnorm", "recommended"): 5.6,
    ("postnorm", "hard"): math.nan,
    ("deepnorm", "recommended"): 5.7,
    ("deepnorm", "hard"): math.nan,
}
Ends = dict[tuple[str, str], float]


def setting_of(config: RunConfig) -> str:
    return "recommended" if config.optim.warmup else "hard"


def findings(monkeypatch: pytest.MonkeyPatch, out: Path, changes: Ends | None = None, seeds: int = 1) -> Findings:
    ends = ENDS | (changes or {})
    lab = FakeLab(lambda config: ends[config.model.placement.name, setting_of(config)])
    lab.install(monkeypatch)
    plan = PlannedStudy(DEFINITION, Request(out, "nano", seeds))
    return DEFINITION.read(Engine(plan, Console(file=io.StringIO())).outcome())


def sentences(found: Findings) -> str:
    return " ".join([found.answer, *found.conclusions, *found.limits])


def test_runs_differ_in_placement_seed_and_setting_only(tmp_path: Path) -> None:
    plan = PlannedStudy(DEFINITION, Request(tmp_path, "nano", 2))
    runs = [
        plan.run(arm, condition, plan.base.optim.lr, seed)[1]
        for arm in plan.arms
        for condition in plan.conditions
        for seed in plan.seeds
    ]
    base = plan.base
    for config in runs:
        model = replace(config.model, placement=base.model.placement)
        optim = replace(config.optim, lr=base.optim.lr, warmup=base.optim.warmup)
        assert replace(config, model=model, optim=optim, seed=base.seed) == base


def test_the_hard_setting_has_a_higher_rate_and_no_warm_up(tmp_path: Path) -> None:
    plan = PlannedStudy(DEFINITION, Request(tmp_path, "nano", 1))
    recommended, hard = (plan.run(plan.arms[0], each, plan.base.optim.lr, 0)[1].optim for each in (RECOMMENDED, HARD))
    assert 5 <= hard.lr / recommended.lr <= 10
    assert recommended.warmup > 0
    assert hard.warmup == 0


def test_the_table_has_the_loss_the_change_and_bits_per_byte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {row["method"]: row for row in findings(monkeypatch, tmp_path).tables[0].json()["rows"]}
    assert rows["sdd"]["recommended"]["value"] == 5.5
    assert rows["sdd"]["hard"]["value"] == 5.3
    assert rows["sdd"]["change"]["value"] == pytest.approx(-0.2)
    assert rows["sdd"]["hard, bits per byte"]["value"] == pytest.approx(5.3 * 0.3657)
    assert rows["postnorm"]["hard"]["not_converged"] == 1
    assert rows["postnorm"]["change"]["value"] is None


def test_the_note_has_the_settings_and_token_frequencies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note = findings(monkeypatch, tmp_path).tables[0].note
    for number in ("0.001", "40", "0.01", f"{FREQUENCIES:.3f}", f"{FREQUENCIES * 0.3657:.3f}"):
        assert number in note


@pytest.mark.parametrize(
    ("changes", "trained", "broken"),
    [
        ({}, {"sdd", "prenorm-qk"}, {"postnorm", "deepnorm"}),
        ({("sdd", "hard"): math.nan, ("postnorm", "hard"): 5.6}, {"prenorm-qk", "postnorm"}, {"sdd", "deepnorm"}),
        ({("postnorm", "hard"): 5.6, ("deepnorm", "hard"): 5.6}, set(), set()),
        (dict.fromkeys(ENDS, math.nan), set(), set()),
    ],
)
def test_the_answer_goes_either_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: Ends, trained: set[str], broken: set[str]
) -> None:
    answer = findings(monkeypatch, tmp_path, changes).answer
    before, _, after = answer.partition(" train")
    assert {name for name in trained if name in before} == trained
    assert {name for name in broken if name in after} == broken


def test_every_run_failing_is_concluded_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, tmp_path, dict.fromkeys(ENDS, math.nan))
    text = sentences(found) + found.tables[0].note + found.tables[0].markdown()
    assert not re.search(r"\bnan\b", text.replace("loss nan", ""))  # the reason of a run says what its loss was


def test_each_failure_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = sentences(findings(monkeypatch, tmp_path, seeds=2))
    for name in ("postnorm", "deepnorm"):
        assert len(re.findall(rf"{name} does not converge under the hard setting: step 9", text)) == 1


def test_every_method_is_drawn_under_both_settings_and_named_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = findings(monkeypatch, tmp_path, {("postnorm", "hard"): 6.6, ("deepnorm", "hard"): 6.65}, seeds=2)
    assert [picture.name for picture in found.pictures] == ["heldout", "training", "grad-norm"]
    names = [arm.name for arm in DEFINITION.arms]
    for picture, reference in zip(found.pictures, (["token frequencies"], [], []), strict=True):
        figure = picture.draw()
        assert [axes.get_title("left") for axes in figure.axes] == ["recommended", "hard"]
        for axes in figure.axes:
            assert len(axes.get_lines()) == len(names) + len(reference)
        (legend,) = figure.legends
        assert [text.get_text().strip() for text in legend.get_texts()] == names + reference


@pytest.mark.slow
def test_a_finished_demo_only_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings(monkeypatch, tmp_path)
    again = FakeLab(lambda _: pytest.fail("a run was started")).install(monkeypatch)
    assert run_study("demo", tmp_path) == 0
    assert again.started == []
    printed = capsys.readouterr()
    for row in ("sdd", "prenorm-qk", "postnorm", "deepnorm"):
        assert re.search(rf"^\| {row} ", printed.out, re.MULTILINE)
    page = (tmp_path / "report.html").read_text()
    assert page.count('role="img"') == 3
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in ("heldout", "training", "grad-norm") for kind in ("png", "svg"))


def test_a_demo_of_an_earlier_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "runs" / "recommended-sdd-seed0").mkdir(parents=True)
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(UserError, match="a demo of an earlier version: delete it, or choose another --out"):
        run_study("demo", tmp_path, Options(seeds=1))


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run_study("demo", tmp_path / "file" / "demo")
