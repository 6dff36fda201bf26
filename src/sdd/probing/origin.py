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
    for stats, in_order in ((_FORWARD, True), (_BACKWARD, False), (_UPDATE, True)):
        gone = [
            (site, stat, how) for stat in stats for site in reading.sites if (how := _gone(reading, before, site, stat))
        ]
        if gone:
            farthest = max(abs(how) for *_, how in gone)
            order = {site: place for place, site in enumerate(reading.sites)}
            far = [entry for entry in gone if abs(entry[2]) >= farthest / 2]
            site, stat, how = (min if in_order else max)(far, key=lambda entry: order[entry[0]])
            return Origin(
                site, reading.step, f"{stat} there {math.exp(how):.3g} times its usual at step {reading.step}"
            )
    return None


def _gone(reading: Reading, before: Sequence[Reading], site: str, stat: str) -> float:
    """The logarithm of the factor by which a number has left its range; 0 if it has not."""
    now = _log(reading.sites[site].get(stat, math.nan))
    usual = [
        value for past in before[-_MOST:] if (value := _log(past.sites.get(site, {}).get(stat, math.nan))) is not None
    ]
    if now is None or len(usual) < _FEWEST:
        return 0.0
    median = statistics.median(usual)
    sigma = _SIGMA_PER_MAD * statistics.median(abs(value - median) for value in usual)
    how = now - median
    return how if abs(how) > max(_DEVIATIONS * sigma, _FACTOR) else 0.0


def _log(value: float) -> float | None:
    return math.log(value) if 0 < value < math.inf else None
