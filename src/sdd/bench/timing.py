"""Clocks, turns, medians and profiles, shared by the benchmarks."""

import gc
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.progress import MofNCompleteColumn, TextColumn
from torch.autograd.profiler_util import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity

from sdd.errors import is_out_of_memory
from sdd.terminal import SECONDS_BETWEEN_LINES, Interval, clock, progress_bar, stderr_console

T = TypeVar("T")
#: Stands in a result in the place of numbers.
OUT_OF_MEMORY = "out of memory"
#: Steps that a profile runs.
PROFILED_STEPS = 3
#: Operations that a profile keeps.
PROFILED_OPERATIONS = 60


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time one call by the clock, Python included, until the device is done."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def device_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time one call by the device's own clock, Python excluded; on a CPU by the clock.

    The device first sleeps for about a millisecond, in which Python queues all kernels of the call. Otherwise the time
    of a kernel that is shorter than its launch would be that of the launch.
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
    """Rotate the items, to balance order effects."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper quartile; a single value twice."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else [*values, *values]


def ratios(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """The ratio in each round, in which a disturbance of the whole round cancels."""
    return [mine / theirs for mine, theirs in zip(own, base, strict=True)]


def free(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def can_compile(device: torch.device) -> bool:
    """Whether inductor has its requirements: Triton for CUDA; for a CPU g++, and no space in torch's path."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return shutil.which("g++") is not None and " " not in torch.__file__


def runs_out_of_memory(call: Callable[[], Any]) -> bool:
    """Call, and return whether memory did not suffice. Tensors of the call are free again when this returns."""
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


@contextmanager
def kernel_names(wanted: bool) -> Iterator[None]:
    """Let profiles name each kernel that inductor compiles for a CPU inside the block, if `wanted`."""
    if not wanted:
        yield
        return
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def times_of(run: Callable[[], Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds and calls per step of each operation, the slowest first: kernels on a GPU, operations on a CPU.

    The times are those that operations take themselves, without the operations that they call.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(PROFILED_STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.key_averages():
        is_kernel = event.device_type != DeviceType.CPU
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if is_kernel == on_gpu and taken > 0:
            row = found.setdefault(common_name(event.key), {"ms": 0.0, "calls": 0.0})
            row["ms"] += taken / 1e3 / PROFILED_STEPS
            row["calls"] += event.count / PROFILED_STEPS
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"])[:PROFILED_OPERATIONS])


def common_name(name: str) -> str:
    """A compiled kernel's name without the numbers that differ between variants."""
    name = re.sub(r"^## Call CompiledFxGraph \S+ ##$", "CompiledFxGraph", name)
    return re.sub(r"^graph_\d+_(?=cpp_)|(?<=_)\d+$", "", name).rstrip("_") if "fused" in name else name


def differences(own: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds per step that a variant spends more than the baseline, by operation; largest difference first."""
    names = own.keys() | base.keys()
    nothing = {"ms": 0.0}
    found = {name: own.get(name, nothing)["ms"] - base.get(name, nothing)["ms"] for name in names}
    return dict(sorted(found.items(), key=lambda item: (-abs(item[1]), item[0])))


class Ticker:
    """Progress on stderr: the current measurement, the share that is done, and the time left; in a file now and then.

    Args:
        total: number of ticks.
    """

    def __init__(self, total: int) -> None:
        self._console = stderr_console()
        self._bar = progress_bar(self._console, TextColumn("{task.description}"), MofNCompleteColumn())
        self._task = self._bar.add_task("", total=total, numbers="")
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._line = Interval(SECONDS_BETWEEN_LINES)

    def __enter__(self) -> "Ticker":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def at(self, what: str) -> None:
        """Show the current measurement."""
        self._bar.update(self._task, description=what)
        if not self._console.is_terminal and self._line.due():
            left = (time.monotonic() - self._began) / max(self._done, 1) * (self._total - self._done)
            line = f"{what}   {self._done}/{self._total}   {clock(left)} left"
            self._console.print(line, markup=False)

    def tick(self) -> None:
        """Count one turn as done."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
