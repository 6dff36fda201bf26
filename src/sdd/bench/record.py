"""A benchmark's result file: its numbers, and the machine, versions and revision that they belong to."""

import json
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sdd
from sdd.errors import Interrupted, UserError
from sdd.files import write_aside


class Record:
    """The numbers of one benchmark, which are on the disk from the first one on.

    Args:
        name: the benchmark and its device, as in `kernels_cpu`: the default name of the file.
        out: the file, or the folder for it. None puts it into the working folder under a free name.
        values: the values that are known before anything is measured.

    Attributes:
        values: everything in the file except the machine.
        path: the file.

    Raises:
        UserError: if the file could not be written.
    """

    def __init__(self, name: str, out: Path | None, values: dict[str, Any]) -> None:
        self.values = values
        self.path = _file(name, out)
        self._machine = machine()
        self._saved = False

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Save the measurements so far after any error; Ctrl-C becomes `Interrupted`, which names the file."""
        if kind is not None and self._saved:
            self.values["interrupted"] = True
            self.save()
        if kind is KeyboardInterrupt:
            kept = f"what was measured is in {self.path}" if self._saved else "nothing was measured yet"
            raise Interrupted(f"interrupted; {kept}") from None

    def save(self) -> None:
        """Write the numbers so far."""
        write_aside(self.path, self.text())
        self._saved = True

    @property
    def content(self) -> dict[str, Any]:
        """The content of the file."""
        return {**self.values, "machine": self._machine}

    def text(self) -> str:
        """The file's text."""
        return json.dumps(self.content, indent=2) + "\n"


def _file(name: str, out: Path | None) -> Path:
    """The path of a result. A mistake is reported before hours of measuring, not after."""
    if out is None:
        candidates = [Path(f"{name}.json"), *(Path(f"{name}-{number}.json") for number in range(2, 10_000))]
        out = next(path for path in candidates if not path.exists())
    path = out / f"{name}.json" if out.is_dir() else out
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {out}: {path.parent} is no folder that can be written into")
    return path


def machine() -> dict[str, Any]:
    """Date, revision, versions and hardware."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision(),
        "sdd": sdd.__version__,
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "liger_kernel")},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **_gpu(),
    }


def revision() -> str | None:
    """The commit of the repository that holds this package, with `-dirty` if files were changed; None without one.

    A repository that only surrounds the environment of this package does not count.
    """
    folder = Path(__file__).parent
    tracked = _output("git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name)
    return _output("git", "-C", str(folder), "describe", "--always", "--dirty") if tracked else None


def driver() -> str | None:
    """The version of the NVIDIA driver; None without one."""
    told = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if told:
        return told.splitlines()[0]
    try:  # a container may have the device without the tool
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "gpu_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _output(*command: str) -> str | None:
    """The output of a program; None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
