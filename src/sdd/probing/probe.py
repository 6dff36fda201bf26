"""`sdd.Probe`: statistics of a model's modules every few steps of its training."""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sdd.probing.probe_file import Row, append_row, make_row
from sdd.probing.recorder import Recorder
from sdd.probing.sums import Key, ReducedSums, StepSums, agreed, processes, rank
from sdd.probing.updates import ParameterSums
from sdd.probing.watched import WatchedModules

_log = logging.getLogger(__name__)


class Probe:
    """Records what happens in a model while it trains, at the first step and every few steps after it.

    One line attaches it to any loop; it follows the optimiser's steps:

        probe = sdd.Probe(model, optimizer, out="probe.jsonl")

    A loop may instead mark itself where a step begins and ends. It leaves the optimiser out, and can have the
    statistics of gradients taken before they are clipped:

        probe = sdd.Probe(model, out="probe.jsonl")
        for batch in data:
            with probe.step(optimizer):
                model(batch).backward()
                probe.gradients_ready()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    The statistics and their formulas are in `sdd.probing.STATISTICS`. A probed step computes what any other step does,
    with two exceptions that round differently: code compiled with torch.compile runs eagerly, in the whole process, and
    operations that our models fuse or leave out (`ModelConfig.eliminate_norms`, kernels on a GPU) are computed norm by
    norm.
    Only forward passes that keep a graph for gradients are recorded, so the probe does not see blocks under reentrant
    activation checkpointing, which keeps none. All microbatches of a step count. If several processes train, each must
    have a probe: sums are reduced over them, and gradients by outputs are those of the mean of their losses.

    Args:
        model: any module, in its final form: converted, sharded, wrapped, compiled.
        optimizer: whose steps to follow, one or several that step in turn; None to mark steps with `step`.
        every: steps between probed ones: the first is probed, and each whose number it divides; 0 for none.
        out: a file to append rows to, or a function that receives each row; see `sdd.probing.probe_file`. Only the
            first of several processes writes. On a GPU a row is written at the next step, when it has arrived.
        done: steps done before, in a loop that is resumed.
        early: probe steps 2, 4, 8, ... below `every` too, because runs often break early; `sdd train` does this.
        losses: the number of losses that the processes train on the mean of; None for one each. Processes that share
            one loss (tensor parallelism) count as one.

    Attributes:
        every, early: as given.
        done: steps done.
        latest: the last row, None before the first.
        asked: whether `look` asked for the next step.

    Raises:
        ValueError: if every or done is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        every: int = 50,
        out: str | Path | Callable[[Row], None] | None = None,
        *,
        done: int = 0,
        early: bool = False,
        losses: int | None = None,
    ) -> None:
        if every < 0 or done < 0:
            raise ValueError(f"every={every} and done={done} must not be negative")
        self.every, self.done, self.early = every, done, early
        self.latest: Row | None = None
        self.asked = False
        self._losses = losses
        self._watched = WatchedModules(model)
        self._write = _writer(out)
        self._met: tuple[list[Key], list[Key]] | None = None  # keys of sums and maxima that any process had
        self._pending: tuple[int, ReducedSums] | None = None
        self._under_way: _Step | None = None
        self._optimizers = _listed(optimizer)
        self._to_step = set(self._optimizers)
        self._handles = self._before_updates_of(self._optimizers)
        self._handles += [each.register_step_post_hook(_eager(self._after_update)) for each in self._optimizers]
        if self._optimizers:
            self._begin_if_due()

    @contextmanager
    def step(
        self, optimizer: Optimizer | Sequence[Optimizer] | None = None, number: int | None = None
    ) -> Iterator[None]:
        """Mark one step: a block with all its forward and backward passes and the update.

        Args:
            optimizer: makes the update inside the block; None if there is no update.
            number: of the step, from 1; None for the next.

        Raises:
            RuntimeError: if the probe follows an optimiser's steps by itself.
        """
        if self._optimizers:
            raise RuntimeError("this probe follows its optimiser's steps: make it without optimizer to use step()")
        self.flush()
        self.done = self.done if number is None else number - 1
        self._begin_if_due()
        handles = self._before_updates_of(_listed(optimizer))
        try:
            yield
            self._end()
        finally:
            self._close_step()
            for handle in handles:
                handle.remove()

    def look(self) -> None:
        """Probe the next step that begins, whatever its number."""
        self.asked = True

    def leave_out(self) -> None:
        """Record nothing of the step under way, as its update will not be made; the next step has its number."""
        self._close_step()
        self.done -= 1

    def gradients_ready(self) -> None:
        """Take the statistics of the weights' gradients now, before they are clipped.

        If it is not called, they are taken as the optimiser sees them.
        """
        if self._under_way is not None:
            self._under_way.parameters.gradients()

    def flush(self) -> None:
        """Write the row that is still on its way from the device."""
        if self._pending is None:
            return
        (number, sums), self._pending = self._pending, None
        self.latest = make_row(number, *sums.read(), self._watched.order, self._losses or processes())
        if rank() == 0 and self._write is not None:
            self._write(self.latest)

    def close(self) -> None:
        """Write the row that is still on its way, and let go of model and optimiser."""
        self._close_step()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.flush()

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_if_due(self) -> None:
        number = self.done + 1
        early = number == 1 or (self.early and number < self.every and number.bit_count() == 1)
        if self.every and (early or self.asked or number % self.every == 0):
            self.asked = False
            self._under_way = _Step(self._watched)
            self._under_way.recorder.open()
            # A loop may end just before a probed step and drop its probe without closing it.
            self._if_lost = weakref.finalize(self, self._under_way.recorder.close)

    def _before_updates_of(self, optimizers: Sequence[Optimizer]) -> list[RemovableHandle]:
        return [each.register_step_pre_hook(_eager(self._before_update)) for each in optimizers]

    def _before_update(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Sum gradients and weights now, or after the optimiser's closure has made the gradients."""
        step = self._under_way
        if step is None:
            return None
        optimizer, *others = args
        closure = others.pop(0) if others else kwargs.pop("closure", None)
        if closure is None:
            step.parameters.before_update()
            return None

        def closure_then_sums() -> Any:
            result = closure()
            step.parameters.before_update()
            return result

        return (optimizer, closure_then_sums, *others), kwargs

    def _after_update(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self._to_step.discard(optimizer)
        if not self._to_step:
            self._to_step = set(self._optimizers)
            self.flush()
            self._end()
            self._begin_if_due()

    def _end(self) -> None:
        """Count the step, and send its sums to the host if it was probed."""
        self.done += 1
        step = self._close_step()
        if step is None:
            return
        step.parameters.after_update()
        if self._met is None:
            self._warn_of_unseen_attention(step.sums)
        if self._met is None or processes() == 1:
            self._met = agreed(step.sums.sums), agreed(step.sums.maxima)
        # Keys that every process has, whatever it saw, then those that only some forward passes give.
        keys = list(dict.fromkeys([*step.recorder.keys(), *step.parameters.keys(), *self._met[0]]))
        self._pending = self.done, ReducedSums(step.sums, keys, self._met[1], self._watched.device)
        if self._pending[1].arrived:
            self.flush()

    def _close_step(self) -> "_Step | None":
        """Stop recording, and return the step that was under way."""
        step, self._under_way = self._under_way, None
        if step is not None:
            step.recorder.close()
            self._if_lost.detach()
        return step

    def _warn_of_unseen_attention(self, sums: StepSums) -> None:
        kinds = {type(module).__name__ for module in self._watched.names}
        attends = sorted(kind for kind in kinds if "attention" in kind.lower() or "attn" in kind.lower())
        if attends and rank() == 0 and not any(stat == "entropy" for _, stat in sums.sums):
            _log.warning(
                "no statistics of attention: %s does not call scaled_dot_product_attention (models of transformers do "
                'with attn_implementation="sdpa")',
                attends[0],
            )


class _Step:
    """A probed step under way: its sums, and the two that add to them."""

    def __init__(self, watched: WatchedModules) -> None:
        self.sums = StepSums()
        self.parameters = ParameterSums(watched.parameters, self.sums)
        self.recorder = Recorder(watched, self.sums)


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a hook out of compiled code, for an optimiser whose step is compiled."""
    return torch.compiler.disable(hook)


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())


def _writer(out: str | Path | Callable[[Row], None] | None) -> Callable[[Row], None] | None:
    if out is None or callable(out):
        return out
    file = Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    return partial(append_row, file)
