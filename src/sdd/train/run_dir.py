"""The files of a run.

config.json        every field; feeds back in
environment.json   versions, device, threads
metrics.jsonl      one object a step, and one an evaluation
probe.jsonl        one object a probed step, see sdd.probing.probe_file
samples.jsonl      generated text
result.json        how it ended
tracker.json       where its numbers go beside metrics.jsonl, see sdd.train.trackers
checkpoints/       see sdd.train.checkpoint
"""

import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from sdd.errors import UserError
from sdd.files import finite, is_stray, lock, naming, number, read_json_lines, remove_leftovers, sync, write_aside

_log = logging.getLogger(__name__)
#: The files that are written as a whole, only by the process that has the lock.
_WHOLE = (
    "config.json",
    "environment.json",
    "tracker.json",
    "metrics.jsonl",
    "probe.jsonl",
    "samples.jsonl",
    "result.json",
)
#: What a run leaves that is killed or fails before its first step. A config.json without a lock is a user's own.
_BEFORE_STEPS = re.compile(r"lock|tensorboard|wandb|(\.tmp-)?(config|environment|tracker)\.json.*")


class RunDir:
    """A run directory, and the lock that keeps a second process out of it.

    Args:
        path: the directory; made if missing.
        writes: false in all processes of a run but the first: they write nothing.

    Attributes:
        config: the path of config.json.
        checkpoints: the folder of the checkpoints.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.config, self.checkpoints = path / "config.json", path / "checkpoints"
        self._lock: IO[str] | None = None

    def create(self) -> None:
        """Make the directory and lock it. The lock may stay after an error: the caller unlocks.

        Raises:
            UserError: if it is not free (see `check_free`), or cannot be made, or another process has it.
        """
        try:
            self.check_free()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run directory {self.path}: {error.strerror}") from None
        self.lock()
        self.check_free()  # another process may have been faster
        if self.config.exists():
            _log.info("%s holds a run that ended before its first step: its config.json is replaced", self.path)

    def check_free(self) -> None:
        """Check that a new run may begin here: nothing is there, or a run that ended before its first step.

        Raises:
            UserError: if the directory holds a run or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name a new directory")
        inside = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        other = next((name for name in inside if not (_BEFORE_STEPS.fullmatch(name) or is_stray(name))), None)
        if self.config.exists() and (other or "lock" not in inside):
            raise UserError(f"{self.path} holds a run already: go on with it (sdd resume {self.path}), or name another")
        if other:
            raise UserError(f"{self.path} is not empty (it holds {other}) and is no run: name a new directory")

    def lock(self) -> None:
        """Keep other processes from writing into this run until this process ends; delete what killed ones left.

        Raises:
            UserError: if another process has it, or it cannot be written.
        """
        try:
            self._lock = lock(self.path / "lock")
            remove_leftovers(self.path, _WHOLE)
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror}") from None

    def unlock(self) -> None:
        """Let other processes in again."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a small JSON file, as a whole."""
        if self.writes:
            write_aside(self.path / name, json.dumps(finite(values), indent=2) + "\n")

    def append(self, name: str, values: dict[str, Any]) -> None:
        """Append one object to a JSON-lines file."""
        self.append_all(name, [values])

    def append_all(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Append objects to a JSON-lines file."""
        if not self.writes or not rows:
            return
        file = self.path / name
        with naming(file), file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(finite(row)) + "\n" for row in rows))

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Write one object into a small JSON-lines file, in place of objects of the same step."""
        if self.writes:
            self._rewrite(name, lambda row: row.get("step") != values["step"], [values])

    def drop_after(self, step: int) -> None:
        """Remove the rows after `step` from metrics, probe and samples: a resumed run writes them again.

        The guard's rows (`event`) stay: what they report happened.
        """
        for name in ("metrics.jsonl", "probe.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                self._rewrite(name, lambda row: "event" in row or number(row.get("step", 0)) <= step)

    def sync(self) -> None:
        """Bring the metrics to the disk, so that no checkpoint outlives them."""
        if self.writes and (metrics := self.path / "metrics.jsonl").exists():
            sync(metrics)

    def _rewrite(self, name: str, keep: Callable[[dict[str, Any]], bool], more: Sequence[dict[str, Any]] = ()) -> None:
        file = self.path / name
        rows = [row for row in read_json_lines(file) if keep(row)] if file.exists() else []
        write_aside(file, "".join(json.dumps(finite(row)) + "\n" for row in [*rows, *more]))


def environment(
    device: torch.device, precision: str, processes: int = 1, job: str | None = None, layout: str | None = None
) -> dict[str, Any]:
    """Versions, device and settings that a result depends on beside its config."""
    from sdd import __version__

    cuda = device.type == "cuda"
    return {
        "sdd": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "cuda": torch.version.cuda if cuda else None,
        "precision": precision,
        "processes": processes,
        "layout": layout,
        "job": job,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
