"""Runs a list of configs as ordinary runs, each in a process of its own, several at once.

    OUT/runs/NAME/          the run directory, as `sdd train` makes it
    OUT/configs/NAME.json   the config that was asked for, which `sdd train` reads
    OUT/logs/NAME.log       the output of the process
    OUT/claims/NAME/        which machine has the run, see sdd.lab.grid.claims

Finished runs are not repeated, and interrupted ones go on from their last checkpoint. A run that diverged is a result
like any other. A run that ended for another reason (a full disk, lost data) is not: the next command tries it again.
Any number of machines may work on one folder: each takes runs that no other has.

Runs of one shape may also share a process, which trains them as a stack: see `sdd.train.stacked`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from sdd.data.workers import available_cpus
from sdd.errors import Interrupted, UserError
from sdd.files import lock, parse_json_lines, read_json_object
from sdd.lab.grid.claims import Claims
from sdd.lab.grid.display import Display
from sdd.lab.grid.job import FINISHED, Job, diverged, time_left
from sdd.terminal import Interval
from sdd.train import RunConfig, config_io
from sdd.train.stacked import stacks

_POLL_SECONDS = 0.3
_LOOK_SECONDS = 2.0  # between looks at runs that other machines have
_MOST_WORKERS = 4


class Grid:
    """A list of runs under one folder.

    Args:
        runs: (name, config) of each; names are directory names.
        out: the folder.
        workers: runs at once on this machine; by default one for each GPU, or without GPUs one for each core, at most
            four. Each run sees one GPU.
        stack: the most runs of one process, which trains those of one shape together.

    Raises:
        UserError: if a run directory of that name holds a run with other settings.
    """

    def __init__(
        self, runs: Sequence[tuple[str, RunConfig]], out: Path, workers: int | None = None, stack: int = 1
    ) -> None:
        cores = available_cpus()
        self.out, self.stack = out, stack
        self.gpus = visible_gpus() if any(config.device in ("auto", "cuda") for _, config in runs) else []
        wanted = workers or len(self.gpus) or min(cores, _MOST_WORKERS)
        self.workers = max(1, min(wanted, len(runs)))
        # A fixed number of threads a run, so that a result does not depend on how many runs stood beside it.
        asked = max(config.threads for _, config in runs)
        self.threads = asked or max(1, cores // wanted)
        self.jobs = [Job(name, self._fixed(config)) for name, config in runs]
        self._tails = {job.name: _Tail(self.path(job.name) / "metrics.jsonl", job) for job in self.jobs}
        self._active: list[_Process] = []
        self._claims = Claims(out / "claims")
        self._lost: set[str] = set()  # runs that another machine has taken over
        self._looks = Interval(_LOOK_SECONDS)
        self._stops = 0
        for job in self.jobs:
            self._check_settings(job)
            self._find_out(job)

    def _fixed(self, config: RunConfig) -> RunConfig:
        """The config with what a machine would choose; "auto" would compile on one what is eager on the next."""
        return replace(config, threads=config.threads or self.threads, compile=config.compile is True)

    @property
    def waiting(self) -> list[Job]:
        """The runs that are still to be run."""
        return [job for job in self.jobs if job.state not in FINISHED]

    def path(self, name: str) -> Path:
        """The run directory of that name."""
        return self.out / "runs" / name

    def run(self, display: Display | None = None) -> None:
        """Run what is not finished, together with other machines on this folder; then `jobs` say how each run ended.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when every run of this machine has saved.
        """
        for job in self.waiting:
            job.state, job.detail = "waiting", ""
        if not self.waiting:
            return
        with self._signals(), display or Display() as shown:
            try:
                while self._active or (self._open() and not self._stops):
                    if not self._stops:
                        self._fill()
                    self._poll()
                    at_once = max(self.workers, sum(len(process.jobs) for process in self._active))
                    shown.update(self.jobs, time_left(self.jobs, at_once))
                    time.sleep(_POLL_SECONDS)
            finally:  # after an error no child is left behind
                for process in self._active:
                    process.child.terminate()
                    process.child.wait()
                    for job in process.jobs:
                        self._claims.release(job.name)
        if self._stops:
            finished = len(self.jobs) - len(self.waiting)
            raise Interrupted(
                f"interrupted: {finished} of {len(self.jobs)} runs are finished, the others are saved in {self.out}; "
                "the same command goes on"
            )

    def _open(self) -> list[Job]:
        return [job for job in self.jobs if job.state in ("waiting", "elsewhere")]

    def _fill(self) -> None:
        """Start runs that nobody has, until every worker is busy."""
        looks = self._looks.due()
        for job in self._open():
            if job.state == "elsewhere" and not looks:
                continue
            if len(self._active) == self.workers:
                self._tails[job.name].read()
            else:
                self._start(job)

    def _start(self, first: Job) -> None:
        """Start a run, and others that can share its process, unless another machine has them or has finished them."""
        jobs = [job for job in self._stack_of(first) if self._take(job)]
        if jobs:
            taken = {process.slot for process in self._active}
            slot = next(number for number in range(self.workers) if number not in taken)
            gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
            tails = [self._tails[job.name] for job in jobs]
            self._active.append(_Process(jobs, self.out, tails, slot, self.threads, gpu))

    def _stack_of(self, first: Job) -> list[Job]:
        """The job with those waiting ones that can share its process, at most `stack` in all."""
        if self.stack == 1 or first.state != "waiting":
            return [first]
        waiting = [job for job in self.jobs if job.state == "waiting"]
        return next(found for found in stacks(waiting, self._config, self.stack) if first in found)

    def _config(self, job: Job) -> RunConfig:
        """The config of a run: of one that was begun, what it was begun with."""
        file = self.path(job.name) / "config.json"
        return config_io.load(file) if file.exists() else job.config

    def _take(self, job: Job) -> bool:
        """Claim a run, or note that another machine has it or has finished it."""
        run = self.path(job.name)
        mine = self._claims.take(job.name)
        self._find_out(job)  # after the claim: nobody else finishes it any more
        if job.state in FINISHED:
            self._claims.release(job.name)
        elif not mine or _is_written(run):  # a run may outlive its study that was killed
            job.state = "elsewhere"
        else:
            return True
        return False

    def _check_settings(self, job: Job) -> None:
        run = self.path(job.name)
        if (run / "config.json").exists() and not same_settings(config_io.load(run / "config.json"), job.config):
            raise UserError(
                f"{run} holds a run with other settings than those asked for: choose another --out, or delete it"
            )

    def _find_out(self, job: Job) -> None:
        """Bring a job up to date from its run directory."""
        run = self.path(job.name)
        result = read_json_object(run / "result.json")
        self._tails[job.name].read()
        if result.get("status") == "done" or diverged(run):
            job.state, job.detail = result["status"], result.get("reason", "")
            job.seconds = result.get("seconds", 0.0)

    def _poll(self) -> None:
        self._lost |= set(self._claims.renew())
        for process in self._active:
            process.tell(self._stops + any(job.name in self._lost for job in process.jobs))
        ended = [process for process in self._active if process.ended()]
        for job in (job for process in ended for job in process.jobs):
            self._claims.release(job.name)
            if job.state == "interrupted" and not self._stops:  # lost to another machine, or beside one that was
                job.state = "elsewhere" if job.name in self._lost else "waiting"
        self._active = [process for process in self._active if process not in ended]

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
    """The process of one run, or of a stack of them."""

    def __init__(
        self, jobs: "list[Job]", out: Path, tails: "list[_Tail]", slot: int, threads: int, gpu: str | None
    ) -> None:
        self.jobs, self.tails, self.slot, self.runs = jobs, tails, slot, out / "runs"
        self.log = out / "logs" / f"{jobs[0].name}.log"
        for folder in (out / "configs", self.log.parent, self.runs):
            folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            config_io.save(job.config, out / "configs" / f"{job.name}.json")
        with self.log.open("a", encoding="utf-8") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", *map(str, self._command(out))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                    **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
                },
                process_group=0,  # Ctrl-C reaches this process alone, which tells its children once
            )
        self.began = time.monotonic()
        self._told = 0
        for job in jobs:
            job.state, job.detail, job._first_step = "running", "", job.step

    def _command(self, out: Path) -> list[str | Path]:
        name, run = self.jobs[0].name, self.runs / self.jobs[0].name
        if len(self.jobs) > 1:
            return ["sdd.lab.grid.stack", out, *(job.name for job in self.jobs)]
        if (run / "config.json").exists():
            return ["sdd", "resume", run]
        return ["sdd", "train", out / "configs" / f"{name}.json", "--out", run]

    def tell(self, stops: int) -> None:
        """Send signals until the run has had `stops`: at the first it saves and ends, at the second it ends at once.

        They are SIGTERM, which unlike SIGINT also ends a child that has not yet reached its training loop.
        """
        while self._told < stops:
            self._told += 1
            self.child.terminate()

    def ended(self) -> bool:
        """Bring the jobs up to date; returns whether the process has ended."""
        code = self.child.poll()
        for job, tail in zip(self.jobs, self.tails, strict=True):
            tail.read()
            job.seconds = time.monotonic() - self.began
            if code is not None:
                self._conclude(job, code)
        return code is not None

    def _conclude(self, job: Job, code: int) -> None:
        run = self.runs / job.name
        result = read_json_object(run / "result.json")
        if result.get("status") == "done" and (code == 0 or len(self.jobs) > 1):
            job.state = "done"
        elif diverged(run) and (code == 3 or len(self.jobs) > 1):
            job.state, job.detail = "failed", result.get("reason", "")
        elif self._told:
            job.state = "interrupted"
        else:
            job.state = "crashed"
            job.detail = _last_line(self.log) or f"exit code {code}, see {self.log}"


class _Tail:
    """Follows a metrics.jsonl and keeps its job up to date."""

    def __init__(self, file: Path, job: Job) -> None:
        self._file, self._job = file, job
        self._offset = 0

    def read(self) -> None:
        """Read the lines that were added. A file that became shorter was cut back by a resumed run: read it anew."""
        try:
            if self._file.stat().st_size < self._offset:
                self._offset = 0
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                added, _, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(added) + bool(added)
        job = self._job
        for row in parse_json_lines(added.splitlines()):
            job.step = row["step"]
            job.loss = row.get("loss", job.loss)
            job.eval_loss = row.get("eval_loss", job.eval_loss)
            job.bits_per_byte = row.get("eval_bits_per_byte", job.bits_per_byte)


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(number) for number in range(torch.cuda.device_count())]


def same_settings(there: RunConfig, asked: RunConfig) -> bool:
    """Whether a run's config is the one asked for, apart from what `sdd train` changes in it.

    The number of threads and probed steps do not count, the vocabulary may have grown to fit the data, and paths became
    absolute.
    """
    vocabulary = max(there.model.vocab_size, asked.model.vocab_size)
    model = replace(asked.model, vocab_size=vocabulary)
    free = {"threads": there.threads, "probe_every": there.probe_every}
    return there == replace(asked, **free, model=model, data=asked.data.absolute())


def _is_written(run: Path) -> bool:
    """Whether a process is writing into a run directory."""
    try:
        if run.is_dir():
            lock(run / "lock").close()
    except (OSError, UserError):
        return True
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
