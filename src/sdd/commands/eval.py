"""`sdd eval`: held-out loss and bits per byte of a run."""

import json
from pathlib import Path

from sdd.commands.parser import Parser
from sdd.evals.text import evaluate_run


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd eval", "Loss and bits per byte of a run on held-out text.", allow_abbrev=True)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: all of the run's own held-out data)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_known(args)
    result = evaluate_run(options.run, options.text)
    if options.json:
        print(json.dumps(result))
    else:
        print(*(f"{name:15} {value}" for name, value in result.items()), sep="\n")
    return 0
