"""Spikes and rises of the loss, from metrics.jsonl."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from sdd.probing.checks import Finding
from sdd.probing.rows import number
from sdd.spikes import Usual

#: Accepted steps that say what is usual, and steps between two looks at that: it costs something in a run of a million.
WINDOW, REFRESH = 64, 8
#: Robust standard deviations, see `sdd.spikes`.
LOSS_MARGIN = 8.0
#: Times the median. Clipping hides a factor of ten from the update; batches of odd text reach that in healthy runs.
GRADIENT_FACTOR = 20.0
#: Share of the lowest median of `RISE_WINDOW` losses so far, and robust standard deviations: what lies above has been
#: lost. The lowest of ten thousand medians is a good deal lower than the usual one.
RISE_SHARE, RISE_MARGIN, RISE_WINDOW = 0.05, 3.0, 32
_EVENT_KINDS = {
    "nonfinite": "non-finite",
    "damaged weights": "damaged weights",
    "loss spike": "loss spike",
    "gradient spike": "gradient spike",
}
_DONE = {"observe": "taken all the same", "skip": "the batch was skipped", "roll back": "rolled back"}


class Losses:
    """What is usual of loss and gradient norm, and what is not.

    Spikes are judged as the guard of `sdd train` judges them; its events count too.
    """

    def __init__(self) -> None:
        self._usual = Usual(WINDOW, REFRESH)
        self._lowest = math.inf

    def update(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        """The findings of one row of metrics.jsonl, of a step or an event."""
        if "event" in row:
            yield from _event(row)
        elif "loss" in row:
            yield from self._step(number(row["loss"]), number(row.get("grad_norm")))

    @property
    def looks_at_rises(self) -> bool:
        """Whether the last step was one at which rises are looked for: every `RISE_WINDOW / 2`."""
        return self._usual.accepted % (RISE_WINDOW // 2) == 0 and self._usual.accepted >= RISE_WINDOW

    def _step(self, loss: float, norm: float) -> Iterator[Finding]:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            yield Finding("non-finite", "", math.inf, f"loss {loss:.4g}, gradient norm {norm:.4g}")
            return
        if spike := self._usual.loss_spike(loss, LOSS_MARGIN):
            yield Finding("loss spike", "", *spike)
        if spike := self._usual.gradient_spike(norm, GRADIENT_FACTOR):
            yield Finding("gradient spike", "", *spike)
        self._usual.accept(loss, norm)
        if self.looks_at_rises:
            yield from self._rise()

    def _rise(self) -> Iterator[Finding]:
        lately = statistics.median(list(self._usual.losses)[-RISE_WINDOW:])
        margin = max(RISE_SHARE * abs(self._lowest), RISE_MARGIN * self._usual.sigma)
        if lately - self._lowest > margin:
            what = f"the median of {RISE_WINDOW} losses is {lately:.3f}, after {self._lowest:.3f}"
            yield Finding("rising loss", "", (lately - self._lowest) / margin, what)
        self._lowest = min(self._lowest, lately)


def _event(row: Mapping[str, Any]) -> Iterator[Finding]:
    kind = _EVENT_KINDS.get(str(row.get("kind")))
    if kind:
        done = _DONE.get(str(row["event"]), str(row["event"]))
        yield Finding(kind, "", math.inf, f"{row.get('what', '')}; {done}")  # pyright: ignore[reportArgumentType]
