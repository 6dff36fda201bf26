"""Spikes and rises of the loss, from metrics.jsonl."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from sdd.probing.checks import Finding

#: Accepted steps that say what is usual, and how many of them are enough.
WINDOW, ENOUGH = 64, 16
#: Robust standard deviations of the noise from step to step above the median, and at least this share of it.
LOSS_MARGIN, LOSS_SHARE = 8.0, 0.02
#: Times the median. Clipping hides a factor of ten from the update; batches of odd text reach that in healthy runs.
GRADIENT_FACTOR = 20.0
#: Share of the lowest median of `RISE_WINDOW` losses so far, and robust standard deviations: what lies above has been
#: lost. The lowest of ten thousand medians is a good deal lower than the usual one.
RISE_SHARE, RISE_MARGIN, RISE_WINDOW = 0.05, 3.0, 32
_SIGMA_PER_MAD = 1.4826  # of a normal distribution
_EVENT_KINDS = {
    "nonfinite": "non-finite",
    "damaged weights": "damaged weights",
    "loss spike": "loss spike",
    "gradient spike": "gradient spike",
}
_DONE = {"observe": "taken all the same", "skip": "the batch was skipped", "roll back": "rolled back"}


class Losses:
    """What is usual of loss and gradient norm, and what is not.

    Spikes are judged as `sdd.train.guard` judges them; its events count too.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._usual = (math.nan, math.nan, math.nan)
        self._accepted = 0
        self._lowest = math.inf

    def update(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        """The findings of one row of metrics.jsonl, of a step or an event."""
        if "event" in row:
            yield from _event(row)
        elif "loss" in row:
            yield from self._step(_number(row["loss"]), _number(row.get("grad_norm")))

    @property
    def looks_at_rises(self) -> bool:
        """Whether the last step was one at which rises are looked for: every `RISE_WINDOW / 2`."""
        return self._accepted % (RISE_WINDOW // 2) == 0 and self._accepted >= RISE_WINDOW

    def _step(self, loss: float, norm: float) -> Iterator[Finding]:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            yield Finding("non-finite", "", math.inf, f"loss {loss:.4g}, gradient norm {norm:.4g}")
            return
        if len(self._losses) >= ENOUGH:
            yield from self._spikes(loss, norm)
        self._losses.append(loss)
        self._norms.append(norm)
        self._accepted += 1
        if self._accepted % (ENOUGH // 2) == 0:  # often enough, and cheap in a run of a million steps
            noise = statistics.median(abs(after - before) for before, after in pairwise(self._losses))
            sigma = _SIGMA_PER_MAD / math.sqrt(2) * noise
            self._usual = (statistics.median(self._losses), sigma, statistics.median(self._norms))
        if self.looks_at_rises:
            yield from self._rise()

    def _spikes(self, loss: float, norm: float) -> Iterator[Finding]:
        usual, sigma, usual_norm = self._usual
        margin = max(LOSS_MARGIN * sigma, LOSS_SHARE * usual)
        if loss - usual > margin > 0:
            yield Finding(
                "loss spike", "", (loss - usual) / margin, f"loss {loss:.4g}, lately {usual:.4g} ± {sigma:.2g}"
            )
        if norm > GRADIENT_FACTOR * usual_norm > 0:
            factor = norm / (GRADIENT_FACTOR * usual_norm)
            yield Finding("gradient spike", "", factor, f"gradient norm {norm:.3g}, lately {usual_norm:.3g}")

    def _rise(self) -> Iterator[Finding]:
        lately = statistics.median(list(self._losses)[-RISE_WINDOW:])
        margin = max(RISE_SHARE * abs(self._lowest), RISE_MARGIN * self._usual[1])
        if lately - self._lowest > margin:
            what = f"the median of {RISE_WINDOW} losses is {lately:.3f}, after {self._lowest:.3f}"
            yield Finding("rising loss", "", (lately - self._lowest) / margin, what)
        self._lowest = min(self._lowest, lately)


def _event(row: Mapping[str, Any]) -> Iterator[Finding]:
    kind = _EVENT_KINDS.get(str(row.get("kind")))
    if kind:
        done = _DONE.get(str(row["event"]), str(row["event"]))
        yield Finding(kind, "", math.inf, f"{row.get('what', '')}; {done}")  # pyright: ignore[reportArgumentType]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
