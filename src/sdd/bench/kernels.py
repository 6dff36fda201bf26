"""`sdd bench kernels`: each fused operation, forward and backward, against composed and compiled ones and Liger.

Counted are the bytes that must move: activations read and written once each way. The measure is the share of what a
copy on the same device moves in a second. Variants take turns, a forward and a backward pass each, on tensors of their
own, and the median of all turns counts. Not controlled: clocks, and other users of the device.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdd.bench.operations import Operation, inputs_of, operation, variants
from sdd.bench.record import Record
from sdd.bench.timing import OUT_OF_MEMORY, Ticker, device_seconds, free, turned, wait
from sdd.errors import is_out_of_memory

#: Rows and widths of the small sizes.
SMALL_ROWS = (1, 16, 64, 256, 1024, 4096)
SMALL_WIDTHS = (256, 2048)


@dataclass
class Settings:
    """What is measured.

    Attributes:
        device: where.
        dtype: of the activations, by torch's name.
        names: of operations.
        widths: of a row.
        mib: size of one activation.
        rounds: turns of each variant.
        compiled: torch.compile's version too.
    """

    device: torch.device
    dtype: str
    names: list[str]
    widths: list[int]
    mib: int
    rounds: int
    compiled: bool

    def rows(self, width: int) -> int:
        """As many as one activation has room for."""
        return (self.mib << 20) // (width * getattr(torch, self.dtype).itemsize)


@dataclass
class Turns:
    """One variant: its tensors and its times."""

    function: Callable[..., Any]
    inputs: list[Tensor]
    failed: str | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def turn(self, device: torch.device, *, timed: bool = True) -> None:
        """One forward and one backward pass, unless memory did not suffice before."""
        if self.failed:
            return
        try:
            self._turn(device, timed)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.failed = OUT_OF_MEMORY
        if self.failed:  # only now is the error gone, which holds the tensors of its frames
            self.inputs.clear()
            free(device)

    def _turn(self, device: torch.device, timed: bool) -> None:
        outputs: tuple[Tensor, ...] = ()

        def forward() -> None:
            nonlocal outputs
            y = self.function(*self.inputs)
            outputs = (y,) if isinstance(y, Tensor) else y

        forward_seconds = device_seconds(forward, device)
        gradients = [torch.randn_like(y) for y in outputs]  # anew: Liger writes into them
        backward_seconds = device_seconds(lambda: torch.autograd.grad(outputs, self.inputs, gradients), device)
        if timed:
            self.forward.append(forward_seconds)
            self.backward.append(backward_seconds)


def measure(settings: Settings, record: Record) -> None:
    """Fill `copy` (GB/s) and `operations` of the record, saving it after each."""
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
    """GB/s forward and backward of every variant, or why there are none."""
    device, dtype, rows = settings.device, getattr(torch, settings.dtype), settings.rows(width)
    torch._dynamo.reset()  # one compiled version an operation and width, not a dynamic one of them all
    op = operation(name, rows, width, device)
    turns = {
        variant: _turns(function, op, rows, width, dtype, device)
        for variant, function in variants(name, op, device, settings.compiled).items()
    }
    ticker.at(f"{name}, width {width}")
    for one in turns.values():
        for _ in range(2):
            one.turn(device, timed=False)
    for index in range(settings.rounds):
        ticker.at(f"{name}, width {width}")
        for one in turned(list(turns.values()), index):
            one.turn(device)
        ticker.tick()
    size = rows * width * dtype.itemsize / 1e9
    return {variant: _speeds(one, op, size) for variant, one in turns.items()}


def _turns(
    function: Callable[..., Any], op: Operation, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Turns:
    """A variant with its own tensors: Liger's backward pass writes into what it was given."""
    try:
        return Turns(function, inputs_of(op, rows, width, dtype, device))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return Turns(function, [], OUT_OF_MEMORY)


def _speeds(turns: Turns, op: Operation, size: float) -> dict[str, Any]:
    if turns.failed:
        return {"failed": turns.failed}
    return {
        "forward": op.forward * size / statistics.median(turns.forward),
        "backward": op.backward * size / statistics.median(turns.backward),
    }


def copy_bandwidth(n_bytes: int, device: torch.device, rounds: int) -> float:
    """GB/s of a copy, read and written bytes counted."""
    source = torch.empty(n_bytes // 2, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [device_seconds(lambda: target.copy_(source), device) for _ in range(max(rounds, 5))]
    return 2 * n_bytes / 1e9 / statistics.median(taken)


def measure_small(settings: Settings, record: Record) -> None:
    """Microseconds of a whole eager forward and backward call of the norm over small sizes, Python included."""
    sizes = [(rows, width) for rows in SMALL_ROWS for width in SMALL_WIDTHS]
    found = record.values["small"] = []
    with Ticker(len(sizes) * settings.rounds) as ticker:
        for rows, width in sizes:
            row = small_one(rows, width, settings, ticker)
            found.append({"rows": rows, "width": width, "numel": rows * width, "microseconds": row})
            record.save()


def small_one(rows: int, width: int, settings: Settings, ticker: Ticker) -> dict[str, float]:
    """Microseconds of every variant at one size."""
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
