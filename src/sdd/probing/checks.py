"""Checks of a row of probe.jsonl: each threshold, why it has that value, and the place where a spike began.

A check takes a `Reading` and the readings before it, and yields `CheckResult`s. It keeps no state.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

# Kinds of alarms, by the rows in which they are looked for.
StepKind = Literal["non-finite", "damaged weights", "loss spike", "gradient spike"]
RouterKind = Literal["dead experts", "saturated router"]
ProbeKind = Literal[
    "exploding gradients", "fading gradients", "attention logits", "dead alpha", "eps", "large updates", "stuck weights"
]
Kind = Literal[StepKind, "rising loss", RouterKind, ProbeKind]


class KindInfo(NamedTuple):
    """A kind of alarm: its title for people, and how many times beyond its threshold a result counts twice."""

    title: str
    far: float


KINDS: Mapping[Kind, KindInfo] = {
    "non-finite": KindInfo("Numbers are not finite", 1),
    "damaged weights": KindInfo("Weights are damaged", 1),
    "exploding gradients": KindInfo("Gradients explode on their way down", 10),
    "fading gradients": KindInfo("Gradients fade on their way down", 10),
    "rising loss": KindInfo("The loss rises", 4),
    "loss spike": KindInfo("The loss spikes", 2),
    "gradient spike": KindInfo("The gradient norm spikes", 5),
    "attention logits": KindInfo("Attention saturates", 10),
    "dead alpha": KindInfo("An alpha is dead", 10),
    "eps": KindInfo("eps bends a norm", 10),
    "large updates": KindInfo("Updates are very large", 3),
    "stuck weights": KindInfo("Matrices are stuck", 10),
    "dead experts": KindInfo("Experts get no tokens", 4),
    "saturated router": KindInfo("A router saturates", 4),
}

#: The factor between the stream's gradient at two depths. In healthy runs of every placement it stays within 1/75 to 7.
#: Beyond a thousand, Adam still scales the gradient up, but it is rounding noise by then: bfloat16 has 8 bits.
GRADIENT_RANGE = 1e3
#: The share of eps in the mean square under a norm. Beyond it the norm is off unit rms by more than half a percent.
EPS_SHARE = 0.01
#: Softmax of logits that differ by so much is an argmax; bfloat16 rounds them to halves. arXiv 2507.20534 clips here.
LOGIT_MAX = 100.0
#: Many models keep large logits at a steady height (attention sinks). Those that hurt keep growing.
LOGIT_GROWTH = 1.1
#: The share of the first entropy below which each query attends to one key (arXiv 2303.06296: entropy collapse).
ENTROPY_SHARE = 0.05
#: The share of alpha's largest norm lately or at first, below which the layer no longer adds anything.
ALPHA_SHARE = 0.01
#: The update ratio ||dW|| / ||W||: a third of a matrix replaced in a step. Healthy runs, with warm-up, stay below 0.1.
UPDATE_RATIO = 0.3
#: The share of the angle of the fastest-turning tenth of the matrices, below which a matrix does not learn.
TURN_SHARE = 1e-3

#: Readings that a trend or a usual range looks back, and the fewest from which a range is known.
_EARLIER, _FEWEST = 8, 3
#: A number has left its range beyond this many robust standard deviations of its logarithm and a factor of two.
_DEVIATIONS, _FACTOR = 6.0, math.log(2)
# The statistics in the order in which a spike reaches them, and whether its first or its last site is the origin.
_FORWARD_BACKWARD_UPDATE = (("rms", "logit_max"), min), (("grad_rms", "weight_grad_rms"), max), (("update_ratio",), min)
_SIGMA_PER_MAD = 1.4826  # of a normal distribution
_BLOCK = re.compile(r"^((?:.*?\.)?(\d+))(?:\.|$)")
_MAY_BE_NON_FINITE = ("weight_norm", "alpha_norm", "rms", "logit_max", "grad_rms", "weight_grad_rms", "alpha_grad_rms")


@dataclass(frozen=True)
class CheckResult:
    """A number beyond its threshold, at one place in one step.

    Attributes:
        kind: the alarm that it raises.
        where: a name in probe.jsonl, a block's name, or "" for the whole model.
        factor: how many times beyond the threshold, at least 1.
        what: the numbers, for people.
        since: the step in which it began, if earlier than the one looked at.
    """

    kind: Kind
    where: str
    factor: float
    what: str
    since: int | None = None

    @property
    def points(self) -> int:
        """3 where nothing is to doubt; else 2 far beyond the threshold, and 1 otherwise."""
        if self.kind in ("non-finite", "damaged weights"):
            return 3
        return 2 if self.factor >= KINDS[self.kind].far else 1


class Reading:
    """A row of probe.jsonl in numbers.

    Args:
        row: the row; numbers that are not finite may be strings.

    Attributes:
        step: its number.
        sites: statistics by name, in the model's order.
        layers: statistics of the residual stream.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.step = int(row["step"])
        self.sites: dict[str, dict[str, float]] = {
            name: {stat: float(value) for stat, value in values.items()} for name, values in row["sites"].items()
        }
        self.layers: dict[str, list[float]] = {stat: [float(v) for v in vs] for stat, vs in row["layers"].items()}

    def of(self, stat: str) -> dict[str, float]:
        """One statistic by name."""
        return {name: values[stat] for name, values in self.sites.items() if stat in values}

    @cached_property
    def pull(self) -> list[float]:
        """`rms * grad_rms` of the residual stream, from the first layer that has a gradient on.

        It does not change when the stream is scaled, so that layers can be compared.
        """
        gradients = self.layers.get("grad_rms", [])
        rms = self.layers.get("rms", [])
        return [x * g for x, g in zip(rms[len(rms) - len(gradients) :], gradients, strict=True)]

    def block(self, index: int) -> str:
        """The name of block `index` in the model."""
        stem = next((match[1] for name in self.sites if (match := _BLOCK.match(name))), "block 0")
        return re.sub(r"\d+$", str(index), stem)


def layer_of(where: str) -> int | None:
    """The index of the block that a name is in, from 0; None if it is in none."""
    match = _BLOCK.match(where)
    return int(match[2]) if match else None


def non_finite(reading: Reading, _: Sequence[Reading]) -> Iterator[CheckResult]:
    """Statistics that are not finite, from where they arose: the first name forwards, the last one backwards."""
    for stat in _MAY_BE_NON_FINITE:
        bad = [name for name, value in reading.of(stat).items() if not math.isfinite(value)]
        if bad:
            order = reversed(bad) if "grad" in stat else bad
            yield from (CheckResult("non-finite", name, math.inf, f"{stat} is not finite") for name in order)
            return


def gradients(reading: Reading, _: Sequence[Reading]) -> Iterator[CheckResult]:
    """The residual stream's gradient that fades or explodes on its way from the last block down to the first."""
    pull, top = reading.pull, reading.pull[-1] if reading.pull else 0.0
    if len(pull) < 2 or not (all(map(math.isfinite, pull)) and top > 0):
        return
    first = len(reading.layers["rms"]) - len(pull)
    steps = [_ratio(below, above) for below, above in pairwise(pull)]
    kinds: tuple[tuple[Kind, Callable[[list[float]], float]], ...] = (
        ("fading gradients", min),
        ("exploding gradients", max),
    )
    for kind, extreme in kinds:
        total = extreme(pull) / top
        factor = (_ratio(1, total) if extreme is min else total) / GRADIENT_RANGE
        if factor >= 1:
            culprit, at = steps.index(extreme(steps)), first + pull.index(extreme(pull))
            place = f"the output of block {at - 1}" if at else "the input of block 0"
            what = f"block {first + culprit} multiplies the gradient by {steps[culprit]:.2g} on its way down; "
            what += f"at {place} there is {total:.2g} times that of the last block"
            yield CheckResult(kind, reading.block(first + culprit), factor, what)


def eps_share(reading: Reading, _: Sequence[Reading]) -> Iterator[CheckResult]:
    """A share of eps in the mean square that is too large; a row of zeros, as of padding, makes it infinite."""
    for name, share in reading.of("eps_ratio").items():
        if EPS_SHARE < share < math.inf:
            yield CheckResult("eps", name, share / EPS_SHARE, f"eps is {share:.2g} of the mean square")


def attention(reading: Reading, before: Sequence[Reading]) -> Iterator[CheckResult]:
    """Attention logits that are large and grow, or attention that has settled on single keys."""
    for name, logit in reading.of("logit_max").items():
        past = [each.sites.get(name, {}).get("logit_max", math.nan) for each in before[-_EARLIER:]]
        earlier = [value for value in past if math.isfinite(value)]
        grows = len(earlier) >= 2 and logit > LOGIT_GROWTH * statistics.median(earlier)
        if LOGIT_MAX < logit < math.inf and (grows or logit > LOGIT_MAX * KINDS["attention logits"].far):
            usual = f", {statistics.median(earlier):.3g} lately" if earlier else ""
            yield CheckResult("attention logits", name, logit / LOGIT_MAX, f"largest logit {logit:.3g}{usual}")
            continue
        entropy = reading.sites[name].get("entropy", math.nan)
        first = before[0].sites.get(name, {}).get("entropy", math.nan) if before else math.nan
        if entropy < ENTROPY_SHARE * first:
            factor = _ratio(ENTROPY_SHARE * first, entropy)
            yield CheckResult("attention logits", name, factor, f"entropy {entropy:.2g} nats, {first:.3g} at first")


def dead_alpha(reading: Reading, before: Sequence[Reading]) -> Iterator[CheckResult]:
    """Scales that have shrunk to nothing, or that no gradient reaches."""
    for name, norm in reading.of("alpha_norm").items():
        largest = max((past.sites.get(name, {}).get("alpha_norm", 0.0) for past in before), default=0.0)
        if norm < ALPHA_SHARE * largest:
            factor = _ratio(ALPHA_SHARE * largest, norm)
            yield CheckResult("dead alpha", name, factor, f"norm {norm:.2g}, was {largest:.3g}")
        elif reading.sites[name].get("alpha_grad_rms") == 0:
            yield CheckResult("dead alpha", name, 1, "its gradient is zero")


def updates(reading: Reading, _: Sequence[Reading]) -> Iterator[CheckResult]:
    """Matrices that a step all but replaces, and matrices that it hardly turns."""
    for name, ratio in reading.of("update_ratio").items():
        if UPDATE_RATIO < ratio < math.inf:
            yield CheckResult("large updates", name, ratio / UPDATE_RATIO, f"one step changes it by {ratio:.0%}")
    angles = {name: angle for name, angle in reading.of("angle").items() if math.isfinite(angle)}
    if len(angles) < 2:
        return
    fastest = statistics.quantiles(angles.values(), n=10, method="inclusive")[-1]
    for name, angle in angles.items():
        if angle < TURN_SHARE * fastest:
            what = f"turns by {angle:.1g} rad a step, others by {fastest:.1g}"
            yield CheckResult("stuck weights", name, _ratio(TURN_SHARE * fastest, angle), what)


Check = Callable[[Reading, Sequence[Reading]], Iterator[CheckResult]]
CHECKS: tuple[Check, ...] = (non_finite, gradients, eps_share, attention, dead_alpha, updates)


def origin(reading: Reading, before: Sequence[Reading]) -> tuple[str, str] | None:
    """Find where a spike began: the place whose numbers left their usual range first, and those numbers.

    Outputs and attention logits are looked at first, then gradients, then updates. Of the places that left their range
    by at least the square root of the largest factor, it is the first in the model's order; for gradients the last,
    because gradients flow backwards.

    Args:
        reading: the step to look at.
        before: the readings that say what is usual.

    Returns:
        None if nothing left its range, or too little is known.
    """
    if len(before) < _FEWEST:
        return None
    order = {name: index for index, name in enumerate(reading.sites)}
    for stats, pick in _FORWARD_BACKWARD_UPDATE:
        gone = [(name, stat, how) for stat in stats for name, how in _out_of_range(reading, before, stat).items()]
        if gone:
            farthest = max(abs(how) for *_, how in gone)
            far = [each for each in gone if abs(each[2]) >= farthest / 2]
            name, stat, how = pick(far, key=lambda each: order[each[0]])
            return name, f"{stat} there was {math.exp(how):.3g} times its usual at step {reading.step}"
    return None


def _out_of_range(reading: Reading, before: Sequence[Reading], stat: str) -> dict[str, float]:
    """The places at which a statistic has left its range, with the logarithm of the factor by which it has.

    If three quarters of the places move together, that is the course of training (warm-up, decay), and is taken off.
    """
    past = [{name: math.log(x) for name, x in each.of(stat).items() if 0 < x < math.inf} for each in before[-_EARLIER:]]
    away: dict[str, tuple[float, float]] = {}
    for name, value in reading.of(stat).items():
        usual = [each[name] for each in past if name in each]
        if 0 < value < math.inf and len(usual) >= _FEWEST:
            median = statistics.median(usual)
            sigma = _SIGMA_PER_MAD * statistics.median(abs(each - median) for each in usual)
            away[name] = math.log(value) - median, sigma
    common = sorted(abs(how) for how, _ in away.values())[len(away) // 4] if away else 0.0
    return {name: how for name, (how, sigma) in away.items() if abs(how) - common > max(_DEVIATIONS * sigma, _FACTOR)}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.inf
