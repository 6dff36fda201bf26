"""One run on many processes: who they are, and what they must agree on.

torchrun starts the processes and tells each its number. All then run the same program in step; the first writes the
files and speaks. How they share a model is in `sdd.train.sharding`.
"""

import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sdd.errors import RunFailed, SddError, UserError

T = TypeVar("T")

#: A process that others have waited for this long is given up. Tokenising on first use must fit in.
TIMEOUT = timedelta(minutes=30)
_PATIENCE = timedelta(seconds=10)
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
_store: Store | None = None  # where the processes of this attempt at the job leave each other notes


@dataclass(frozen=True)
class World:
    """The processes of a run. By default it is this one alone, and every method does next to nothing.

    Methods that exchange something must be called by all ranks in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine.
        restarted: whether torchrun has started the job again after a failure.
        may_restart: whether it would.
        job: its name for the job, the same for every attempt; None if it has none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarted: bool = False
    may_restart: bool = False
    job: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks."""
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
        """The mean over ranks."""
        return value if self.size == 1 else self.total(value) / self.size

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks, in the dtype of the value."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def sum(self, value: float) -> float:
        """The sum over ranks, in float64."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return bool(self.sum(float(flag)))

    def passes(self, batch_size: int, accumulate: int) -> int:
        """Forward and backward passes a step on each rank.

        A batch is cut into `accumulate` equal parts, which the ranks share: the rows that are in memory at once do not
        grow with the number of processes, nor when a run goes on with fewer. Where the parts do not divide among the
        ranks, they are made smaller. All are equal, so the mean of their losses is the batch's.
        """
        rows = batch_size // self.size
        return next(n for n in range(1, rows + 1) if rows % n == 0 and n * self.size >= accumulate)

    def share(self, n: int) -> Tensor:
        """This rank's part of n items: int64 indices, as many on each rank, filled up with -1."""
        each = -(-n // self.size)
        indices = torch.arange(self.rank * each, (self.rank + 1) * each)
        return indices.masked_fill(indices >= n, -1)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """What `function`, which must not exchange anything, returns here; if it raises on any rank, all ranks raise.

        Raises:
            UserError, RunFailed, OSError: as on the rank that raised.
            RunFailed: naming the error, if another rank raised something else.
        """
        if self.size == 1:
            return function()
        try:
            result = function()
        except Exception as error:
            self._raise_first(error)
            raise
        self._raise_first(None)
        return result

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank; if it raises, all ranks raise (see `together`)."""
        if self.size == 1:
            return function()
        own = self.together(function if self.is_main else _nothing)
        return cast("list[T]", self.gather(own))[0]

    def in_turn(self, function: Callable[[], T]) -> T:
        """`together`, on rank 0 first, then on one process a machine, then on the rest: these find caches filled."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.together(_nothing)
        result = self.together(function)
        for _ in range(2 - turn):
            self.together(_nothing)
        return result

    def alone(self, function: Callable[[], T]) -> T:
        """What `function` returns; its error is told by this rank, as the others cannot know of it."""
        try:
            return function()
        except SddError as error:
            error.rank = self.rank
            raise

    def _raise_first(self, own: Exception | None) -> None:
        """Raise the error of the lowest rank that has one, except where this rank has its own to raise."""
        told = own
        if own is not None and not isinstance(own, SddError | OSError):
            told = RunFailed(f"rank {self.rank}: {type(own).__name__}: {own}")
        first = next((error for error in self.gather(told) if error is not None), None)
        if first is not None and own is None:
            raise first


def _nothing() -> None:
    return None


ALONE = World()


def in_environment() -> bool:
    """Whether torchrun, or what does as it does, started this process as one of a job."""
    return all(name in os.environ for name in _ENVIRONMENT)


def speaks(rank: int = 0) -> bool:
    """Whether this is the process of that number, or no part of a job."""
    return not in_environment() or int(os.environ["RANK"]) == rank


def tell(line: str, rank: int = 0) -> None:
    """Print a last line on stderr in the process of that number; the others wait until it is out.

    torchrun ends all processes as soon as it sees one gone.
    """
    if speaks(rank):
        with suppress(OSError):  # nobody listens any more
            print(line, file=sys.stderr, flush=True)
    if _store is None:
        return
    with suppress(RuntimeError):  # who should have spoken is gone too
        if speaks(rank):
            _store.set("told", "")
        else:
            _store.wait(["told"], _PATIENCE)


@contextmanager
def joined() -> Iterator[World]:
    """The world that this process belongs to, left when the block ends well.

    After an error others may be gone, and to take leave of them could take forever.

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
        raise RunFailed(f"another process of the job is gone, torchrun says which ({reason})") from None
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
    # small things are exchanged between CPUs: a flag or an error then needs no GPU that works
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=TIMEOUT)
    return replace(world, restarted=world.any(world.restarted))  # machines count their own restarts


def _attempt(store: Store, world: World) -> str:
    """A name that the processes of this attempt at the job have in common.

    torchrun keeps its store over restarts, and init_process_group would find addresses of the dead in it
    (https://github.com/pytorch/pytorch/issues/135712). So rank 0 publishes a fresh name, and every other rank takes it
    once rank 0 has answered under it to a fresh name of its own, which no rank 0 of the past can have known.
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


#: Seconds in which torchrun, which looks every 0.1, is sure to have seen that a process is gone.
_TORCHRUN_LOOKS = 1.0


def supervised(main: Callable[[], int]) -> int:
    """The exit code that `main` returns; torchrun learns of an exception that leaves it.

    In a job of several processes a failed one ends right here: at an orderly end, threads that still wait for other
    processes abort it now and then, and its exit code is lost. It lets torchrun look around first: a process that ends
    because another was lost must not be taken for the cause.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        main = cast("Callable[[], int]", record(main))
    code = main()
    if code and _store is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_TORCHRUN_LOOKS)
        os._exit(code)
    return code
