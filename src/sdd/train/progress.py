"""What a run shows while it goes: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Shows step, loss, tokens/s and the time left.

    Args:
        steps: length of the run.
        start: steps already done.
        console: where to; stderr by default, so that a command's answer can be piped.
        quiet: show nothing.
    """

    def __init__(self, steps: int, start: int = 0, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), quiet=quiet)
        self.steps = steps
        self._shown = time.monotonic()
        self._began = time.monotonic()
        self._start = start
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, numbers="")

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show where the run is."""
        numbers = f"loss {loss:.4f}   {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._shown > _SECONDS_BETWEEN_LINES or step == self.steps):
            self._shown = now
            left = (now - self._began) / max(step - self._start, 1) * (self.steps - step)
            self.say(f"step {step}/{self.steps}   {numbers}   {_duration(left)} left")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
