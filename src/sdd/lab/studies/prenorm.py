"""The study `prenorm`: figure 8 of arXiv 2502.15499, SDD on Pre-Norm and on Post-Norm beside the plain ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome, short_length
from sdd.lab.findings import Findings, Interval, Measured, Table, seeds_text
from sdd.lab.statistics import Estimate, paired_difference
from sdd.lab.studies import shared

#: SDD on a wiring, its baseline, and the wiring.
PAIRS = (
    ("sdd-prenorm", "prenorm", "Pre-Norm"),
    ("sdd-prenorm", "prenorm-qk", "Pre-Norm"),
    ("sdd-paper", "postnorm", "Post-Norm"),
    ("sdd-paper", "sdd-prenorm", "both: SDD on Post-Norm against SDD on Pre-Norm"),
)


@dataclass(frozen=True)
class Pair:
    """A method beside another under one condition."""

    method: Cell
    baseline: Cell
    wiring: str

    @property
    def difference(self) -> Estimate:
        """Final loss of the method minus that of the baseline, paired by seed."""
        return paired_difference(self.method.losses, self.baseline.losses)

    @property
    def words(self) -> str:
        """The comparison as a sentence, without its end."""
        method, baseline = self.method.arm.name, self.baseline.arm.name
        if math.isnan(self.difference.value):
            return f"{method} and {baseline} have no seed in which both converged"
        return f"{method} ends {shared.difference_words(self.difference)} {baseline}"


def pairs(outcome: Outcome, condition: str) -> list[Pair]:
    """The comparisons of which both methods were run."""
    names = {arm.name for arm in outcome.plan.arms}
    return [
        Pair(outcome.cells[method, condition], outcome.cells[baseline, condition], wiring)
        for method, baseline, wiring in PAIRS
        if {method, baseline} <= names
    ]


def read(outcome: Outcome) -> Findings:
    """SDD beside its baseline on either wiring, at every length."""
    last = outcome.plan.conditions[-1]
    found = pairs(outcome, last.name)
    return Findings(
        answer=_answer(outcome, found),
        conclusions=[f"At {last.title} {pair.words}{_broken(pair)}." for pair in found],
        limits=[
            "SDD on Pre-Norm stands here with its norms at every projection, as on Post-Norm in the paper; the final "
            "norm is that of the wiring.",
            *shared.edge_limits(outcome),
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            shared.loss_table(outcome),
            _difference_table(outcome),
            *shared.rates_table(outcome),
            shared.cost_table(outcome.under(last), outcome),
        ],
        pictures=[
            shared.curves_picture(
                "curves",
                {condition.title: outcome.under(condition) for condition in outcome.plan.conditions},
                ceiling=_shown(outcome),
            )
        ],
    )


def _difference_table(outcome: Outcome) -> Table:
    conditions = outcome.plan.conditions
    columns = [pairs(outcome, condition.name) for condition in conditions]
    rows = [
        [f"{row[0].method.arm.name} against {row[0].baseline.arm.name}", row[0].wiring]
        + [Interval(pair.difference, signed=True) for pair in row]
        for row in zip(*columns, strict=True)
    ]
    return Table(
        "difference",
        f"Held-out loss minus the baseline's, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        ["comparison", "wiring", *(condition.title for condition in conditions)],
        rows,
        "Paired by seed, each method at its best rate; ± is half of Student's 95% interval of the mean difference.",
    )


def _answer(outcome: Outcome, found: Sequence[Pair]) -> str:
    baselines = [pair for pair in found if not pair.baseline.arm.name.startswith("sdd")]
    if not baselines:
        return "Nothing to compare: that needs SDD on a wiring and its baseline."
    parts = "; ".join(f"on {pair.wiring} {pair.words}" for pair in baselines)
    tokens = short_length(outcome.plan.lengths[-1])
    return f"At {tokens} tokens, each at its best rate: {parts}."


def _broken(pair: Pair) -> str:
    names = [cell.arm.name for cell in (pair.method, pair.baseline) if cell.broken]
    return f" ({' and '.join(names)} did not converge in most seeds)" if names else ""


def _shown(outcome: Outcome) -> float | None:
    """Cut off the first losses, which would press the rest together."""
    ends = [Measured(cell.losses).estimate.value for cell in outcome.cells.values()]
    ends = [end for end in ends if math.isfinite(end)]
    return max(ends) + 1.5 if ends else None


DEFINITION = Definition(
    name="prenorm",
    title="SDD on Pre-Norm or on Post-Norm?",
    question="how much does SDD gain on Pre-Norm and on Post-Norm over the same wiring without it (figure 8)?",
    method=(
        "SDD at every projection, on Pre-Norm and on Post-Norm, is trained beside Pre-Norm, Pre-Norm with norms on q "
        "and k, and Post-Norm.",
        "The learning rate of every method is tuned on a seed and held-out windows of their own, on one grid that is "
        "extended while a best rate lies at its end.",
        "At these rates each is trained on fresh seeds, the same data in the same order for all; compared is the "
        "held-out loss at the end.",
    ),
    arms=tuple(Arm(name, name) for name in ("sdd-prenorm", "sdd-paper", "sdd", "prenorm", "prenorm-qk", "postnorm")),
    conditions=(DEFAULT,),
    rates=Rates("tuned", (0.5, 1.0, 2.0), tuning_seeds=1),
    sizes={},
    read=read,
    lengths=(1_000_000,),
)
