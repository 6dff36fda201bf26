"""What is looked at in a row of probe.jsonl, against which threshold, and why that one.

A check takes a `Reading` and the readings before it, and gives `Finding`s. It keeps nothing.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal[
    "non-finite",
    "damaged weights",
    "exploding gradients",
    "fading gradients",
    "rising loss",
    "loss spike",
    "gradient spike",
    "attention logits",
    "dead alpha",
    "eps",
    "large updates",
    "stuck weights",
    "dead experts",
    "saturated router",
]

#: Of the stream's gradient from one end to the other. In healthy runs of every placement it stays within 1/75 to 7.
#: Beyond a thousand, Adam still scales what is left, but it is the rounding of what came before: bfloat16 has 8 bits.
GRADIENT_RANGE = 1e3
#: Of eps in the mean square under a norm: beyond it the norm no longer gives unit rms, to more than half a percent.
EPS_SHARE = 0.01
#: Softmax of logits that differ by so much is an argmax; bfloat16 rounds them to halves. arXiv 2507.20534 clips here.
LOGIT_MAX = 100.0
#: At a steady height, large logits are a habit of many models (attention sinks). Those that hurt keep growing.
LOGIT_GROWTH = 1.1
#: Of the first entropy: below, each query attends to one key (arXiv 2303.06296 calls it entropy collapse).
ENTROPY_SHARE = 0.05
#: Of the norm that alpha had at first or lately: below, the site adds nothing any more.
ALPHA_SHARE = 0.01
#: ||dW|| / ||W||: a third of a matrix replaced in one step. Healthy runs, with warm-up, stay below a tenth.
UPDATE_RATIO = 0.3
#: Of the angle by which the liveliest tenth of the matrices turn: below, a matrix does not learn.
TURN_SHARE = 1e-3

#: How many times beyond its threshold a finding is far beyond it, and counts twice.
FAR: Mapping[Kind, float] = MappingProxyType(
    {
        "exploding gradients": 10,
        "fading gradients": 10,
        "rising loss": 4,
        "loss spike": 2,
        "gradient spike": 5,
        "attention logits": 10,
        "dead alpha": 10,
        "eps": 10,
        "large updates": 3,
        "stuck weights": 10,
        "dead experts": 4,
        "saturated router": 4,
    }
)

_EARLIER = 8  # readings that a trend looks back
_BLOCK = re.compile(r"^((?:.*?\.)?(\d+))(?:\.|$)")
_SUSPECT = ("weight_norm", "alpha_norm", "rms", "logit_max", "grad_rms", "weight_grad_rms", "alpha_grad_rms")


@dataclass(frozen=True)
class Finding:
    """A threshold passed at one place in one step.

    Attributes:
        kind: which.
        site: where: a site, a block's name, or "" for the whole model.
        factor: how many times beyond the threshold, at least 1.
        what: the numbers.
        since: the step in which it began, where that is an earlier one.
    """

    kind: Kind
    site: str
    factor: float
    what: str
    since: int | None = None

    @property
    def points(self) -> int:
        """1, or 2 where it is far beyond the threshold; 3 where there is nothing to doubt."""
        if self.kind in ("non-finite", "damaged weights"):
            return 3
        return 2 if self.factor >= FAR.get(self.kind, 1) else 1


class Reading:
    """A row of probe.jsonl in numbers.

    Args:
        row: the row; numbers that are not finite may be strings.

    Attributes:
        step: its number.
        sites: statistics by site, in the model's order.
        layers: statistics of the residual stream.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.step = int(row["step"])
        self.sites: dict[str, dict[str, float]] = {
            site: {stat: float(value) for stat, value in values.items()} for site, values in row["sites"].items()
        }
        self.layers: dict[str, list[float]] = {stat: [float(v) for v in vs] for stat, vs in row["layers"].items()}

    def of(self, stat: str) -> dict[str, float]:
        """One statistic by site."""
        return {site: values[stat] for site, values in self.sites.items() if stat in values}

    @cached_property
    def pull(self) -> list[float]:
        """Root mean square times gradient's of the residual stream, from the first layer that has a gradient on.

        It does not change when the stream is scaled, so that layers can be compared.
        """
        gradients = self.layers.get("grad_rms", [])
        rms = self.layers.get("rms", [])
        return [x * g for x, g in zip(rms[len(rms) - len(gradients) :], gradients, strict=True)]

    def block(self, index: int) -> str:
        """The name of block `index` as the sites have it."""
        stem = next((match[1] for site in self.sites if (match := _BLOCK.match(site))), "block 0")
        return re.sub(r"\d+$", str(index), stem)


def layer_of(site: str) -> int | None:
    """The block that a site is in, from 0; None if it is in none."""
    match = _BLOCK.match(site)
    return int(match[2]) if match else None


def non_finite(reading: Reading, _: Sequence[Reading]) -> Iterator[Finding]:
    """Numbers that are none. What went forward comes first in the model's order, what went back last."""
    for stat in _SUSPECT:
        bad = [site for site, value in reading.of(stat).items() if not math.isfinite(value)]
        if bad:
            order = reversed(bad) if "grad" in stat else bad
            yield from (Finding("non-finite", site, math.inf, f"{stat} is not finite") for site in order)
            return


def gradients(reading: Reading, _: Sequence[Reading]) -> Iterator[Finding]:
    """The residual stream's gradient, on its way from the last block down to the first."""
    pull, top = reading.pull, reading.pull[-1] if reading.pull else 0.0
    if len(pull) < 2 or not (all(map(math.isfinite, pull)) and top > 0):
        return
    first = len(reading.layers["rms"]) - len(pull)
    steps = [_ratio(below, above) for below, above in pairwise(pull)]
    for kind, extreme in (("fading gradients", min), ("exploding gradients", max)):
        total = extreme(pull) / top
        factor = (_ratio(1, total) if extreme is min else total) / GRADIENT_RANGE
        if factor < 1:
            continue
        culprit, at = steps.index(extreme(steps)), pull.index(extreme(pull))
        place = "what block 0 reads" if first + at == 0 else f"the output of block {first + at - 1}"
        yield Finding(
            kind,  # pyright: ignore[reportArgumentType]
            reading.block(first + culprit),
            factor,
            f"block {first + culprit} passes down {steps[culprit]:.2g} times the gradient that it gets; "
            f"at {place} there is {total:.2g} times the last block's",
        )


def eps_share(reading: Reading, _: Sequence[Reading]) -> Iterator[Finding]:
    """What share eps has in the mean square that it is added to; a row of zeros, as of padding, makes it infinite."""
    for site, share in reading.of("eps_ratio").items():
        if EPS_SHARE < share < math.inf:
            yield Finding("eps", site, share / EPS_SHARE, f"eps is {share:.2g} of the mean square")


def attention(reading: Reading, before: Sequence[Reading]) -> Iterator[Finding]:
    """Attention logits that are large and grow, or attention that has settled on single keys."""
    for site, logit in reading.of("logit_max").items():
        earlier = [value for value in _past(before, site, "logit_max") if math.isfinite(value)]
        grows = len(earlier) >= 2 and logit > LOGIT_GROWTH * statistics.median(earlier)
        if LOGIT_MAX < logit < math.inf and (grows or logit > LOGIT_MAX * FAR["attention logits"]):
            since = f", {statistics.median(earlier):.3g} lately" if earlier else ""
            yield Finding("attention logits", site, logit / LOGIT_MAX, f"largest logit {logit:.3g}{since}")
            continue
        entropy = reading.sites[site].get("entropy", math.nan)
        first = before[0].sites.get(site, {}).get("entropy", math.nan) if before else math.nan
        if entropy < ENTROPY_SHARE * first:
            factor = _ratio(ENTROPY_SHARE * first, entropy)
            yield Finding("attention logits", site, factor, f"entropy {entropy:.2g} nats, {first:.3g} at first")


def dead_alpha(reading: Reading, before: Sequence[Reading]) -> Iterator[Finding]:
    """Scales that have shrunk to nothing, or that no gradient reaches."""
    for site, norm in reading.of("alpha_norm").items():
        largest = max((past.sites.get(site, {}).get("alpha_norm", 0.0) for past in before), default=0.0)
        if norm < ALPHA_SHARE * largest:
            factor = _ratio(ALPHA_SHARE * largest, norm)
            yield Finding("dead alpha", site, factor, f"norm {norm:.2g}, was {largest:.3g}")
        elif reading.sites[site].get("alpha_grad_rms") == 0:
            yield Finding("dead alpha", site, 1, "its gradient is zero")


def updates(reading: Reading, _: Sequence[Reading]) -> Iterator[Finding]:
    """Matrices that a step all but replaces, and matrices that it leaves as they are."""
    for site, ratio in reading.of("update_ratio").items():
        if UPDATE_RATIO < ratio < math.inf:
            yield Finding("large updates", site, ratio / UPDATE_RATIO, f"one step changes it by {ratio:.0%}")
    angles = {site: angle for site, angle in reading.of("angle").items() if math.isfinite(angle)}
    if len(angles) < 2:
        return
    lively = statistics.quantiles(angles.values(), n=10, method="inclusive")[-1]
    for site, angle in angles.items():
        if angle < TURN_SHARE * lively:
            factor = _ratio(TURN_SHARE * lively, angle)
            yield Finding("stuck weights", site, factor, f"turns by {angle:.1g} rad a step, others by {lively:.1g}")


Check = Callable[[Reading, Sequence[Reading]], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (non_finite, gradients, eps_share, attention, dead_alpha, updates)


def _past(before: Sequence[Reading], site: str, stat: str) -> list[float]:
    return [past.sites[site][stat] for past in before[-_EARLIER:] if stat in past.sites.get(site, {})]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.inf
