"""The runner, with real runs in real processes, but tiny ones."""

import io
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers_grid import tiny_run
from rich.console import Console

from helpers_runs import write_run
from sdd.errors import Interrupted, UserError
from sdd.lab.grid import runner
from sdd.lab.grid.display import Display, jobs_table
from sdd.lab.grid.job import Job, time_left
from sdd.lab.grid.runner import Grid, same_settings
from sdd.train import RunConfig, config_io
from sdd.train.run_dir import RunDir
from sdd.train.trainer import start


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_run(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.02)


class KeepingDisplay(Display):
    """A display that keeps what it says, and sends this process a signal once a run is under way."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.text = io.StringIO()
        super().__init__(Console(file=self.text, width=200))
        self._interrupt_at = interrupt_at

    def update(self, jobs: Sequence[Job], seconds_left: float | None) -> None:
        super().update(jobs, seconds_left)
        if self._interrupt_at is not None and any(job.step >= self._interrupt_at for job in jobs):
            self._interrupt_at = None
            signal.raise_signal(signal.SIGINT)


def observed(config: RunConfig) -> RunConfig:
    """The run as studies make it: what is not finite ends it."""
    return replace(config, guard=replace(config.guard, nonfinite="stop"))


class Finished:
    """In place of a process: one that has trained by the time it is looked at."""

    started: ClassVar[list[str]] = []

    def __init__(self, command: Sequence[str], env: dict[str, str], **_: object) -> None:
        config, run = Path(command[-3]), Path(command[-1])
        self.started.append(f"{run.name} on GPU {env.get('CUDA_VISIBLE_DEVICES')}")
        time.sleep(0.01)
        write_run(run, config_io.load(config))

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that were started, none of which trains."""
    monkeypatch.setattr(Finished, "started", [])
    monkeypatch.setattr(runner.subprocess, "Popen", Finished)
    return Finished.started


def losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


Runs = list[tuple[str, RunConfig]]


@pytest.fixture(scope="module")
def ended(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, Grid, str]:
    """A grid of three runs that ended, one of each kind, and what was shown meanwhile."""
    out = tmp_path_factory.mktemp("grid")
    runs = [
        ("bursts", observed(replace(tiny, optim=replace(tiny.optim, lr=1e30, warmup=0)))),
        ("good", replace(tiny, steps=20)),
        ("crashes", replace(tiny, data=replace(tiny.data, document_mask=True, path=str(out / "no-text.txt")))),
    ]
    shown = KeepingDisplay()
    grid = Grid(runs, out, workers=2)
    grid.run(shown)
    return runs, grid, shown.text.getvalue()


def test_a_run_that_diverged_or_crashed_does_not_stop_a_grid(ended: tuple[Runs, Grid, str]) -> None:
    _, grid, _ = ended
    assert [job.state for job in grid.jobs] == ["failed", "done", "crashed"]
    assert grid.jobs[0].detail == json.loads((grid.path("bursts") / "result.json").read_text())["reason"]
    assert "no data at" in grid.jobs[2].detail


def test_a_job_follows_its_run(ended: tuple[Runs, Grid, str]) -> None:
    _, grid, _ = ended
    good = grid.jobs[1]
    assert good.step == 20
    assert good.eval_loss == json.loads((grid.path("good") / "result.json").read_text())["eval_loss"]
    assert json.loads((grid.path("good") / "environment.json").read_text())["threads"] == 1


def test_how_each_run_ends_is_shown(ended: tuple[Runs, Grid, str]) -> None:
    for part in ("good: running", "good: done, held-out loss", "bursts: failed, step", "crashes: crashed"):
        assert part in ended[2]


def test_results_are_not_repeated(ended: tuple[Runs, Grid, str]) -> None:
    runs, grid, _ = ended
    before = (grid.path("good") / "metrics.jsonl").stat()
    again = Grid(runs, grid.out, workers=2)
    assert [job.state for job in again.jobs] == ["failed", "done", "waiting"]
    assert [job.name for job in again.waiting] == ["crashes"]
    assert again.jobs[1].eval_loss == grid.jobs[1].eval_loss
    Grid(runs[:2], grid.out).run()  # nothing to do
    assert (grid.path("good") / "metrics.jsonl").stat() == before


def test_a_run_with_other_settings_is_refused(ended: tuple[Runs, Grid, str], tiny: RunConfig) -> None:
    with pytest.raises(UserError, match="good holds a run with other settings"):
        Grid([("good", replace(tiny, steps=30))], ended[1].out)


def test_machines_that_share_a_folder_split_a_grid(
    tiny: RunConfig, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(runner, "visible_gpus", list)
    runs = [(str(seed), replace(tiny, seed=seed, steps=20)) for seed in range(12)]
    grids = [Grid(runs, tmp_path, workers=1) for _ in range(3)]
    threads = [threading.Thread(target=grid.run, args=[KeepingDisplay()]) for grid in grids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(started) == sorted(f"{name} on GPU None" for name, _ in runs)
    for grid in grids:
        assert {job.state for job in grid.jobs} == {"done"}
        assert all(job.eval_loss is not None for job in grid.jobs)


def test_a_run_that_another_process_writes_is_left_to_it(
    tiny: RunConfig, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the child of a study that was killed does: its claim is free, its run goes on."""
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)
    run = write_run(tmp_path / "runs/a", replace(tiny, steps=20), until=7)
    orphan = RunDir(run)
    orphan.lock()
    seen: list[str] = []

    class Watcher(KeepingDisplay):
        def update(self, jobs: Sequence[Job], seconds_left: float | None) -> None:
            seen.append(jobs[0].state)
            if len(seen) == 3:
                for file in run.iterdir():
                    file.unlink()
                run.rmdir()
                write_run(run, replace(tiny, steps=20))

    grid = Grid([("a", replace(tiny, steps=20))], tmp_path)
    assert grid.jobs[0].step == 7
    grid.run(Watcher())
    orphan.unlock()
    assert seen[:3] == ["elsewhere"] * 3
    assert grid.jobs[0].state == "done"
    assert started == []


def test_a_run_that_another_machine_took_over_is_stopped_here(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a night in which this machine slept."""
    config = replace(tiny, steps=20)

    class Training(Finished):
        def __init__(self, *_: object, **__: object) -> None:
            self.code: int | None = None

        def poll(self) -> int | None:  # type: ignore[override]
            return self.code

        def terminate(self) -> None:
            self.code = 130
            write_run(tmp_path / "runs/a", config)  # by the other machine

    class Lost:
        takes = iter([True])

        def take(self, _: str) -> bool:
            return next(self.takes, False)

        def release(self, _: str) -> None:
            pass

        def renew(self) -> list[str]:
            return ["a"]

    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(runner.subprocess, "Popen", Training)
    monkeypatch.setattr(runner, "Claims", lambda _: Lost())
    grid = Grid([("a", config)], tmp_path)
    grid.run(KeepingDisplay())
    assert grid.jobs[0].state == "done"


def test_only_divergence_is_a_result(tiny: RunConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/diverged", tiny, breaks_at=30)
    full, hidden = (write_run(tmp_path / f"runs/{name}", tiny, until=30) for name in ("full", "hidden"))
    for run, cause in ((full, "stopped"), (hidden, "diverged")):  # hidden: a finite loss, and a weight of 1e9
        RunDir(run).write_json("result.json", {"status": "failed", "step": 30, "cause": cause, "reason": "as it is"})
    grid = Grid([(name, tiny) for name in ("diverged", "full", "hidden")], tmp_path)
    assert [job.state for job in grid.jobs] == ["failed", "waiting", "failed"]


def test_each_run_at_once_gets_a_gpu_of_its_own(
    tiny: RunConfig, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "visible_gpus", lambda: ["3", "5"])
    runs = [(str(seed), replace(tiny, seed=seed, steps=20, device="auto")) for seed in range(4)]
    grid = Grid(runs, tmp_path)
    assert grid.workers == 2
    grid.run(KeepingDisplay())
    assert {line.rpartition(" ")[2] for line in started} == {"3", "5"}
    assert Grid([("cpu", tiny)], tmp_path).gpus == []


def test_interrupted_grid_saves_and_goes_on_as_if_nothing_had_been(tiny: RunConfig, tmp_path: Path) -> None:
    runs = [("first", tiny), ("second", replace(tiny, steps=5))]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="0 of 2 runs are finished"):
        Grid(runs, tmp_path / "cut", workers=1).run(KeepingDisplay(interrupt_at=3))
    assert signal.getsignal(signal.SIGINT) is before
    result = json.loads((tmp_path / "cut/runs/first/result.json").read_text())
    assert result["status"] == "interrupted"
    assert 3 <= result["step"] < 100
    assert not (tmp_path / "cut/runs/second").exists()

    grid = Grid(runs[:1], tmp_path / "cut", workers=1)
    grid.run(KeepingDisplay())
    assert grid.jobs[0].state == "done"
    threads = torch.get_num_threads()
    try:
        start(tiny, tmp_path / "whole").run()
    finally:
        torch.set_num_threads(threads)
    whole = losses(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 101))
    assert losses(tmp_path / "cut/runs/first") == whole


def test_threads_and_a_grown_vocabulary_do_not_make_another_run(tiny: RunConfig) -> None:
    grown = replace(tiny, threads=3, model=replace(tiny.model, vocab_size=5000))
    assert same_settings(grown, tiny)
    assert not same_settings(tiny, grown)
    assert not same_settings(replace(grown, seed=1), tiny)


def test_relative_paths_stay_the_same_run(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(str(tiny.data.path))
    monkeypatch.chdir(text.parent)
    assert same_settings(tiny, replace(tiny, data=replace(tiny.data, path=text.name)))


def test_workers_and_threads_share_the_cores(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(str(seed), replace(tiny, seed=seed, threads=0)) for seed in range(6)]
    for cores, asked, expected in ((1, None, (1, 1)), (2, None, (2, 1)), (16, None, (4, 4)), (4, 9, (6, 1))):
        monkeypatch.setattr(runner, "available_cpus", lambda cores=cores: cores)
        grid = Grid(runs, tmp_path, workers=asked)
        assert (grid.workers, grid.threads) == expected
        assert {job.config.threads for job in grid.jobs} == {grid.threads}
    assert (Grid(runs[:1], tmp_path, workers=4).workers, Grid(runs[:1], tmp_path, workers=4).threads) == (1, 1)
    grid = Grid([("own", replace(tiny, threads=7))], tmp_path)
    assert grid.threads == grid.jobs[0].config.threads == 7  # what is announced and timed is what runs


def jobs(tiny: RunConfig, *states: tuple[str, int, float]) -> Iterator[Job]:
    for number, (state, step, seconds) in enumerate(states):
        yield Job(str(number), replace(tiny, steps=600), state=state, step=step, seconds=seconds)  # type: ignore[arg-type]


def test_time_left_follows_the_rate_and_the_workers(tiny: RunConfig) -> None:
    assert time_left(list(jobs(tiny, ("running", 0, 1.0), ("waiting", 0, 0.0))), 1) is None
    ten_a_second = [*jobs(tiny, ("running", 300, 30.0), ("waiting", 0, 0.0), ("waiting", 0, 0.0))]
    assert time_left(ten_a_second, 1) == pytest.approx(30 + 60 + 60)
    assert time_left(ten_a_second, 2) == pytest.approx(30 + 60)
    assert time_left(list(jobs(tiny, ("done", 600, 60.0), ("failed", 9, 1.0))), 2) == 0


def test_time_left_is_not_misled_by_a_run_that_has_just_started(tiny: RunConfig) -> None:
    started = list(jobs(tiny, ("done", 600, 60.0), ("running", 1, 8.0)))
    assert time_left(started, 1) == pytest.approx(60, rel=0.01)
    assert time_left(started[1:], 1) is None


def test_live_table_has_a_row_a_run(tiny: RunConfig) -> None:
    shown = Console(file=io.StringIO(), width=120)
    rows = list(jobs(tiny, ("done", 600, 61.0), ("failed", 9, 1.0), ("waiting", 0, 0.0)))
    rows[0].loss, rows[1].loss, rows[1].detail = 5.1234, "nan", "step 9: loss nan"
    shown.print(jobs_table(rows, 75))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    for part in ("600/600", "5.123", "1:01", "failed", "nan", "step 9: loss nan", "2 of 3 runs, about 1:15 left"):
        assert part in text
