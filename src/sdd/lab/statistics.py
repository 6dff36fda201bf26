"""Numbers over seeds: means and ratios with intervals, and learning-rate sensitivity. Needs the extra `report`.

Every interval is at 95% and treats seeds as draws. Methods that saw the same data in the same order are compared seed
by seed, so that the effect of a seed on both cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A number and its interval.

    Attributes:
        value: the estimate; nan if there is nothing to estimate from.
        low, high: its 95% interval; nan with fewer than two seeds.
        n: number of seeds.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width; nan with fewer than two seeds."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether the interval exists and does not hold `value`."""
        return self.low > value or self.high < value


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval, `mean +- t(n - 1) * s / sqrt(n)`.

    Args:
        values: one for each seed, finite.
    """
    n = len(values)
    if n < 2:
        return Estimate(values[0] if n else math.nan, math.nan, math.nan, n)
    from scipy.stats import t

    mean = float(np.mean(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """Mean of `first - second` over the seeds that both have, with its t interval.

    Args:
        first: by seed; seeds with a value that is not finite, here or there, are left out.
        second: by seed, as well.
    """
    return mean_interval([first[seed] - second[seed] for seed in _shared(first, second)])


def mean_factor(factors: Sequence[float]) -> Estimate:
    """Geometric mean of positive factors, one for each seed, with the t interval of the mean of their logarithms."""
    logs = mean_interval([math.log(factor) for factor in factors])
    return Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high), logs.n)


def bootstrap_factor(factors: Sequence[float]) -> Estimate:
    """Geometric mean of positive factors, one for each seed, with a percentile bootstrap over seeds.

    With three seeds there are only ten different resamples, and the interval is about the range of the three.
    `mean_factor` allows for so few seeds and is wider.
    """
    n = len(factors)
    if n < 2:
        return Estimate(factors[0] if n else math.nan, math.nan, math.nan, n)
    draws = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    logs = np.log(np.asarray(factors))
    low, high = np.quantile(logs[draws].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(math.exp(logs.mean()), math.exp(low), math.exp(high), n)


def lr_sensitivity(final: Sequence[float], initial: float) -> float:
    """Mean over the learning rates of `min(final loss, initial loss) - best final loss` (arXiv 2309.14322, section 2).

    Rates spaced evenly in their logarithm make the mean an expectation over the range. A run that diverged counts with
    the initial loss.

    Args:
        final: the loss at the end, one for each learning rate; nan or infinite if it diverged.
        initial: the loss before training.
    """
    losses = np.array([min(loss, initial) if math.isfinite(loss) else initial for loss in final])
    return float(np.mean(losses - losses.min()))


def first_reach(x: Sequence[float], loss: Sequence[float], target: float) -> float:
    """Where a curve first comes down to `target`, linear between its points.

    Args:
        x: tokens or seconds, rising.
        loss: the held-out loss there.
        target: a loss.

    Returns:
        nan if it never does; x[0] if it begins there.
    """
    below = [index for index, value in enumerate(loss) if value <= target]
    if not below:
        return math.nan
    after = below[0]
    if after == 0:
        return float(x[0])
    before = after - 1
    if not math.isfinite(loss[before]):
        return float(x[after])
    share = (loss[before] - target) / (loss[before] - loss[after])
    return float(x[before] + share * (x[after] - x[before]))


def _shared(first: Mapping[int, float], second: Mapping[int, float]) -> list[int]:
    both = sorted(first.keys() & second.keys())
    return [seed for seed in both if math.isfinite(first[seed]) and math.isfinite(second[seed])]
