"""Checks of the rows of metrics.jsonl, one after the other: loss, gradient norm, and the routers of experts."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from sdd.files import number
from sdd.probing.checks import KINDS, CheckResult, Kind
from sdd.spikes import Usual

#: Accepted steps that say what is usual, and steps between two updates of it, which cost something in long runs.
WINDOW, REFRESH = 64, 8
#: Robust standard deviations, see `sdd.spikes`.
LOSS_MARGIN = 8.0
#: Times the median. Clipping hides a factor of ten from the update; batches of odd text reach that in healthy runs.
GRADIENT_FACTOR = 20.0
#: The loss has risen if the median of `RISE_WINDOW` losses is above the lowest such median so far by this share of it
#: and by this many robust standard deviations. The lowest of ten thousand medians is a good deal below the usual one.
RISE_SHARE, RISE_MARGIN, RISE_WINDOW = 0.05, 3.0, 32
#: Steps between two looks at the routers.
LOOK = 16
#: Steps in a row. While the learning rate warms up, blocks of healthy `moe-nano` runs are without some expert for up to
#: 80 steps, until the load balancing loss has its effect; a batch of few tokens leaves one out now and then.
DEAD_STEPS = 128
#: The share of the highest entropy so far, and steps in a row. Below, one expert has nearly all weight whatever k is,
#: and the gradient that could change the choice is gone. Healthy `moe-nano` runs stay above 40%.
ROUTER_ENTROPY_SHARE, SATURATED_STEPS = 0.05, 32

_STEPS: Mapping[Kind, int] = {"dead experts": DEAD_STEPS, "saturated router": SATURATED_STEPS}
_ACTIONS = {"observe": "used for training", "skip": "the batch was skipped", "roll back": "rolled back"}


class LossChecks:
    """Spikes and rises of the loss, and spikes of the gradient norm.

    Spikes are judged as the guard of `sdd train` judges them; the guard's events count too.
    """

    def __init__(self) -> None:
        self._usual = Usual(WINDOW, REFRESH)
        self._lowest = math.inf

    def update(self, row: Mapping[str, Any]) -> Iterator[CheckResult]:
        """Yield the results of one row, of a step or an event."""
        if "event" in row:
            yield from _event(row)
        elif "loss" in row:
            yield from self._step(number(row["loss"]), number(row.get("grad_norm")))

    @property
    def looks_at_rises(self) -> bool:
        """Whether rises were looked for at the last step: every `RISE_WINDOW / 2`."""
        return self._usual.accepted % (RISE_WINDOW // 2) == 0 and self._usual.accepted >= RISE_WINDOW

    def _step(self, loss: float, norm: float) -> Iterator[CheckResult]:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            yield CheckResult("non-finite", "", math.inf, f"loss {loss:.4g}, gradient norm {norm:.4g}")
            return
        if spike := self._usual.loss_spike(loss, LOSS_MARGIN):
            yield CheckResult("loss spike", "", spike.factor, spike.what)
        if spike := self._usual.gradient_spike(norm, GRADIENT_FACTOR):
            yield CheckResult("gradient spike", "", spike.factor, spike.what)
        self._usual.accept(loss, norm)
        if self.looks_at_rises:
            yield from self._rise()

    def _rise(self) -> Iterator[CheckResult]:
        median = statistics.median(list(self._usual.losses)[-RISE_WINDOW:])
        margin = max(RISE_SHARE * abs(self._lowest), RISE_MARGIN * self._usual.sigma)
        if median - self._lowest > margin:
            what = f"the median of {RISE_WINDOW} losses is {median:.3f}, after {self._lowest:.3f}"
            yield CheckResult("rising loss", "", (median - self._lowest) / margin, what)
        self._lowest = min(self._lowest, median)


class RouterChecks:
    """Blocks whose router has left experts out, or has had next to no entropy, for many steps in a row."""

    def __init__(self) -> None:
        self._steps = 0
        self._highest: dict[int, float] = {}
        self._streaks: dict[tuple[Kind, int], tuple[int, int]] = {}  # the first step, and the number of steps

    def update(self, row: Mapping[str, Any]) -> Iterator[CheckResult]:
        """Yield the results of one row; none between two looks, nor for a dense model."""
        routing = row.get("routing")
        if not isinstance(routing, Mapping):
            return
        self._steps += 1
        step = int(row["step"])
        for layer, dead in enumerate(map(number, routing.get("dead_experts", ()))):
            yield from self._see("dead experts", layer, step, dead, f"experts without tokens: {dead:g}")
        for layer, entropy in enumerate(map(number, routing.get("entropy", ()))):
            highest = self._highest[layer] = max(entropy, self._highest.get(layer, 0.0))
            threshold = ROUTER_ENTROPY_SHARE * highest
            factor = threshold / entropy if entropy else math.inf if threshold else 0.0  # a single expert always has 0
            what = f"entropy {entropy:.2g} nats ({highest:.3g} at its highest)"
            yield from self._see("saturated router", layer, step, factor, what)

    @property
    def looks(self) -> bool:
        """Whether the routers were looked at after the last step."""
        return self._steps > 0 and self._steps % LOOK == 0

    def _see(self, kind: Kind, layer: int, step: int, factor: float, what: str) -> Iterator[CheckResult]:
        since, count = self._streaks.get((kind, layer), (step, 0))
        self._streaks[kind, layer] = (since, count + 1)
        if not factor >= 1:
            del self._streaks[kind, layer]
        elif self.looks and count + 1 >= _STEPS[kind]:
            lasting = f"{what} at step {step}, and for {count + 1} steps in a row"
            yield CheckResult(kind, f"blocks.{layer}.ffn.router", factor, lasting, since)


def _event(row: Mapping[str, Any]) -> Iterator[CheckResult]:
    """The result of an action of the guard, as metrics.jsonl records it."""
    kind: Any = str(row.get("kind")).replace("nonfinite", "non-finite")
    if kind in KINDS:
        action = _ACTIONS.get(str(row["event"]), str(row["event"]))
        yield CheckResult(kind, "", math.inf, f"{row.get('what', '')}; {action}")
