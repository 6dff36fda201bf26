"""A probe in Lightning's Trainer: `Trainer(..., callbacks=[ProbeCallback()])`. Needs the extra `lightning`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from sdd.errors import require_extra
from sdd.probing.probe import Probe
from sdd.probing.probe_file import Row

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    require_extra("lightning", "pytorch_lightning", needed_by="sdd.probing.lightning")
    from pytorch_lightning import Callback  # under its older name, which has classes of its own


class ProbeCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues] (one class or the other)
    """Attaches a `Probe` to the LightningModule that a Trainer trains; gradients are seen before they are clipped.

    Args:
        every: see `Probe`; in optimiser steps.
        out: see `Probe`; None for probe.jsonl in the Trainer's log_dir, or in its default_root_dir if it has no logger.

    Attributes:
        probe: the probe of the latest training, None before the first.
    """

    def __init__(self, every: int = 50, out: str | Path | Callable[[Row], None] | None = None) -> None:
        super().__init__()
        self.every, self.out = every, out
        self.probe: Probe | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the probe."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        out = self.out if self.out is not None else folder / "probe.jsonl"
        self.probe = Probe(pl_module, trainer.optimizers, self.every, out, done=trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Take the statistics of gradients before they are clipped."""
        if self.probe is not None:
            self.probe.gradients_ready()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last row and detach the probe."""
        if self.probe is not None:
            self.probe.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the last row and detach the probe."""
        self.on_train_end(trainer, pl_module)
