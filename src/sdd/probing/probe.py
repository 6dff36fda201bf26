"""`sdd.Probe`: statistics of training, site by site, every few steps."""

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

from sdd.probing.recorder import Recorder
from sdd.probing.rows import Row, append_row
from sdd.probing.sites import Sites
from sdd.probing.summary import make_row
from sdd.probing.tally import Key, Packed, Tally, agreed, processes, rank
from sdd.probing.weights import Weights

_log = logging.getLogger(__name__)


class Probe:
    """Records what happens in a model while it trains, at the first step and every few steps after it.

    One line attaches it to any loop; it follows the optimiser's steps:

        probe = sdd.Probe(model, optimizer, out="probe.jsonl")

    A loop that says itself where a step begins and ends leaves the optimiser out, and has the gradients' statistics
    taken before they are clipped:

        probe = sdd.Probe(model, out="probe.jsonl")
        for batch in data:
            with probe.step(optimizer):
                model(batch).backward()
                probe.gradients_ready()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    What is recorded, and its formulas: `sdd.probing.STATISTICS`. A probed step computes what any other step does; only
    what is compiled with torch.compile runs eagerly in it, in the whole process, and what our models fuse or leave out
    (`ModelConfig.eliminate_norms`, kernels on a GPU) is computed norm by norm: both round differently.
    Recorded are forward passes that gradients are kept for; with reentrant activation checkpointing, which keeps none,
    the blocks are not seen. Of several microbatches all count. Of several processes all must have a probe: sums are
    reduced over them, and gradients by outputs are those of the mean of their losses.

    Args:
        model: any module, in its final form: converted, sharded, wrapped, compiled.
        optimizer: whose steps to follow, one or several that step in turn; None to delimit steps by `step`.
        every: steps between probed ones: the first is probed, and each whose number it divides; 0 for none.
        out: a file to append rows to, or a function that takes each row; see `sdd.probing.rows`. Only the first of
            several processes writes. On a GPU a row is written at the next step, when it has arrived.
        done: steps done before, in a loop that goes on.
        early: probe steps 2, 4, 8, ... below `every` too, since what breaks often breaks early; `sdd train` does.

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
    ) -> None:
        if every < 0 or done < 0:
            raise ValueError(f"every={every} and done={done} must not be negative")
        self.every, self.done, self.early = every, done, early
        self.latest: Row | None = None
        self._sites = Sites(model)
        self._order = self._sites.order()
        self._write = _writer(out)
        self._met: tuple[list[Key], list[Key]] | None = None
        self._pending: tuple[int, Packed] | None = None
        self._under_way: _Step | None = None
        self.asked = False
        self._optimizers = _listed(optimizer)
        self._to_step = set(self._optimizers)
        self._handles = [each.register_step_pre_hook(_eager(self._before_update)) for each in self._optimizers]
        self._handles += [each.register_step_post_hook(_eager(self._after_update)) for each in self._optimizers]
        if self._optimizers:
            self._begin_if_due()

    @contextmanager
    def step(
        self, optimizer: Optimizer | Sequence[Optimizer] | None = None, number: int | None = None
    ) -> Iterator[None]:
        """One step: every forward and backward pass of it, and the update.

        Args:
            optimizer: who makes the update inside the block; None if there is none.
            number: of the step, from 1; None for the next.

        Raises:
            RuntimeError: if the probe follows an optimiser's steps by itself.
        """
        if self._optimizers:
            raise RuntimeError("this probe follows its optimiser's steps: make it without optimizer to use step()")
        self.flush()
        self.done = self.done if number is None else number - 1
        self._begin_if_due()
        handles = [each.register_step_pre_hook(_eager(self._before_update)) for each in _listed(optimizer)]
        try:
            yield
            self._end()
        finally:
            self._close_step()
            for handle in handles:
                handle.remove()

    def look(self) -> None:
        """Probe the next step that begins, whatever its number: something has happened."""
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
            self._under_way.weights.gradients()

    def flush(self) -> None:
        """Write what is still on its way."""
        if self._pending is None:
            return
        (number, packed), self._pending = self._pending, None
        self.latest = make_row(number, *packed.read(), self._order, processes())
        if rank() == 0 and self._write is not None:
            self._write(self.latest)

    def close(self) -> None:
        """Write what is still on its way and let go of model and optimiser."""
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
            self._under_way = _Step(self._sites)
            self._under_way.recorder.open()
            # a loop that ends just before a probed step, and lets go of its probe without closing it
            self._if_lost = weakref.finalize(self, self._under_way.recorder.close)

    def _before_update(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at gradients and weights now, or after the closure that makes the gradients."""
        step = self._under_way
        if step is None:
            return None
        optimizer, *others = args
        closure = others.pop(0) if others else kwargs.pop("closure", None)
        if closure is None:
            step.weights.before_update()
            return None

        def then() -> Any:
            result = closure()
            step.weights.before_update()
            return result

        return (optimizer, then, *others), kwargs

    def _after_update(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self._to_step.discard(optimizer)
        if not self._to_step:
            self._to_step = set(self._optimizers)
            self.flush()
            self._end()
            self._begin_if_due()

    def _end(self) -> None:
        """The step is over: sum up if it was probed."""
        self.done += 1
        step = self._close_step()
        if step is None:
            return
        step.weights.after_update()
        if self._met is None:
            self._say_what_is_missing(step.tally)
        if self._met is None or processes() == 1:
            self._met = agreed(step.tally.sums), agreed(step.tally.maxima)
        sums = list(dict.fromkeys([*step.keys(), *self._met[0]]))
        self._pending = self.done, Packed(step.tally, sums, self._met[1], self._sites.device)
        if self._pending[1].arrived:
            self.flush()

    def _close_step(self) -> "_Step | None":
        """Record no more, and give back the step that was under way."""
        step, self._under_way = self._under_way, None
        if step is not None:
            step.recorder.close()
            self._if_lost.detach()
        return step

    def _say_what_is_missing(self, tally: Tally) -> None:
        kinds = {type(module).__name__ for module in self._sites.names}
        attends = sorted(kind for kind in kinds if "attention" in kind.lower() or "attn" in kind.lower())
        if attends and rank() == 0 and not any(stat == "entropy" for _, stat in tally.sums):
            _log.warning(
                "no statistics of attention: %s does not call scaled_dot_product_attention (models of transformers do "
                'with attn_implementation="sdpa")',
                attends[0],
            )


class _Step:
    """A probed step under way."""

    def __init__(self, sites: Sites) -> None:
        self.tally = Tally()
        self.weights = Weights(sites.parameters, self.tally)
        self.recorder = Recorder(sites, self.tally)

    def keys(self) -> list[Key]:
        """The keys of the sums that every process has, whatever it saw."""
        return self.recorder.keys() + self.weights.keys()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of an optimiser whose step may be compiled."""
    return torch.compiler.disable(hook)


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())


def _writer(out: str | Path | Callable[[Row], None] | None) -> Callable[[Row], None] | None:
    if out is None or callable(out):
        return out
    file = Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    return partial(append_row, file)
