"""Sums, counts and maxima of one step, kept on the device until the step is over."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

#: A site, or a place in the residual stream; and the statistic that the sum is for.
Key = tuple[str, str]


class Tally:
    """What one process saw of a step.

    Nothing here waits for the device: sums stay tensors, and so does a count that depends on the data.
    """

    def __init__(self) -> None:
        self.sums: dict[Key, list[Tensor]] = {}
        self.counts: dict[Key, list[int | Tensor]] = {}
        self.maxima: dict[Key, list[Tensor]] = {}

    def add(self, key: Key, total: Tensor, count: int | Tensor) -> None:
        """Add to a sum, and to the number of things that it is a sum over."""
        self.sums.setdefault(key, []).append(total)
        self.counts.setdefault(key, []).append(count)

    def highest(self, key: Key, value: Tensor) -> None:
        """Take part in a maximum."""
        self.maxima.setdefault(key, []).append(value)


class Packed:
    """A tally as one vector, reduced over the processes, on its way to the host.

    Every process must make one of the same keys at the same time. In a maximum, nan counts as infinity: collectives do
    not agree on what nan is.

    Args:
        tally: what this process saw; a key that it did not see counts nothing.
        sums: the keys of all sums, in the order that all processes share.
        maxima: likewise.
        device: where to reduce.
    """

    def __init__(self, tally: Tally, sums: Sequence[Key], maxima: Sequence[Key], device: torch.device) -> None:
        self._sums, self._maxima = sums, maxima
        totals = torch.cat([_combined(tally.sums, sums, device), _counts(tally, sums, device)])
        largest = _combined(tally.maxima, maxima, device, largest=True)
        if processes() > 1:
            dist.all_reduce(totals)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        self._host, self._copied = _to_host(torch.cat([totals, largest]))

    @property
    def arrived(self) -> bool:
        """Whether nothing is to be waited for."""
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
    """`sum(t^2)`, at least float32; row by row, as one long float32 sum would lose digits."""
    tensor = tensor.detach()
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype).square().sum()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if processes() > 1 else 0


def agreed(keys: Iterable[Key]) -> list[Key]:
    """The keys that any process has, in one order for all. Waits for the other processes."""
    if processes() == 1:
        return sorted(set(keys))
    found: list[list[Key]] = [[]] * processes()
    dist.all_gather_object(found, sorted(set(keys)))
    return sorted({key for part in found for key in part})


def _combined(
    parts: dict[Key, list[Tensor]], keys: Sequence[Key], device: torch.device, *, largest: bool = False
) -> Tensor:
    """One float32 number a key: the sum of its parts, or the largest of them."""
    nothing = torch.full((), -torch.inf if largest else 0.0, device=device)
    values = [nothing]
    for key in keys:
        found = [_here(part, device) for part in parts.get(key, ())] or [nothing]
        if len(found) == 1:
            values.append(found[0])
        else:
            values.append(torch.stack(found).amax() if largest else torch.stack(found).sum())
    together = torch.stack(values)[1:]
    return together.nan_to_num(torch.inf, torch.inf, -torch.inf) if largest else together


def _here(part: Tensor, device: torch.device) -> Tensor:
    is_here = part.device == device and part.dtype == torch.float32
    return part if is_here else part.to(device, torch.float32)


def _counts(tally: Tally, keys: Sequence[Key], device: torch.device) -> Tensor:
    known, unknown = [], []
    for index, key in enumerate(keys):
        counts = tally.counts.get(key, ())
        known.append(sum(count for count in counts if isinstance(count, int)))
        unknown += [(index, count) for count in counts if isinstance(count, Tensor)]
    host = torch.tensor(known, dtype=torch.float32)
    counts = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
    for index, count in unknown:
        counts[index] += _here(count, device)
    return counts


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
