"""The progress of a grid of runs: a live table on a terminal, a line now and then elsewhere."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdd.lab.grid.job import FINISHED, Job
from sdd.terminal import Interval, clock, stderr_console

_SECONDS_BETWEEN_LINES = 20.0
_COLORS = {
    "waiting": "dim",
    "running": "cyan",
    "elsewhere": "blue",
    "done": "green",
    "failed": "yellow",
    "crashed": "red",
}


class Display:
    """Shows the progress of every run of a grid.

    Args:
        console: where it is shown; stderr by default, so that a command's answer can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()
        self._live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self._states: dict[str, str] = {}
        self._lines = Interval(_SECONDS_BETWEEN_LINES)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, jobs: Sequence[Job], seconds_left: float | None) -> None:
        """Show the jobs as they are now."""
        if self._live:
            self._live.update(jobs_table(jobs, seconds_left))
            return
        for job in jobs:
            before = self._states.setdefault(job.name, "waiting" if job.state == "running" else job.state)
            if job.state not in (before, "waiting"):
                self._states[job.name] = job.state
                self.console.print(_line(job), markup=False, soft_wrap=True)
        if self._lines.due():
            shown = [_progress(job) for job in jobs if job.state in ("running", "elsewhere")]
            self.console.print(f"{', '.join(shown)}; {_left(jobs, seconds_left)}", markup=False, soft_wrap=True)


def jobs_table(jobs: Sequence[Job], seconds_left: float | None) -> Table:
    """Lay out one row for each run, and the time left below."""
    table = Table(box=None, pad_edge=False, caption=_left(jobs, seconds_left), caption_justify="left")
    for name in ("run", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "held-out", "bits/byte", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for job in jobs:
        table.add_row(
            job.name,
            Text(job.state, style=_COLORS.get(job.state, "")),
            f"{job.step}/{job.config.steps}",
            _number(job.loss),
            _number(job.eval_loss),
            _number(job.bits_per_byte),
            clock(job.seconds) if job.seconds else "",
            Text(job.detail, overflow="ellipsis", no_wrap=True),
        )
    return table


def _left(jobs: Sequence[Job], seconds_left: float | None) -> str:
    ended = sum(job.state in (*FINISHED, "crashed") for job in jobs)
    left = "" if seconds_left is None or ended == len(jobs) else f", about {clock(seconds_left)} left"
    return f"{ended} of {len(jobs)} runs{left}"


def _progress(job: Job) -> str:
    where = " elsewhere" if job.state == "elsewhere" else ""
    return f"{job.name} {job.step}/{job.config.steps}{where}"


def _line(job: Job) -> str:
    text = f"{job.name}: {job.state}"
    if job.state == "done":
        text += f", held-out loss {_number(job.eval_loss)}, {_number(job.bits_per_byte)} bits per byte"
    return text + (f", {job.detail}" if job.detail else "")


def _number(value: float | str | None) -> str:
    if isinstance(value, int | float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return value or ""  # "nan" and its like stand as text in a metrics.jsonl
