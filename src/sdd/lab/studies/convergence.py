"""The study `convergence`: figures 1 and 3 of arXiv 2502.15499, tokens and seconds to the baseline's final loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome
from sdd.lab.findings import Findings, Interval, Measured, Picture, Range, Table, listed, seeds_text
from sdd.lab.results import RunResult
from sdd.lab.statistics import Estimate, bootstrap_factor, first_reach, mean_factor, paired_difference
from sdd.lab.studies import shared

PUBLISHED_FACTOR = 1.5
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_SHOWN_FROM = 0.25  # of a run: earlier losses would press the rest together
_FACTORS = tuple(2.0**step for step in range(-2, 4))


@dataclass(frozen=True)
class Comparison:
    """A method beside a baseline, paired by seed."""

    method: Cell
    baseline: Cell

    @property
    def name(self) -> str:
        """Of the comparison, in tables."""
        return f"{self.method.arm.name} against {self.baseline.arm.name}"

    @property
    def difference(self) -> Estimate:
        """Final loss of the method minus that of the baseline."""
        return paired_difference(self.method.losses, self.baseline.losses)

    def factors(self, column: str) -> list[float]:
        """`factor` for "tokens" or "seconds", one for each seed that converged in both."""
        base = {result.seed: result for result in self.baseline.results if result.converged}
        ours = [result for result in self.method.results if result.converged and result.seed in base]
        return [factor(result, base[result.seed], column) for result in ours]

    def mean_factor(self, column: str) -> Estimate:
        """Geometric mean of `factors`."""
        return mean_factor(self.factors(column))


def read(outcome: Outcome) -> Findings:
    """Factors of tokens and seconds, the losses they rest on, and the rates that were tuned."""
    cells = clocked_cells(outcome)
    pairs = [
        Comparison(ours, base)
        for ours in cells
        for base in cells
        if is_sdd(ours) and not is_sdd(base) and ours.arm.dense == base.arm.dense
    ]
    return Findings(
        answer=_answer(pairs),
        conclusions=[_conclusion(pair) for pair in pairs],
        limits=[
            *shared.edge_limits(outcome),
            "The method's curve is read before the end of its schedule, where its rate has not yet fallen, and the "
            "baseline's at its end: that favours the baseline, as in the paper's figure. A run as long as the crossing "
            "would reach the loss sooner.",
            "Seconds are tokens times what a token costs, by training steps of all methods timed in turn on one "
            "machine: no statement about other hardware.",
            *shared.general_limits(outcome),
        ],
        published=_published(outcome, pairs),
        tables=[
            _factor_table(pairs),
            _loss_table(outcome, cells),
            _lead_table(pairs),
            *shared.rates_table(outcome),
            shared.cost_table(cells, outcome),
        ],
        pictures=_pictures(cells),
    )


def factor(method: RunResult, baseline: RunResult, column: str) -> float:
    """How many times less the method needs than the baseline to reach the worse of the two final losses.

    Usually that is the baseline's whole run over the part that the method needs to reach the baseline's final loss. If
    the method never does, it is the part that the baseline needs to reach the method's final loss over the method's
    whole run, which is below one. Where the final losses are equal both are one.

    Args:
        method: a run that converged.
        baseline: another one.
        column: "tokens" or "seconds".
    """
    reached = first_reach(method.curve[column], method.curve["eval_loss"], baseline.eval_loss)
    if math.isfinite(reached):
        return baseline.curve[column][-1] / reached
    reached = first_reach(baseline.curve[column], baseline.curve["eval_loss"], method.eval_loss)
    return reached / method.curve[column][-1]


def clocked_cells(outcome: Outcome) -> list[Cell]:
    """The cells of all arms, the seconds of their curves by the study's clock instead of that of each run."""
    return [_clocked(cell, outcome.seconds_per_token[cell.arm.name]) for cell in outcome.under(DEFAULT)]


def _clocked(cell: Cell, seconds_per_token: float) -> Cell:
    results = []
    for result in cell.results:
        seconds = [seconds_per_token * tokens for tokens in result.curve["tokens"]]
        results.append(replace(result, curve={**result.curve, "seconds": seconds}))
    return replace(cell, results=tuple(results))


def is_sdd(cell: Cell) -> bool:
    """Whether the arm is SDD; the others are its baselines."""
    return cell.arm.placement.startswith("sdd")


def _factor_table(pairs: Sequence[Comparison]) -> Table:
    rows = [
        [
            pair.name,
            Range(pair.mean_factor("tokens")),
            Range(bootstrap_factor(pair.factors("tokens"))),
            Range(pair.mean_factor("seconds")),
            Interval(pair.difference, signed=True),
        ]
        for pair in pairs
    ]
    return Table(
        "factor",
        "How many times fewer tokens and seconds to the baseline's final loss",
        [
            "comparison",
            "tokens, factor (t interval)",
            "tokens, factor (bootstrap)",
            "seconds, factor (t interval)",
            "final loss, difference",
        ],
        rows,
        "Above 1 the method needs fewer. Geometric mean over seeds paired by the order of the data; a factor below 1 "
        "is what the baseline needs to reach the method's final loss. Intervals are at 95%: Student's t of the "
        "logarithms, and a percentile bootstrap over seeds, which with three seeds is about their range and too "
        "narrow.",
    )


def _lead_table(pairs: Sequence[Comparison]) -> Table:
    """Whether a lead grows or shrinks: the difference of the curves along the runs."""
    rows = []
    for pair in pairs:
        apart = (paired_difference(losses_at(pair.method, share), losses_at(pair.baseline, share)) for share in _SHARES)
        rows.append([pair.name, *(Interval(difference, signed=True) for difference in apart)])
    return Table(
        "lead",
        "Held-out loss minus the baseline's along the runs, nats a token",
        ["comparison", *(f"at {share:.0%} of the tokens" for share in _SHARES)],
        rows,
        "Paired by seed; ± is half of Student's 95% interval of the mean difference. Between evaluations curves are "
        "taken to be straight.",
    )


def losses_at(cell: Cell, share: float) -> dict[int, float]:
    """Held-out loss by seed at a share of a run's tokens; nan for runs that did not converge."""
    found = dict.fromkeys(cell.losses, math.nan)
    for result in cell.results:
        if result.converged:
            found[result.seed] = float(
                np.interp(share * result.tokens, result.curve["tokens"], result.curve["eval_loss"])
            )
    return found


def _loss_table(outcome: Outcome, cells: Sequence[Cell]) -> Table:
    return Table(
        "loss",
        f"Held-out loss at the end, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        ["method", "learning rate", "loss"],
        [[cell.arm.name, f"{cell.rate:g}", Measured(cell.losses)] for cell in cells],
        shared.not_converged_text(),
    )


def _published(outcome: Outcome, pairs: Sequence[Comparison]) -> Table:
    ours = {pair.name: pair.factors("tokens") for pair in pairs}.get("sdd-released against prenorm-qk", [])
    return Table(
        "published",
        "Figure 1 of arXiv 2502.15499 beside ours",
        ["comparison", "published (1B, 2T tokens)", f"ours ({outcome.plan.request.preset})"],
        [["SDD against Pre-Norm with QK-norm, tokens", f"{PUBLISHED_FACTOR:g}", Range(mean_factor(ours))]],
        "Ours is sdd-released, as the authors ran it, against prenorm-qk, their baseline, here with its rate tuned.",
    )


def _answer(pairs: Sequence[Comparison]) -> str:
    if not pairs:
        return "Nothing to compare: that needs a placement of SDD and a baseline."
    method = pairs[0].method
    parts = [_speed(pair.mean_factor("tokens"), pair.baseline.arm.name) for pair in pairs if pair.method is method]
    return f"Each at its best rate, {method.arm.name} is {listed(parts)}."


def _speed(factor: Estimate, baseline: str) -> str:
    if math.isnan(factor.value):
        return f"in no seed to be compared with {baseline}"
    if math.isnan(factor.low):
        return f"{shared.factor_words(factor)} as fast as {baseline} in tokens, in one seed"
    if not factor.excludes(1):
        return f"not told apart from {baseline} in tokens ({shared.factor_words(factor)} as fast)"
    return f"{shared.factor_words(factor)} as fast as {baseline} in tokens"


def _conclusion(pair: Comparison) -> str:
    method, baseline, difference = pair.method.arm.name, pair.baseline.arm.name, pair.difference
    if math.isnan(difference.value):
        return f"{method} and {baseline} have no seed in which both converged."
    seeds = f", {'more' if difference.excludes(0) else 'no more'} than seeds explain" if difference.n > 1 else ""
    return (
        f"{method} ends {abs(difference.value):.3f} nats {'below' if difference.value < 0 else 'above'} {baseline}"
        f"{seeds}; by the clock of that machine it is {shared.factor_words(pair.mean_factor('seconds'))} as fast."
    )


def _pictures(cells: Sequence[Cell]) -> list[Picture]:
    """Curves over the stretch in which the baselines' final losses are reached."""
    ends = {f"{cell.arm.name} at its end": Measured(cell.losses).estimate.value for cell in cells if not is_sdd(cell)}
    ends = {name: loss for name, loss in ends.items() if math.isfinite(loss)}
    started = [loss for cell in cells for loss in losses_at(cell, _SHOWN_FROM).values() if math.isfinite(loss)]
    top = max(started, default=None)
    return [shared.curves_picture(x, {"": cells}, x, ceiling=top, levels=ends) for x in ("tokens", "seconds")]


DEFINITION = Definition(
    name="convergence",
    title="How much sooner does SDD reach the baseline's loss?",
    question="in how many times fewer tokens and seconds does SDD reach the final loss of a tuned baseline?",
    method=(
        "The learning rate of every method is tuned on seeds and held-out windows of their own, on one grid that is "
        "extended while a best rate lies at its end.",
        "At these rates each method is trained on fresh seeds, the same data in the same order for all.",
        "The factor is the baseline's tokens (or seconds) over those at which the method's held-out curve first "
        "comes down to the baseline's final loss.",
    ),
    arms=tuple(Arm(name, name) for name in ("sdd", "sdd-released", "prenorm-qk", "olmo2")),
    conditions=(DEFAULT,),
    rates=Rates("tuned", _FACTORS, tuning_seeds=2),
    sizes={"nano": {"steps": 600, "optim.warmup": 60}},
    read=read,
)
