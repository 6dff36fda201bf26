"""`sdd bench kernels`: each fused operation, forward and backward, against composed and compiled ones and Liger.

The bytes that count are those that must move: activations, read and written once each way. The measure is their share
of the bytes that a copy on the same device moves in the same time. Variants take turns, a forward and a backward pass
each, on tensors of their own, and the median of all turns counts. Not controlled: clocks, other users of the device.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdd.bench.operations import Operation, inputs_of, operation, variants
from sdd.bench.record import Record
from sdd.bench.timing import OUT_OF_MEMORY, Ticker, device_seconds, free, runs_out_of_memory, turned, wait

#: Rows and widths of the small sizes.
SMALL_ROWS = (1, 16, 64, 256, 1024, 4096)
SMALL_WIDTHS = (256, 2048)


@dataclass
class Settings:
    """The operations and sizes to measure.

    Attributes:
        device: the device.
        dtype: dtype of the activations, by torch's name.
        names: names of operations.
        widths: features of a row.
        mib: size of one activation.
        rounds: turns of each variant.
        compiled: whether to measure torch.compile's version too.
    """

    device: torch.device
    dtype: str
    names: list[str]
    widths: list[int]
    mib: int
    rounds: int
    compiled: bool

    def rows(self, width: int) -> int:
        """The number of rows of that width in one activation."""
        return (self.mib << 20) // (width * getattr(torch, self.dtype).itemsize)


@dataclass
class Turns:
    """One variant: its tensors and its times, or the reason why it has none."""

    function: Callable[..., Any]
    inputs: list[Tensor] = field(default_factory=list)
    failed: str | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def attempt(self, call: Callable[[], Any], device: torch.device) -> None:
        """Call, unless an earlier call ran out of memory; if this one does, free its memory and record the failure."""
        if not self.failed and runs_out_of_memory(call):
            self.failed = OUT_OF_MEMORY
            self.inputs.clear()
            free(device)

    def turn(self, device: torch.device, *, timed: bool = True) -> None:
        """Do one forward and one backward pass."""
        self.attempt(lambda: self._turn(device, timed), device)

    def _turn(self, device: torch.device, timed: bool) -> None:
        outputs: tuple[Tensor, ...] = ()

        def forward() -> None:
            nonlocal outputs
            y = self.function(*self.inputs)
            outputs = (y,) if isinstance(y, Tensor) else y

        forward_seconds = device_seconds(forward, device)
        gradients = [torch.randn_like(y) for y in outputs]  # new ones each time: Liger writes into them
        backward_seconds = device_seconds(lambda: torch.autograd.grad(outputs, self.inputs, gradients), device)
        if timed:
            self.forward.append(forward_seconds)
            self.backward.append(backward_seconds)


def measure(settings: Settings, record: Record) -> None:
    """Fill `copy` (GB/s) and `operations` of the record, and save it after each operation and width."""
    with Ticker(len(settings.names) * len(settings.widths) * settings.rounds) as ticker:
        ticker.at("copy")
        record.values["copy"] = copy_bandwidth(settings.mib << 20, settings.device, settings.rounds)
        found = record.values["operations"] = []
        for name in settings.names:
            for width in settings.widths:
                speeds = measure_one(name, width, settings, ticker)
                found.append({"operation": name, "rows": settings.rows(width), "width": width, "gb_per_second": speeds})
                record.save()


def measure_one(name: str, width: int, settings: Settings, ticker: Ticker) -> dict[str, dict[str, Any]]:
    """GB/s forward and backward of every variant, or the reason why there are none."""
    device, dtype, rows = settings.device, getattr(torch, settings.dtype), settings.rows(width)
    torch._dynamo.reset()  # one compiled version for each operation and width, not a dynamic one for all
    op = operation(name, rows, width, device)
    turns = {variant: Turns(call) for variant, call in variants(name, op, device, settings.compiled).items()}
    ticker.at(f"{name}, width {width}")
    for one in turns.values():
        # tensors of its own: Liger's backward pass writes into its inputs
        one.attempt(partial(_draw_inputs, one, op, rows, width, dtype, device), device)
        for _ in range(2):
            one.turn(device, timed=False)
    for index in range(settings.rounds):
        ticker.at(f"{name}, width {width}")
        for one in turned(list(turns.values()), index):
            one.turn(device)
        ticker.tick()
    size = rows * width * dtype.itemsize / 1e9
    return {variant: _speeds(one, op, size) for variant, one in turns.items()}


def _draw_inputs(turns: Turns, op: Operation, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    turns.inputs = inputs_of(op, rows, width, dtype, device)


def _speeds(turns: Turns, op: Operation, size: float) -> dict[str, Any]:
    if turns.failed:
        return {"failed": turns.failed}
    return {
        "forward": op.forward * size / statistics.median(turns.forward),
        "backward": op.backward * size / statistics.median(turns.backward),
    }


def copy_bandwidth(n_bytes: int, device: torch.device, rounds: int) -> float:
    """GB/s of a copy; bytes read and bytes written both count."""
    source = torch.empty(n_bytes // 2, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [device_seconds(lambda: target.copy_(source), device) for _ in range(max(rounds, 5))]
    return 2 * n_bytes / 1e9 / statistics.median(taken)


def measure_small(settings: Settings, record: Record) -> None:
    """Fill `small` of the record: microseconds of eager forward and backward calls of the norm, Python included."""
    sizes = [(rows, width) for rows in SMALL_ROWS for width in SMALL_WIDTHS]
    found = record.values["small"] = []
    with Ticker(len(sizes) * settings.rounds) as ticker:
        for rows, width in sizes:
            row = small_one(rows, width, settings, ticker)
            found.append({"rows": rows, "width": width, "numel": rows * width, "microseconds": row})
            record.save()


def small_one(rows: int, width: int, settings: Settings, ticker: Ticker) -> dict[str, float]:
    """Microseconds of each variant at one size."""
    device = settings.device
    op = operation("norm", rows, width, device)
    inputs = inputs_of(op, rows, width, getattr(torch, settings.dtype), device)
    dy = torch.ones_like(inputs[0])
    calls = list(variants("norm", op, device, compiled=False).items())
    times: dict[str, list[float]] = {variant: [] for variant, _ in calls}
    for index in range(settings.rounds):
        ticker.at(f"norm, {rows} x {width}")
        for variant, function in turned(calls, index):
            wait(device)
            began = time.perf_counter()
            for _ in range(5):
                torch.autograd.grad(function(*inputs), inputs, dy)
            wait(device)
            times[variant].append((time.perf_counter() - began) / 5)
        ticker.tick()
    return {variant: 1e6 * statistics.median(taken) for variant, taken in times.items()}
