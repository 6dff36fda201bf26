"""What a run shows while it goes: a progress bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from sdd.terminal import SECONDS_BETWEEN_LINES, clock, progress_bar, stderr_console


class Reporter:
    """Shows step, loss, tokens/s and the time left.

    Args:
        steps: length of the run.
        start: steps already done.
        console: where to; stderr by default, so that a command's answer can be piped.
        quiet: show nothing.
    """

    def __init__(self, steps: int, start: int = 0, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or stderr_console(quiet=quiet)
        self.steps = steps
        self._shown = time.monotonic()
        self._began = time.monotonic()
        self._start = start
        self._progress = progress_bar(self.console, TextColumn("step"), MofNCompleteColumn(), quiet=quiet)
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
        if not self.console.is_terminal and (now - self._shown > SECONDS_BETWEEN_LINES or step == self.steps):
            self._shown = now
            left = (now - self._began) / max(step - self._start, 1) * (self.steps - step)
            self.say(f"step {step}/{self.steps}   {numbers}   {clock(left)} left")
