"""Runs a list of configs as ordinary runs, each in a process of its own, several at once.

    OUT/runs/NAME/          the run directory, as `sdd train` makes it
    OUT/configs/NAME.json   what was asked for, which `sdd train` reads
    OUT/logs/NAME.log       what the process said

Finished runs are not repeated, interrupted ones go on from their last checkpoint, and a run that fails because its
loss became non-finite is a result like another.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from sdd import config_io
from sdd.errors import Interrupted, UserError
from sdd.lab.live import Display
from sdd.train import RunConfig

State = Literal["waiting", "running", "done", "failed", "crashed", "interrupted"]
#: States in which a run has said all it will say.
FINISHED: tuple[State, ...] = ("done", "failed")
_POLL_SECONDS = 0.3
_MOST_WORKERS = 4


@dataclass
class Job:
    """One run of a grid, and where it stands.

    Attributes:
        name: the run directory's name, unique in the grid.
        config: the run.
        state: "done" and "failed" (non-finite) are results; "crashed" is any other end, to be tried again.
        detail: why it failed or crashed.
        step: steps done.
        loss: the last training loss.
        eval_loss: the last held-out loss.
        bits_per_byte: the last held-out bits per byte.
        seconds: for a running job, since its process started; for others, what that came to.
    """

    name: str
    config: RunConfig
    state: State = "waiting"
    detail: str = ""
    step: int = 0
    loss: float | str | None = None
    eval_loss: float | str | None = None
    bits_per_byte: float | str | None = None
    seconds: float = 0.0
    _first_step: int = field(default=0, repr=False)

    @property
    def steps_per_second(self) -> float | None:
        """Steps of this session over its wall-clock time; None while that is mostly start-up."""
        done = self.step - self._first_step
        return done / self.seconds if 20 * done > self.config.steps and self.seconds > 0 else None


class Grid:
    """A list of runs under one folder.

    Args:
        runs: (name, config) of each; names are directory names.
        out: the folder.
        workers: runs at once; by default one a core, at most four.

    Raises:
        UserError: if a run directory of that name holds a run with other settings.
    """

    def __init__(self, runs: Sequence[tuple[str, RunConfig]], out: Path, workers: int | None = None) -> None:
        cores = available_cores()
        self.out = out
        self.workers = max(1, min(workers or min(cores, _MOST_WORKERS), len(runs)))
        # A fixed number of threads a run, so that a result does not depend on which runs stood beside it.
        self.threads = max(1, cores // self.workers)
        self.jobs = [Job(name, replace(config, threads=config.threads or self.threads)) for name, config in runs]
        self._active: list[_Process] = []
        self._stops = 0
        for job in self.jobs:
            self._find_out(job)

    @property
    def waiting(self) -> list[Job]:
        """The runs that are still to be run."""
        return [job for job in self.jobs if job.state not in FINISHED]

    def path(self, name: str) -> Path:
        """The run directory of that name."""
        return self.out / "runs" / name

    def run(self, display: Display | None = None) -> None:
        """Run what is not finished; afterwards `jobs` say how each ended.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when every run has saved.
        """
        queue = self.waiting
        for job in queue:
            job.state, job.detail = "waiting", ""
        if not queue:
            return
        with self._signals(), display or Display() as shown:
            try:
                while (queue and not self._stops) or self._active:
                    while queue and not self._stops and len(self._active) < self.workers:
                        self._active.append(_Process(queue.pop(0), self.out, self.threads))
                    self._poll()
                    shown.update(self.jobs, time_left(self.jobs, self.workers))
                    time.sleep(_POLL_SECONDS)
            finally:  # on the way out of an error no child is left behind
                for process in self._active:
                    process.child.terminate()
                    process.child.wait()
        if self._stops:
            raise Interrupted(self._farewell())

    def _find_out(self, job: Job) -> None:
        """What the run directory says about a job."""
        run = self.path(job.name)
        if not (run / "config.json").exists():
            return
        there = config_io.load(run / "config.json")
        if not same_settings(there, job.config):
            raise UserError(
                f"{run} holds a run with other settings than are asked for: choose another --out, or delete it"
            )
        _Tail(run / "metrics.jsonl", job).read()
        result = _read_result(run)
        if result.get("status") in FINISHED:
            job.state, job.detail = result["status"], result.get("reason", "")
            job.seconds = result.get("seconds", 0.0)

    def _poll(self) -> None:
        for process in self._active:
            process.tell(self._stops)
        self._active = [process for process in self._active if not process.ended()]

    def _farewell(self) -> str:
        finished = sum(job.state in FINISHED for job in self.jobs)
        return (
            f"interrupted: {finished} of {len(self.jobs)} runs are finished, those under way are saved in {self.out}; "
            "the same command goes on"
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM; the loop passes them on to the children."""

        def handle(_number: int, _frame: FrameType | None) -> None:
            self._stops += 1

        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        try:
            before = {number: signal.signal(number, handle) for number in numbers}
        except ValueError:  # not the main thread: whoever owns it owns the signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Process:
    """The process of one run."""

    def __init__(self, job: Job, out: Path, threads: int) -> None:
        self.job = job
        self.run = out / "runs" / job.name
        self.log = out / "logs" / f"{job.name}.log"
        self.tail = _Tail(self.run / "metrics.jsonl", job)
        config = out / "configs" / f"{job.name}.json"
        for file in (config, self.log, self.run):
            file.parent.mkdir(parents=True, exist_ok=True)
        config_io.save(job.config, config)
        resumed = (self.run / "config.json").exists()
        command = ["resume", self.run] if resumed else ["train", config, "--out", self.run]
        with self.log.open("a", encoding="utf-8") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "sdd", *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                process_group=0,  # Ctrl-C reaches this process alone, which tells its children once
            )
        self.began = time.monotonic()
        self._told = 0
        job.state, job.detail, job._first_step = "running", "", job.step

    def tell(self, stops: int) -> None:
        """Pass on so many signals in all: at the first a run saves and ends, at the second it ends at once.

        As SIGTERM, which unlike SIGINT also ends a child that has not yet come to its training loop.
        """
        while self._told < stops:
            self._told += 1
            self.child.terminate()

    def ended(self) -> bool:
        """Bring the job up to date; whether the process has ended."""
        code = self.child.poll()
        self.tail.read()
        self.job.seconds = time.monotonic() - self.began
        if code is not None:
            self._conclude(code)
        return code is not None

    def _conclude(self, code: int) -> None:
        result = _read_result(self.run)
        if code == 0:
            self.job.state = "done"
        elif code == 3 and result.get("status") == "failed":
            self.job.state, self.job.detail = "failed", result.get("reason", "")
        elif self._told:
            self.job.state = "interrupted"
        else:
            self.job.state = "crashed"
            self.job.detail = _last_line(self.log) or f"exit code {code}, see {self.log}"


class _Tail:
    """Follows a metrics.jsonl and keeps its job up to date."""

    def __init__(self, file: Path, job: Job) -> None:
        self._file, self._job = file, job
        self._offset = 0

    def read(self) -> None:
        """Take in the lines that were added; a file that became shorter was cut back by a resumed run."""
        try:
            if self._file.stat().st_size < self._offset:
                self._offset = 0
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                added, _, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(added) + bool(added)
        for line in added.splitlines():
            self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        job = self._job
        job.step = row["step"]
        job.loss = row.get("loss", job.loss)
        job.eval_loss = row.get("eval_loss", job.eval_loss)
        job.bits_per_byte = row.get("eval_bits_per_byte", job.bits_per_byte)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_settings(there: RunConfig, asked: RunConfig) -> bool:
    """Whether a run's config is what is asked for, given what `sdd train` does to it.

    Threads do not count, the vocabulary may have grown to fit the data, and paths have become absolute.
    """
    vocabulary = max(there.model.vocab_size, asked.model.vocab_size)
    model = replace(asked.model, vocab_size=vocabulary)
    return there == replace(asked, threads=there.threads, model=model, data=asked.data.absolute())


def time_left(jobs: Sequence[Job], workers: int) -> float | None:
    """Seconds until all jobs are done, as the rate of those so far has it; None before there is a rate."""
    rates = [rate for job in jobs if (rate := job.steps_per_second)]
    if not rates:
        return None
    usual = sorted(rates)[len(rates) // 2]
    lanes = [0.0] * workers
    # Those under way first, then each in turn where a worker is free first.
    for job in sorted(jobs, key=lambda job: job.state != "running"):
        if job.state in ("running", "waiting"):
            rate = job.steps_per_second or usual
            lanes[lanes.index(min(lanes))] += (job.config.steps - job.step) / rate
    return max(lanes)


def _read_result(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
