"""Clocks, turns and medians: what the benchmarks share."""

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.progress import MofNCompleteColumn, TextColumn

from sdd.terminal import SECONDS_BETWEEN_LINES, clock, progress_bar, stderr_console

T = TypeVar("T")
#: What stands in a result in the place of numbers.
OUT_OF_MEMORY = "out of memory"


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call by the clock, Python included, until the device is done."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def device_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call by the device's own clock, Python excluded; on a CPU by the clock.

    The device first sleeps about a millisecond, in which Python gives it all of the call's kernels: a kernel shorter
    than its launch would otherwise be timed by its launch.
    """
    if device.type != "cuda":
        return wall_seconds(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def turned(items: Sequence[T], by: int) -> list[T]:
    """The same items, beginning with another one each round: what stands before one of them is not always the same."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper one; of a single value, itself twice."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else [*values, *values]


def ratios(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round cancels."""
    return [mine / theirs for mine, theirs in zip(own, base, strict=True)]


def free(device: torch.device) -> None:
    """Give back memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def can_compile(device: torch.device) -> bool:
    """Whether inductor finds what it needs: Triton for CUDA; for a CPU g++, and no space in torch's path."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return shutil.which("g++") is not None and " " not in torch.__file__


class Ticker:
    """Shows on stderr what is measured, how much of it is done, and the time left; a line now and then in a file.

    Args:
        total: number of ticks.
    """

    def __init__(self, total: int) -> None:
        self._console = stderr_console()
        self._bar = progress_bar(self._console, TextColumn("{task.description}"), MofNCompleteColumn())
        self._task = self._bar.add_task("", total=total, numbers="")
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._shown = self._began

    def __enter__(self) -> "Ticker":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def at(self, what: str) -> None:
        """What is measured now."""
        self._bar.update(self._task, description=what)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = now
            left = (now - self._began) / max(self._done, 1) * (self._total - self._done)
            self.say(f"{what}   {self._done}/{self._total}   {clock(left)} left")

    def tick(self, count: int = 1) -> None:
        """So much more is done."""
        self._done += count
        self._bar.update(self._task, completed=self._done)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False)
