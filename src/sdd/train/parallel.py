"""Where a run computes: the device, the processes that share it and what they exchange, and signals to stop.

torchrun starts the processes and tells each its number. All then run the same program in step; the first writes the
files and prints the messages. How the processes share a model is in `sdd.train.sharding`.
"""

import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sdd.errors import RunFailed, SddError, UserError
from sdd.models.config import ModelConfig
from sdd.parallel.layout import ParallelConfig
from sdd.parallel.mesh import build_mesh, data_mesh

T = TypeVar("T")

#: How long the processes wait for a missing one before they give up. Tokenising on first use must take less.
TIMEOUT = timedelta(minutes=30)
_PATIENCE = timedelta(seconds=10)
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
_store: Store | None = None  # shared by the processes of this attempt at the job


def pick_device(name: str) -> torch.device:
    """The device that a config's `device` names; "auto" is the first that exists of cuda, mps (untested) and cpu.

    Raises:
        UserError: if it does not exist here.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, found in present.items() if found]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise UserError(f"device={name!r} is not available here: choose from {', '.join(there)}, or auto")
    return torch.device(name)


def pick_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32.

    Raises:
        UserError: if bfloat16 was asked for on a GPU that has none.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if precision == "bfloat16" and not has_bfloat16:
        raise UserError("precision=bfloat16: this GPU has no bfloat16; choose float32")
    wanted = precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and has_bfloat16)
    return torch.bfloat16 if wanted else None


class StopSignals:
    """Context in which the first Ctrl-C or SIGTERM is only noted, so that the step is finished; the second raises.

    Attributes:
        received: whether one has come.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        with suppress(ValueError):  # not the main thread, which alone may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


@dataclass(frozen=True)
class World:
    """The processes of a run. By default that is this process alone, and every method does next to nothing.

    Methods that exchange something must be called by all ranks in the same order. Flags, errors and objects go over all
    ranks. Numbers of the data (`mean`, `total`, `sum`, `share`, `passes`) go over the data ranks: those that train on
    other rows. All ranks are data ranks until the world is laid out.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine.
        restarted: whether torchrun has started the job again after a failure.
        may_restart: whether torchrun would start the job again after a failure.
        job: torchrun's name for the job, the same for every attempt; None if it has none.
        layout: the sizes of the mesh's dimensions; None before `laid_out`.
        mesh: of all ranks; None before `laid_out`, and of one process.
        data: the part of the mesh over which rows differ; None if all ranks train on the same rows.
        group: what flags, errors and objects go over; None for the default group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarted: bool = False
    may_restart: bool = False
    job: str | None = None
    layout: ParallelConfig | None = None
    mesh: DeviceMesh | None = None
    data: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

    def apart(self) -> "World":
        """The same processes with a group of their own, for a thread that exchanges beside the others.

        All ranks must call it. Only flags, errors and objects go over the group, not the numbers of the data.
        """
        if self.size == 1:
            return self
        return replace(self, group=cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=TIMEOUT)))

    def laid_out(self, parallel: ParallelConfig, model: ModelConfig, device: torch.device) -> "World":
        """The same processes as a mesh.

        Raises:
            UserError: if the layout does not fit the number of processes or the model. All ranks raise.
        """
        layout = parallel.resolved(self.size, model)
        if self.size == 1:
            return replace(self, layout=layout)
        mesh = build_mesh(layout, device)
        return replace(self, layout=layout, mesh=mesh, data=data_mesh(mesh))

    @property
    def shape(self) -> str | None:
        """The layout in words; None where the processes do nothing but shard."""
        return None if self.layout is None or self.layout.is_plain else str(self.layout)

    @property
    def data_size(self) -> int:
        """The number of parts that the rows of a batch are cut into."""
        return self.size if self.layout is None else self.layout.data

    @property
    def data_rank(self) -> int:
        """The number of this process's part of the rows, from 0."""
        if self.layout is None:
            return self.rank
        return 0 if self.data is None else self.data.get_local_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints the messages."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """The device of this rank among those of the machine.

        Raises:
            UserError: if there are more processes than GPUs, or the device cannot be shared.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise UserError(f"device={device.type} trains in one process: leave torchrun out, or choose device=cpu")
        if self.local_rank >= torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise UserError(f"process {self.local_rank} of this machine has no GPU: set --nproc-per-node to {there}")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over data ranks."""
        return self.total(value) / self.data_size

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over data ranks, in its dtype."""
        if self.data_size == 1:
            return value
        return _added(value, None if self.data is None else self.data.get_group())

    def total_of_all(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in its dtype."""
        return value if self.size == 1 else _added(value, self.group)

    def sum(self, value: float) -> float:
        """The sum of a number over data ranks, in float64."""
        return self.total(torch.tensor(value, dtype=torch.float64)).item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return bool(self.total_of_all(torch.tensor(float(flag), dtype=torch.float64)).item())

    def passes(self, batch_size: int, accumulate: int) -> int:
        """The number of forward and backward passes that each rank makes in a step.

        A batch is cut into `accumulate` equal parts, which the data ranks share. So the rows in memory at once do not
        grow with the number of processes, nor when a run goes on with fewer. Where the parts do not divide among the
        ranks, they are made smaller. All parts are equal, so the mean of their losses is the loss of the batch.
        """
        rows = batch_size // self.data_size
        return next(n for n in range(1, rows + 1) if rows % n == 0 and n * self.data_size >= accumulate)

    def share(self, n: int) -> Tensor:
        """The indices (int64) of this data rank's part of n items. All parts have one length; -1 pads them."""
        each = -(-n // self.data_size)
        indices = torch.arange(self.data_rank * each, (self.data_rank + 1) * each)
        return indices.masked_fill(indices >= n, -1)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order. A value is anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank and return its result here; if it raises on any rank, all ranks raise.

        Args:
            function: must not exchange anything between ranks.

        Raises:
            UserError, RunFailed, OSError: the error of the lowest rank that raised.
            RunFailed: with the name of the error, if that rank raised something else.
        """
        try:
            result = function()
        except Exception as error:
            self._raise_first(error)
            raise
        self._raise_first(None)
        return result

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank; if it raises, all ranks raise."""
        own = self.together(function if self.is_main else _nothing)
        return cast("list[T]", self.gather(own))[0]

    def in_turn(self, function: Callable[[], T]) -> T:
        """`together` in three turns, so that later ones find caches filled: rank 0, one process a machine, the rest."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        results = [self.together(function if each == turn else _nothing) for each in range(3)]
        return cast("T", results[turn])

    def alone(self, function: Callable[[], T]) -> T:
        """Call `function` on this rank only. This rank reports its error, as the others cannot know of it."""
        try:
            return function()
        except SddError as error:
            error.rank = self.rank
            raise

    def _raise_first(self, own: Exception | None) -> None:
        """Raise the error of the lowest rank that has one, except where this rank has its own to raise."""
        shared = own
        if own is not None and not isinstance(own, SddError | OSError):
            shared = RunFailed(f"rank {self.rank}: {type(own).__name__}: {own}")
        first = next((error for error in self.gather(shared) if error is not None), None)
        if first is not None and own is None:
            raise first


def _nothing() -> None:
    return None


def _added(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over a group of processes, by default over all."""
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total


ALONE = World()


def in_environment() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as one of a job."""
    return all(name in os.environ for name in _ENVIRONMENT)


def speaks(rank: int = 0) -> bool:
    """Whether this process has that rank, or is not part of a job."""
    return not in_environment() or int(os.environ["RANK"]) == rank


def tell(line: str, rank: int = 0) -> None:
    """Print a last line on stderr in the process of that rank. The others wait until it is printed.

    They wait because torchrun ends all processes as soon as it sees one gone.
    """
    if speaks(rank):
        with suppress(OSError):  # nobody reads stderr any more
            print(line, file=sys.stderr, flush=True)
    if _store is None:
        return
    with suppress(RuntimeError):  # the process that should print is gone too
        if speaks(rank):
            _store.set("told", "")
        else:
            _store.wait(["told"], _PATIENCE)


@contextmanager
def joined() -> Iterator[World]:
    """The world that this process belongs to. The process leaves it when the block ends without an error.

    After an error other processes may be gone, and leaving in good order could wait for them forever.

    Raises:
        RunFailed: if another process is lost.
    """
    try:
        world = _join()
        yield world
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        reason = re.sub(r"\[/\S+\] ", "", str(error)).split(". ")[0]
        raise RunFailed(f"another process of the job is gone: see what it and torchrun wrote ({reason})") from None
    if world.size > 1:
        dist.destroy_process_group()


def _join() -> World:
    global _store
    if not in_environment():
        return ALONE
    rank, size, local_rank, restarts, most = (int(os.environ.get(name, 0)) for name in _NUMBERS)
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    world = World(rank, size, local_rank, restarts > 0, most > 0, None if job == "none" else job)
    if size == 1:
        return world
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    _store = PrefixStore(_attempt(store, world), store)
    # flags and errors are exchanged between CPUs, so that they do not depend on a working GPU
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=TIMEOUT)
    return replace(world, restarted=world.any(world.restarted))  # machines count their own restarts


def _attempt(store: Store, world: World) -> str:
    """A name that the processes of this attempt at the job, and of no earlier one, share.

    torchrun keeps its store over restarts, so init_process_group would find the addresses of dead processes in it
    (https://github.com/pytorch/pytorch/issues/135712). Therefore rank 0 publishes a fresh name. Every other rank
    writes a fresh name of its own under it, and takes rank 0's name once rank 0 has answered. A rank 0 of an earlier
    attempt cannot answer, as it never knew the other's fresh name.
    """
    own = uuid.uuid4().hex
    if world.is_main:
        store.set("attempt", own)
        for rank in range(1, world.size):
            store.set(f"{own}/{store.get(f'{own}/{rank}').decode()}", "")
        return own
    end = time.monotonic() + TIMEOUT.total_seconds()
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{world.rank}", own)
        try:
            store.wait([f"{attempt}/{own}"], timedelta(seconds=1))
        except dist.DistStoreError:
            if time.monotonic() > end:
                raise
        else:
            return attempt


def shared() -> bool:
    """Whether this process has met the other processes of its job."""
    return _store is not None
