"""A probe in transformers' Trainer: `Trainer(..., callbacks=[ProbeCallback()])`. Needs the extra `hf`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdd.errors import require_extra
from sdd.probing.probe import Probe
from sdd.probing.probe_file import Row

require_extra("hf", "transformers", needed_by="sdd.probing.hf")
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402


class ProbeCallback(TrainerCallback):
    """Attaches a `Probe` to the model that a `transformers.Trainer` trains.

    The Trainer clips gradients before it calls any callback: `weight_grad_rms` and `alpha_grad_rms` are those after
    clipping.

    Args:
        every: see `Probe`.
        out: see `Probe`; None for probe.jsonl in the Trainer's output_dir.

    Attributes:
        probe: the probe of the latest training, None before the first.
    """

    def __init__(self, every: int = 50, out: str | Path | Callable[[Row], None] | None = None) -> None:
        self.every, self.out = every, out
        self.probe: Probe | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        """Attach the probe to `model` and `optimizer`."""
        self._close()  # the probe of a training that failed
        out = self.out if self.out is not None else Path(args.output_dir or ".") / "probe.jsonl"
        optimizer = getattr(of["optimizer"], "optimizer", of["optimizer"])  # accelerate's wrapper has no hooks
        self.probe = Probe(of["model"], optimizer, self.every, out, done=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the last row and detach the probe."""
        self._close()

    def _close(self) -> None:
        if self.probe is not None:
            self.probe.close()
