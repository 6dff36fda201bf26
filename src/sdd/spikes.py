"""Spikes of loss and gradient norm compared with recent steps, for the guard and the alarms."""

import math
import statistics
from collections import deque
from itertools import pairwise
from typing import NamedTuple

#: Nothing is judged before this many accepted steps.
ENOUGH = 16
#: A loss spike exceeds the median loss by at least this share of it.
LOSS_SHARE = 0.02
_SIGMA_PER_MAD = 1.4826  # of a normal distribution


class Spike(NamedTuple):
    """How far a loss or gradient norm is beyond its threshold.

    Attributes:
        factor: the excess over the usual value, as a multiple of the threshold; above 1.
        what: the numbers, for people.
    """

    factor: float
    what: str


class Usual:
    """The usual loss and gradient norm: medians over the last `window` accepted steps.

    A loss is a spike if it exceeds the median loss by more than `margin` robust standard deviations and by more than
    2% of the median. A gradient norm is a spike if it exceeds `factor` times the median norm. Neither is judged before
    16 steps were accepted. The standard deviation is that of the noise from step to step, `1.4826 / sqrt(2)` times the
    median absolute difference of successive losses, so that a falling loss does not add to it.

    Args:
        window: how many accepted steps count.
        refresh: accepted steps between two computations of the medians.

    Attributes:
        losses, norms: the values of those steps.
        accepted: steps so far.
        sigma: the standard deviation, nan before there are enough.
    """

    def __init__(self, window: int, refresh: int = 1) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.accepted = 0
        self.sigma = math.nan
        self._loss = self._norm = math.nan
        self._refresh = refresh

    def accept(self, loss: float, norm: float) -> None:
        """Take in a step with finite numbers."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.accepted += 1
        if self.accepted >= ENOUGH and self.accepted % self._refresh == 0:
            differences = [abs(after - before) for before, after in pairwise(self.losses)]
            self.sigma = _SIGMA_PER_MAD / math.sqrt(2) * statistics.median(differences)
            self._loss, self._norm = statistics.median(self.losses), statistics.median(self.norms)

    def loss_spike(self, loss: float, margin: float) -> Spike | None:
        """The spike of a loss in nats a token, or None."""
        threshold = max(margin * self.sigma, LOSS_SHARE * self._loss)
        if not loss - self._loss > threshold > 0:
            return None
        return Spike((loss - self._loss) / threshold, f"loss {loss:.4g}, lately {self._loss:.4g} ± {self.sigma:.2g}")

    def gradient_spike(self, norm: float, factor: float) -> Spike | None:
        """The spike of a gradient norm before clipping, or None."""
        if not norm > factor * self._norm > 0:
            return None
        return Spike(norm / (factor * self._norm), f"gradient norm {norm:.4g}, lately {self._norm:.4g}")
