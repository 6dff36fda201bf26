import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers_runs import edit_json
from sdd.errors import UserError
from sdd.report.runs import load_run, load_runs

MakeRun = Callable[..., Path]


def test_finished_run_is_read_back(make_run: MakeRun) -> None:
    run = load_run(make_run("a", placement="olmo2"))
    assert (run.name, run.placement, run.status, run.reason, run.step) == ("a", "olmo2", "done", "", 60)
    assert run.tokens == 60 * 4 * 128
    assert run.bits_per_byte == pytest.approx(0.3657 * run.eval_loss)
    assert list(run.evals["tokens"]) == [step * 512 for step in range(10, 61, 10)]
    assert run.config["optim.lr"] == 4e-3


def test_killed_run_is_unfinished(make_run: MakeRun) -> None:
    run = load_run(make_run("a", until=23))
    assert run.status == "unfinished"
    assert "step 23 of 60" in run.reason
    assert len(run.steps["loss"]) == 23


def test_line_cut_short_by_a_kill_is_passed_over(make_run: MakeRun) -> None:
    path = make_run("a", until=23)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "loss": 5.')
    assert load_run(path).step == 23


def test_run_that_went_on_after_its_result_is_unfinished(make_run: MakeRun) -> None:
    path = make_run("a")
    edit_json(path / "result.json", status="interrupted", step=40)
    assert load_run(path).status == "unfinished"


def test_non_finite_run_did_not_converge(make_run: MakeRun) -> None:
    run = load_run(make_run("a", breaks_at=33))
    assert run.status == "did not converge"
    assert "not finite" in run.reason
    assert math.isnan(run.steps["loss"][-1])


def test_run_that_failed_for_another_reason_is_not_called_diverged(make_run: MakeRun) -> None:
    path = make_run("a")
    edit_json(path / "result.json", status="failed", cause="stopped", reason="out of memory")
    run = load_run(path)
    assert (run.status, run.reason) == ("failed", "out of memory")


@pytest.mark.parametrize("end", [8.2, 30.0])
def test_run_that_ends_where_it_began_or_worse_did_not_converge(make_run: MakeRun, end: float) -> None:
    run = load_run(make_run("a", end=end))
    assert run.status == "did not converge"
    assert "held-out loss" in run.reason


def test_run_with_nothing_but_its_config_is_read(make_run: MakeRun) -> None:
    path = make_run("a", until=1)
    for name in ("metrics.jsonl", "environment.json"):
        (path / name).unlink()
    run = load_run(path)
    assert (run.status, run.step, len(run.evals["step"])) == ("unfinished", 0, 0)
    assert math.isnan(run.eval_loss)


def test_damaged_small_files_count_as_missing(make_run: MakeRun) -> None:
    path = make_run("a")
    (path / "result.json").write_text('{"status": "do')
    (path / "environment.json").write_text("[]")
    (path / "samples.jsonl").write_text("null\n")
    run = load_run(path)
    assert (run.result, run.environment, run.samples) == ({}, {}, [])


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        load_run(tmp_path / "missing")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_run(tmp_path)


def test_names_are_the_shortest_that_tell_runs_apart(make_run: MakeRun) -> None:
    paths = [make_run("x/a"), make_run("y/a"), make_run("y/b")]
    assert [run.name for run in load_runs(paths)] == ["x/a", "y/a", "b"]
    with pytest.raises(UserError, match="named twice"):
        load_runs([paths[0], paths[0]])


def test_columns_hold_non_finite_numbers_as_such(make_run: MakeRun) -> None:
    path = make_run("a", until=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": "inf", "grad_norm": null, "tokens": [], "lr": 1}\n')
    steps = load_run(path).steps
    assert np.isposinf(steps["loss"][2])
    assert np.isnan(steps["grad_norm"][2])
    assert np.isnan(steps["tokens"][2])
