"""What processes exchange, counted as they do it: every collective operation with its group and its bytes.

The counter stands where torch hands operations to a backend, so it sees those of FSDP2, of DTensor and of plain
`torch.distributed` alike, on real process groups and on fake ones.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, BROADCAST = "all-to-all", "broadcast"
# beginnings of names, the longest first where one begins another
_KINDS = {
    "_allgather_base_": ALL_GATHER,
    "allgather_": ALL_GATHER,
    "all_gather_into_tensor": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "reduce_scatter_": REDUCE_SCATTER,
    "allreduce_": ALL_REDUCE,
    "all_reduce": ALL_REDUCE,
    "alltoall_": ALL_TO_ALL,
    "all_to_all_single": ALL_TO_ALL,
    "shard_dim_alltoall": ALL_TO_ALL,
    "broadcast": BROADCAST,
}
_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_NO_EXCHANGE = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "check_for_nan")


class Stream(NamedTuple):
    """Collective operations of one kind over one group.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "broadcast".
        ranks: of the group that this process is in.
        prefetched: whether FSDP2 asked for them, which lets the model compute meanwhile.
    """

    kind: str
    ranks: tuple[int, ...]
    prefetched: bool


class Volume(NamedTuple):
    """How much goes through a stream.

    Attributes:
        calls: number of operations.
        size: bytes of the whole tensor, of all calls together: what a gather ends with, what a reduction begins with,
            what one process sends to all in an all-to-all.
    """

    calls: int
    size: int


#: Volumes by stream.
Traffic = dict[Stream, Volume]


class CountTraffic(TorchDispatchMode):
    """Counts the collective operations inside the block.

    Attributes:
        found: what was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[Stream] = Counter()
        self._sizes: Counter[Stream] = Counter()

    @property
    def found(self) -> Traffic:
        """What was counted so far."""
        return {stream: Volume(calls, self._sizes[stream]) for stream, calls in self._calls.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # to be called again for the tensors that it holds
        result = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES:
            self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.split("::")[1]
        if name in _NO_EXCHANGE:
            return
        kind = next((kind for begins, kind in _KINDS.items() if name.startswith(begins)), None)
        if kind is None:
            raise LookupError(f"{func} is none of the exchanges that are counted: {', '.join(_KINDS)}")
        group = _group([*args, *kwargs.values()])
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return
        stream = Stream(kind, ranks, _asked_by_fsdp())
        self._calls[stream] += 1
        self._sizes[stream] += _size(func.namespace, kind, args, result)


def _size(namespace: str, kind: str, args: Any, result: Any) -> int:
    """Bytes of the whole tensor, see `Volume`. Operations of c10d have the output first, unless they work in place."""
    if namespace != "c10d":
        return _bytes(result if kind == ALL_GATHER else args[0])
    return _bytes(args[0] if kind in (ALL_GATHER, ALL_REDUCE, BROADCAST) else args[1])


def _bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _group(values: Iterable[Any]) -> dist.ProcessGroup:
    """The process group among the arguments of an operation: an object, or the name at their end."""
    values = list(values)
    for value in values:
        if isinstance(value, dist.ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    name: Any = [value for value in values if isinstance(value, str)][-1]
    return _resolve_process_group(name)


def _asked_by_fsdp() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
            return True
        frame = frame.f_back
    return False
