"""Where results are kept, and what every one of them says beside its numbers."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from sdd.bench.record import Record
from sdd.commands.main import main

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with machine, versions and revision."""
    record = Record(name, RESULTS, values)
    record.save()
    return record.path


def run_command(name: str) -> NoReturn:
    """Run `sdd bench NAME` with this command's arguments; its result goes to benchmarks/results."""
    sys.exit(main(["bench", name, "--out", str(RESULTS), *sys.argv[1:]]))
