import json
import re
from pathlib import Path

import pytest
from helpers_lab import write_run
from sdd.lab.demo_results import NOISE, Results, as_dict, collect, conclusions

from sdd.commands.study import run_study, studies
from sdd.errors import RunFailed, UserError
from sdd.evals.unigram import Reference
from sdd.lab.grid import runner
from sdd.lab.studies import demo
from sdd.report.runs import load_run
from sdd.train import config_io

REFERENCE = Reference(loss=6.677, bits_per_byte=2.442)
PER_NAT = 0.3657
#: Where the synthetic runs end, in nats a token; None breaks off.
ENDS = {
    ("sdd", "recommended"): 5.5,
    ("sdd", "hard"): 5.55,
    ("prenorm-qk", "recommended"): 5.52,
    ("prenorm-qk", "hard"): 6.0,
    ("postnorm", "recommended"): 5.6,
    ("postnorm", "hard"): 6.75,
    ("deepnorm", "recommended"): 5.7,
    ("deepnorm", "hard"): None,
}
Ends = dict[tuple[str, str], float | None]


def write_demo(out: Path, ends: Ends = ENDS, seeds: int = 1) -> None:
    """The folder of a finished demo, without training."""
    for seed in range(seeds):
        for setting in demo.SETTINGS:
            for placement in demo.PLACEMENTS:
                config = demo.run_config(placement, setting, seed)
                end = ends[placement, setting.name]
                name = demo.run_name(placement, setting, seed)
                how = {"breaks_at": 101} if end is None else {"end": end}
                write_run(out / "runs" / name, config, **how)  # type: ignore[arg-type]
    (out / "reference.json").write_text(json.dumps(vars(REFERENCE)))


def results_of(tmp_path: Path, changes: Ends | None = None, seeds: int = 1) -> Results:
    write_demo(tmp_path, {**ENDS, **(changes or {})}, seeds)
    runs = {
        (placement, setting.name): [
            load_run(tmp_path / "runs" / demo.run_name(placement, setting, seed)) for seed in range(seeds)
        ]
        for placement in demo.PLACEMENTS
        for setting in demo.SETTINGS
    }
    return collect(runs, REFERENCE)


def test_grid_changes_nothing_but_placement_seed_and_setting() -> None:
    configs = dict(demo.grid(seeds=2))
    assert len(configs) == 16
    base = config_io.to_dict(demo.run_config("sdd", demo.SETTINGS[0], 0))
    for config in configs.values():
        values = config_io.to_dict(config)
        values["model"]["placement"] = base["model"]["placement"]
        values["optim"] |= {"lr": base["optim"]["lr"], "warmup": base["optim"]["warmup"]}
        assert {**values, "seed": 0} == base
    recommended, hard = (configs[f"{setting.name}-sdd-seed0"].optim for setting in demo.SETTINGS)
    assert 5 <= hard.lr / recommended.lr <= 10
    assert recommended.warmup > 0
    assert hard.warmup == 0


def test_verdicts_follow_the_stated_criteria(tmp_path: Path) -> None:
    rows = {row.placement: row for row in results_of(tmp_path).rows}
    assert {name: row.verdict for name, row in rows.items()} == {
        "sdd": "held",
        "prenorm-qk": "worse",
        "postnorm": "did not learn",
        "deepnorm": "did not learn",
    }
    assert rows["prenorm-qk"].change == pytest.approx((6.0 - 5.52) * PER_NAT, abs=0.01)
    assert rows["deepnorm"].hard.status == "became non-finite"


@pytest.mark.parametrize(("end", "verdict"), [(5.3, "better"), (5.45, "held"), (5.55, "held"), (5.7, "worse")])
def test_a_run_is_compared_with_its_own_recommended_one(tmp_path: Path, end: float, verdict: str) -> None:
    assert results_of(tmp_path, {("sdd", "hard"): end}).rows[0].verdict == verdict


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "Post-Norm breaks, and the same wiring with SDD does not"),
        ({("sdd", "hard"): None}, "Post-Norm breaks, and with SDD it breaks as well"),
        ({("sdd", "hard"): None, ("postnorm", "hard"): 5.6}, "does not break, and the same wiring with SDD does"),
        ({("postnorm", "hard"): 5.55}, "does not break; with SDD it is neither better nor worse by more than 0.03"),
        ({("postnorm", "hard"): 5.0}, "does not break; with SDD it is 0.20 bits per byte worse"),
        ({("postnorm", "hard"): 6.0}, "does not break; with SDD it is 0.16 bits per byte better"),
        ({("postnorm", "recommended"): 6.7}, "postnorm did not learn; sdd reaches"),
        ({("sdd", "recommended"): 6.7}, "sdd learns where that did not"),
        ({("prenorm-qk", "hard"): 5.4}, "prenorm-qk is 0.04 bits per byte better"),
    ],
)
def test_conclusions_go_either_way(tmp_path: Path, changes: Ends, expected: str) -> None:
    text = " ".join(conclusions(results_of(tmp_path, changes)))
    assert expected in text
    assert "one seed" in text
    assert "nan" not in text


def test_every_run_failing_is_concluded_too(tmp_path: Path) -> None:
    text = " ".join(conclusions(results_of(tmp_path, dict.fromkeys(ENDS))))
    assert "sdd, prenorm-qk, postnorm and deepnorm did not learn; none is left to compare" in text
    assert "nan" not in text


def test_seeds_are_averaged_and_their_spread_is_shown(tmp_path: Path) -> None:
    results = results_of(tmp_path, seeds=2)
    assert results.seeds == 2
    assert results.rows[3].hard.status == "2 of 2 became non-finite"
    assert results.rows[0].hard.spread == 0
    assert "2 seeds" in conclusions(results)[-1]


def test_results_are_plain_json(tmp_path: Path) -> None:
    found = json.loads(json.dumps(as_dict(results_of(tmp_path)), allow_nan=False))
    assert found["noise"] == NOISE
    assert found["placements"][3]["hard"]["bits_per_byte"] is None
    assert len(found["runs"]) == 8
    assert found["runs"][0]["curve"][-1]["bits_per_byte"] == found["runs"][0]["bits_per_byte"]


def test_finished_demo_only_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo(tmp_path)
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    assert run_study("demo", tmp_path) == 0
    printed = capsys.readouterr()
    for row in ("sdd", "prenorm-qk", "postnorm", "deepnorm"):
        assert re.search(rf"^{row} ", printed.out, re.MULTILINE)
    assert "report.html" in printed.err
    page = (tmp_path / "report.html").read_text()
    for sentence in conclusions(results_of_folder(tmp_path)):
        assert sentence in page.replace("&#39;", "'")
    assert page.count('role="img"') == 6
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in ("heldout", "loss", "grad-norm") for kind in ("png", "svg"))
    assert json.loads((tmp_path / "results.json").read_text())["placements"][0]["verdict"] == "held"


def test_several_seeds_are_drawn_and_named_once(tmp_path: Path) -> None:
    for pair in demo.panels(results_of(tmp_path, seeds=2)).values():
        for panel in pair:
            assert len(panel.lines) == 2 * len(demo.PLACEMENTS)
            assert {line.label for line in panel.lines} == set(demo.PLACEMENTS)


def test_crash_is_told_and_gives_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path)
    run = tmp_path / "runs" / demo.run_name("sdd", demo.SETTINGS[0], 0)
    (run / "result.json").unlink()
    (run / "metrics.jsonl").unlink()

    def crash(grid: runner.Grid, *_: object) -> None:
        grid.jobs[0].state, grid.jobs[0].detail = "crashed", "no space left"

    monkeypatch.setattr(runner.Grid, "run", crash)
    with pytest.raises(RunFailed, match="recommended-sdd-seed0: no space left"):
        run_study("demo", tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run_study("demo", tmp_path / "file" / "demo")


def test_demo_is_a_study() -> None:
    assert "demo" in studies
    assert studies["demo"].about.endswith("?")


def results_of_folder(out: Path) -> Results:
    runs = {
        (placement, setting.name): [load_run(out / "runs" / demo.run_name(placement, setting, 0))]
        for placement in demo.PLACEMENTS
        for setting in demo.SETTINGS
    }
    return collect(runs, REFERENCE)
