"""Where a spike began: the site whose numbers left their usual range first."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sdd.probing.checks import Reading

#: Readings that make what is usual, at least and at most.
_FEWEST, _MOST = 3, 8
#: A number has left its range beyond this many robust standard deviations of its logarithm and a factor of two.
_DEVIATIONS = 6.0
_FACTOR = math.log(2)
_SIGMA_PER_MAD = 1.4826  # of a normal distribution
#: What goes forward, then what goes back, then what the optimiser makes of it.
_FORWARD = ("rms", "logit_max")
_BACKWARD = ("grad_rms", "weight_grad_rms")
_UPDATE = ("update_ratio",)


@dataclass(frozen=True)
class Origin:
    """Where numbers first left their range.

    Attributes:
        site: its name.
        step: the probed step.
        what: the numbers.
    """

    site: str
    step: int
    what: str


def origin(reading: Reading, before: Sequence[Reading]) -> Origin | None:
    """The site at which a reading first leaves what was usual; None if it does not, or too little is known.

    Of those that left it by at least the square root of the largest factor, it is the first in the model's order if
    what goes forward left it (outputs and attention logits), else the last, as gradients come from behind.

    Args:
        reading: the step to look at.
        before: what is usual.
    """
    if len(before) < _FEWEST:
        return None
    order = list(reading.sites)
    for stats, in_order in ((_FORWARD, True), (_BACKWARD, False), (_UPDATE, True)):
        gone = [(site, stat, how) for stat in stats for site, how in _gone(reading, before, stat).items()]
        if gone:
            farthest = max(abs(how) for *_, how in gone)
            far = [entry for entry in gone if abs(entry[2]) >= farthest / 2]
            site, stat, how = (min if in_order else max)(far, key=lambda entry: order.index(entry[0]))
            what = f"{stat} there was {math.exp(how):.3g} times its usual at step {reading.step}"
            return Origin(site, reading.step, what)
    return None


def _gone(reading: Reading, before: Sequence[Reading], stat: str) -> dict[str, float]:
    """The sites at which a statistic has left its range, with the logarithm of the factor by which it has.

    What three quarters of the sites do together is the course of training (warm-up, decay), and is taken off.
    """
    past = [{site: math.log(x) for site, x in each.of(stat).items() if 0 < x < math.inf} for each in before[-_MOST:]]
    away: dict[str, tuple[float, float]] = {}
    for site, value in reading.of(stat).items():
        usual = [each[site] for each in past if site in each]
        if 0 < value < math.inf and len(usual) >= _FEWEST:
            median = statistics.median(usual)
            sigma = _SIGMA_PER_MAD * statistics.median(abs(each - median) for each in usual)
            away[site] = math.log(value) - median, sigma
    common = sorted(abs(how) for how, _ in away.values())[len(away) // 4] if away else 0.0
    return {site: how for site, (how, sigma) in away.items() if abs(how) - common > max(_DEVIATIONS * sigma, _FACTOR)}
