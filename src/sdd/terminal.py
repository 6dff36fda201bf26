"""What long work shows on a terminal, in one manner for every command."""

import sys
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
