"""The checkpoints of a run, written while the training waits or beside it.

Beside it, all state is copied to host memory on the step, and a thread writes the copy exactly as it would otherwise be
written: aside, then renamed when whole. One is written at a time; the next waits for it. What the threads of several
processes exchange goes over a group of their own, so it never meets the exchanges of the training.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdd.train import checkpoint as ckpt
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir


class Saver:
    """Writes the checkpoints of one run, and deletes those that are no longer to be kept.

    All processes make one, and call its methods in the same order.

    Args:
        run_dir: the run.
        keep: how many of the newest checkpoints to keep; 0 keeps all.
        world: the processes that hold the model.
        beside: whether `begin` will be called.
    """

    def __init__(self, run_dir: RunDir, keep: int, world: World, *, beside: bool = False) -> None:
        self._run_dir, self._keep, self._world = run_dir, keep, world
        self._apart = world.apart() if beside else world
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and `finish` has not yet said so."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write a checkpoint; it is whole on return. See `save_checkpoint` for arguments and errors."""
        self.finish()
        return self._write(ckpt.tensors_of(model, optimizer), state, self._world)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copy all state, and let a thread write it as a checkpoint.

        Raises:
            OSError: if the checkpoint before could not be written.
        """
        self.finish()
        copies = ckpt.in_host_memory(ckpt.tensors_of(model, optimizer))
        self._writing = self._thread.submit(self._write, copies, state, self._apart)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            OSError: if it could not be written.
        """
        if error := self.settled():
            raise error

    def settled(self) -> BaseException | None:
        """Wait as `finish` does; returns the error instead of raising it."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.exception()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any], world: World) -> Path:
        world.on_main(self._run_dir.sync)
        path = ckpt.write_checkpoint(self._run_dir.checkpoints, tensors, state, world)
        world.on_main(lambda: ckpt.prune(self._run_dir.checkpoints, self._keep, path))
        return path
