"""Sums, counts and maxima of one probed step, kept on the device until the step is over."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

#: The name of a module, parameter or place in the residual stream, and the statistic that is summed up.
Key = tuple[str, str]


class StepSums:
    """The sums and maxima of one step on this process.

    Nothing here waits for the device: sums stay tensors, and so does a count that depends on the data.
    """

    def __init__(self) -> None:
        self.sums: dict[Key, list[tuple[Tensor, int | Tensor]]] = defaultdict(list)
        self.maxima: dict[Key, list[Tensor]] = defaultdict(list)

    def add(self, key: Key, total: Tensor, count: int | Tensor) -> None:
        """Add to a sum, and to the number of things that it is a sum over."""
        self.sums[key].append((total, count))

    def include(self, key: Key, value: Tensor) -> None:
        """Include a value in a maximum."""
        self.maxima[key].append(value)


class ReducedSums:
    """The sums of a step as one vector, reduced over the processes and copied to the host in the background.

    Every process must make one with the same keys at the same time. In a maximum, nan counts as infinity, because
    collectives treat nan in different ways.

    Args:
        step: the sums of this process; a key that it lacks counts nothing.
        sums: the keys of all sums, in the order that all processes share.
        maxima: the keys of all maxima, likewise.
        device: where to reduce.
    """

    def __init__(self, step: StepSums, sums: Sequence[Key], maxima: Sequence[Key], device: torch.device) -> None:
        self._sums, self._maxima = sums, maxima
        parts = [step.sums.get(key, []) for key in sums]
        totals = _combined([[total for total, _ in found] for found in parts], device, torch.sum, 0.0)
        totals = torch.cat([totals, _counts([[count for _, count in found] for found in parts], device)])
        largest = _combined([step.maxima.get(key, []) for key in maxima], device, torch.amax, -torch.inf)
        largest = largest.nan_to_num(torch.inf, torch.inf, -torch.inf)
        if processes() > 1:
            dist.all_reduce(totals)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        self._host, self._copied = _to_host(torch.cat([totals, largest]))

    @property
    def arrived(self) -> bool:
        """Whether `read` returns without waiting."""
        return self._copied is None or self._copied.query()

    def read(self) -> tuple[dict[Key, tuple[float, float]], dict[Key, float]]:
        """Sums with their counts, and maxima; waits for the copy if it is still under way."""
        if self._copied is not None:
            self._copied.synchronize()
        n = len(self._sums)
        values = self._host.tolist()
        sums = dict(zip(self._sums, zip(values[:n], values[n : 2 * n], strict=True), strict=True))
        return sums, dict(zip(self._maxima, values[2 * n :], strict=True))


def sum_of_squares(tensor: Tensor) -> Tensor:
    """`sum(t^2)` in at least float32; summed row by row, because one long float32 sum would lose digits."""
    tensor = tensor.detach()
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype).square().sum()


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def agreed(keys: Iterable[Key]) -> list[Key]:
    """The keys that any process has, in one order for all. Waits for the other processes."""
    found: list[list[Key]] = [sorted(set(keys))] * processes()
    if len(found) > 1:
        dist.all_gather_object(found, found[0])
    return sorted({key for part in found for key in part})


def _combined(
    lists: Iterable[Sequence[Tensor]], device: torch.device, reduce: Callable[[Tensor], Tensor], empty: float
) -> Tensor:
    """Reduce each list of scalars to one float32 number, an empty list to `empty`."""
    nothing = torch.full((), empty, device=device)
    values = [nothing]  # torch.stack needs at least one
    for tensors in lists:
        found = [tensor.to(device, torch.float32) for tensor in tensors] or [nothing]
        values.append(found[0] if len(found) == 1 else reduce(torch.stack(found)))
    return torch.stack(values)[1:]


def _counts(lists: Sequence[Sequence[int | Tensor]], device: torch.device) -> Tensor:
    """The sum of each list of counts; those known on the host travel to the device together."""
    known = [sum(count for count in counts if isinstance(count, int)) for counts in lists]
    host = torch.tensor(known, dtype=torch.float32, pin_memory=device.type == "cuda")
    measured = [[count for count in counts if isinstance(count, Tensor)] for counts in lists]
    return host.to(device, non_blocking=True) + _combined(measured, device, torch.sum, 0.0)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start a copy to the host; returns it with the event that marks its end, None where it is there already."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
