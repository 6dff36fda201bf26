"""Runs a list of configs as ordinary runs, each in a process of its own, several at once.

    OUT/runs/NAME/          the run directory, as `sdd train` makes it
    OUT/configs/NAME.json   the config that was asked for, which `sdd train` reads
    OUT/logs/NAME.log       the output of the process
    OUT/claims/NAME/        which machine has the run, see sdd.lab.grid.claims

Finished runs are not repeated, and interrupted ones go on from their last checkpoint. A run that diverged is a result
like any other. A run that ended for another reason (a full disk, lost data) is not: the next command tries it again.
Any number of machines may work on one folder: each takes runs that no other has.
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

    Raises:
        UserError: if a run directory of that name holds a run with other settings.
    """

    def __init__(self, runs: Sequence[tuple[str, RunConfig]], out: Path, workers: int | None = None) -> None:
        cores = available_cpus()
        self.out = out
        self.gpus = visible_gpus() if any(config.device in ("auto", "cuda") for _, config in runs) else []
        wanted = workers or len(self.gpus) or min(cores, _MOST_WORKERS)
        self.workers = max(1, min(wanted, len(runs)))
        # A fixed number of threads a run, so that a result does not depend on how many runs stood beside it.
        self.threads = max(1, cores // wanted)
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
                    shown.update(self.jobs, time_left(self.jobs, self.workers))
                    time.sleep(_POLL_SECONDS)
            finally:  # after an error no child is left behind
                for process in self._active:
                    process.child.terminate()
                    process.child.wait()
                    self._claims.release(process.job.name)
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

    def _start(self, job: Job) -> None:
        """Start a run unless another machine has it or has finished it."""
        run = self.path(job.name)
        mine = self._claims.take(job.name)
        self._find_out(job)  # after the claim: nobody else finishes it any more
        if job.state in FINISHED:
            self._claims.release(job.name)
        elif not mine or _is_written(run):  # a run may outlive its study that was killed
            job.state = "elsewhere"
        else:
            taken = {process.slot for process in self._active}
            slot = next(number for number in range(self.workers) if number not in taken)
            gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
            self._active.append(_Process(job, self.out, self._tails[job.name], slot, self.threads, gpu))

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
            process.tell(self._stops + (process.job.name in self._lost))
        ended = [process for process in self._active if process.ended()]
        for process in ended:
            self._claims.release(process.job.name)
            if process.job.name in self._lost and process.job.state == "interrupted":
                process.job.state = "elsewhere"
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
    """The process of one run."""

    def __init__(self, job: Job, out: Path, tail: "_Tail", slot: int, threads: int, gpu: str | None) -> None:
        self.job, self.tail, self.slot = job, tail, slot
        self.run = out / "runs" / job.name
        self.log = out / "logs" / f"{job.name}.log"
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
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                    **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
                },
                process_group=0,  # Ctrl-C reaches this process alone, which tells its children once
            )
        self.began = time.monotonic()
        self._told = 0
        job.state, job.detail, job._first_step = "running", "", job.step

    def tell(self, stops: int) -> None:
        """Send signals until the run has had `stops`: at the first it saves and ends, at the second it ends at once.

        They are SIGTERM, which unlike SIGINT also ends a child that has not yet reached its training loop.
        """
        while self._told < stops:
            self._told += 1
            self.child.terminate()

    def ended(self) -> bool:
        """Bring the job up to date; returns whether the process has ended."""
        code = self.child.poll()
        self.tail.read()
        self.job.seconds = time.monotonic() - self.began
        if code is not None:
            self._conclude(code)
        return code is not None

    def _conclude(self, code: int) -> None:
        result = read_json_object(self.run / "result.json")
        if code == 0:
            self.job.state = "done"
        elif code == 3 and diverged(self.run):
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

    The number of threads does not count, the vocabulary may have grown to fit the data, and paths became absolute.
    """
    vocabulary = max(there.model.vocab_size, asked.model.vocab_size)
    model = replace(asked.model, vocab_size=vocabulary)
    return there == replace(asked, threads=there.threads, model=model, data=asked.data.absolute())


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
