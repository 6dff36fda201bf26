"""The files of a run.

config.json        every field; feeds back in
environment.json   versions, device, threads
metrics.jsonl      one object a step, and one an evaluation
probe.jsonl        one object a probed step, see sdd.probing.probe_file
samples.jsonl      generated text
result.json        how it ended
checkpoints/       see sdd.train.checkpoint
"""

import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from sdd.errors import UserError
from sdd.files import lock, naming, sync, write_aside


class RunDir:
    """A run directory, and the lock that keeps a second process out of it.

    Args:
        path: the directory; made if missing.
        writes: false in those processes of a run of several that leave writing to the first.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self._lock: IO[str] | None = None

    @property
    def config(self) -> Path:
        """config.json."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def create(self) -> None:
        """Make the directory and lock it.

        Raises:
            UserError: if it holds a run or other files already, or cannot be made, or another process has it.
        """
        try:
            self._check_free()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run directory {self.path}: {error.strerror}") from None
        self.lock()
        try:
            self._check_free()  # another process may have been faster
        except UserError:
            self.unlock()
            raise

    def _check_free(self) -> None:
        if self.config.exists():
            raise UserError(f"{self.path} holds a run already: go on with it (sdd resume {self.path}), or name another")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name a new directory")
        # what a process leaves that is killed before it has written config.json is no run yet
        inside = self.path.iterdir() if self.path.exists() else iter(())
        other = next((path.name for path in inside if path.name not in ("lock", ".tmp-config.json")), None)
        if other is not None:
            raise UserError(f"{self.path} is not empty (it holds {other}) and is no run: name a new directory")

    def lock(self) -> None:
        """Keep other processes from writing into this run until this process ends.

        Raises:
            UserError: if another process has it, or it cannot be written.
        """
        try:
            self._lock = lock(self.path / "lock")
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror}") from None

    def unlock(self) -> None:
        """Let other processes in again."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a small JSON file aside and rename it."""
        if self.writes:
            write_aside(self.path / name, json.dumps(_finite(values), indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty if there is none that can be read."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def append(self, name: str, values: dict[str, Any]) -> None:
        """Append one object to a JSON-lines file."""
        if not self.writes:
            return
        file = self.path / name
        with naming(file), file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_finite(values)) + "\n")

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Write one object into a small JSON-lines file, in place of those of the same step."""
        if self.writes:
            self._rewrite(name, lambda row: row.get("step") != values["step"], [values])

    def drop_after(self, step: int) -> None:
        """Remove from metrics, probe and samples what comes after `step`: a resumed run writes it again.

        What the guard did (`event`) stays: it happened.
        """
        for name in ("metrics.jsonl", "probe.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                self._rewrite(name, lambda row: "event" in row or _at_most(step, row.get("step", 0)))

    def sync(self) -> None:
        """Bring the metrics to the disk: a checkpoint must not outlive them."""
        if self.writes and self.metrics.exists():
            sync(self.metrics)

    def _rewrite(self, name: str, keep: Callable[[dict[str, Any]], bool], more: Sequence[dict[str, Any]] = ()) -> None:
        file = self.path / name
        rows = [row for row in read_jsonl(file) if keep(row)] if file.exists() else []
        write_aside(file, "".join(json.dumps(_finite(row)) + "\n" for row in [*rows, *more]))


def _at_most(step: int, at: Any) -> bool:
    return isinstance(at, int) and at <= step


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a killed process left unfinished is passed over."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def environment(device: torch.device, precision: str, processes: int = 1, job: str | None = None) -> dict[str, Any]:
    """What a result depends on beside its config."""
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
        "job": job,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
