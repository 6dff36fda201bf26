"""Terminal output of the commands: progress, durations, aligned tables."""

import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

#: Where there is no terminal, a line now and then replaces the bar.
SECONDS_BETWEEN_LINES = 15.0


class _Patient(Console):
    """A console that falls silent when nobody reads it any more or the disk behind it is full: work goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


def stderr_console(*, quiet: bool = False) -> Console:
    """A console on stderr, so that a command's answer can be piped."""
    return _Patient(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), quiet=quiet)


def progress_bar(console: Console, *where: ProgressColumn, quiet: bool = False) -> Progress:
    """A bar with `where` before it, a task's `numbers` and the time left behind it; shown on a terminal only."""
    return Progress(
        *where,
        BarColumn(bar_width=24),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=quiet or not console.is_terminal,
    )


def clock(seconds: float) -> str:
    """A duration as 1:23, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class Interval:
    """A clock for what is done now and then: `due()` once every so many seconds.

    Args:
        seconds: between two times.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether the seconds have passed since the start or the last True; a True starts them anew."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def aligned(rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> list[str]:
    """Rows as lines with aligned columns; those in `right` are flushed right."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in text
    ]


def indented(lines: Sequence[str]) -> list[str]:
    """The same lines two spaces further in."""
    return [f"  {line}" for line in lines]
