"""What every benchmark's result file says beside its numbers."""

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import sdd

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with machine, versions and revision."""
    root = Path(__file__).parent.parent
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision.stdout.strip(),
        "sdd": sdd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    file.write_text(json.dumps({**values, "machine": machine}, indent=2) + "\n", encoding="utf-8")
    return file


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
