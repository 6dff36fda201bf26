"""`sdd eval`: held-out loss and bits per byte of a run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import MofNCompleteColumn, TextColumn

from sdd.commands.parser import Parser, positive_int
from sdd.evals.text import evaluate_run
from sdd.terminal import SECONDS_BETWEEN_LINES, Interval, progress_bar, stderr_console


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd eval", "Loss and bits per byte of a run on held-out text.", allow_abbrev=True)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: all of the run's own held-out data)")
    about = "only so many windows of the text, evenly spread (default: all of it)"
    parser.add_argument("--sequences", metavar="N", type=positive_int, help=about)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_known(args)
    with _progress() as progress:
        result = evaluate_run(options.run, options.text, options.sequences, progress)
    if options.json:
        print(json.dumps(result))
    else:
        print(*(f"{name:15} {value}" for name, value in result.items()), sep="\n")
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows how many windows are done: a bar on a terminal, elsewhere a line now and then."""
    console, line = stderr_console(), Interval(SECONDS_BETWEEN_LINES)
    with progress_bar(console, TextColumn("windows"), MofNCompleteColumn()) as bar:
        task = bar.add_task("eval", total=None, numbers="")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and line.due():
                console.print(f"{done:,} of {total:,} windows", markup=False)

        yield show
