"""The study `convergence`: figures 1 and 3 of arXiv 2502.15499, tokens and seconds to the baseline's final loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdd.lab.definition import DEFAULT, Arm, Cell, Definition, Outcome, Rates, at_edge
from sdd.lab.findings import Findings, Interval, Measured, Picture, Range, Table, listed, seeds_text
from sdd.lab.results import RunResult
from sdd.lab.statistics import Estimate, bootstrap_factor, first_reach, mean_factor, paired_difference
from sdd.lab.studies.shared import (
    cost_table,
    curves_picture,
    factor_words,
    general_limits,
    not_converged_text,
    rates_table,
)

PUBLISHED_FACTOR = 1.5
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_SHOWN_FROM = 0.25  # of a run: earlier losses would press the rest together
_FACTORS = tuple(2.0**step for step in range(-2, 4))


def read(outcome: Outcome) -> Findings:
    """Factors of tokens and seconds, the losses they rest on, and the rates that were tuned."""
    cells = {arm.name: clocked(outcome.cells[arm.name, DEFAULT.name], outcome) for arm in outcome.plan.arms}
    pairs = [
        (ours, base)
        for ours in cells.values()
        for base in cells.values()
        if is_sdd(ours) and not is_sdd(base) and ours.arm.dense == base.arm.dense
    ]
    factors = {(method.arm.name, base.arm.name): factors_of(method, base) for method, base in pairs}
    return Findings(
        answer=_answer(factors),
        conclusions=_conclusions(pairs, factors),
        limits=_limits(outcome),
        published=_published(outcome, factors),
        tables=[
            _factor_table(pairs, factors),
            _loss_table(outcome, cells),
            _lead_table(pairs),
            *rates_table(outcome),
            cost_table(list(cells.values()), outcome),
        ],
        pictures=[*_pictures(cells)],
    )


def factor(method: RunResult, baseline: RunResult, column: str) -> float:
    """How many times less the method needs than the baseline to reach the worse of the two final losses.

    That is the baseline's whole run over what the method needs to reach the baseline's final loss; or, if it never
    does, what the baseline needs to reach the method's final loss over the method's whole run, which is below one.
    Where the final losses are equal both are one.

    Args:
        method: a run that converged.
        baseline: likewise.
        column: "tokens" or "seconds".
    """
    reached = first_reach(method.curve[column], method.curve["eval_loss"], baseline.eval_loss)
    if math.isfinite(reached):
        return baseline.curve[column][-1] / reached
    reached = first_reach(baseline.curve[column], baseline.curve["eval_loss"], method.eval_loss)
    return reached / method.curve[column][-1]


def factors_of(method: Cell, baseline: Cell) -> Mapping[str, list[float]]:
    """`factor` for tokens and seconds, one a seed that converged in both."""
    theirs = {result.seed: result for result in baseline.results if result.converged}
    both = [(result, theirs[result.seed]) for result in method.results if result.converged and result.seed in theirs]
    return {column: [factor(ours, base, column) for ours, base in both] for column in ("tokens", "seconds")}


def clocked(cell: Cell, outcome: Outcome) -> Cell:
    """The cell with the seconds of its curves by the study's clock, not by that of each run."""
    cost = outcome.seconds_per_token[cell.arm.name]
    curves = [{**result.curve, "seconds": [cost * at for at in result.curve["tokens"]]} for result in cell.results]
    results = (replace(result, curve=curve) for result, curve in zip(cell.results, curves, strict=True))
    return replace(cell, results=tuple(results))


def is_sdd(cell: Cell) -> bool:
    """Whether the arm is SDD, which the others are baselines to."""
    return cell.arm.placement.startswith("sdd")


def _factor_table(
    pairs: Sequence[tuple[Cell, Cell]], factors: Mapping[tuple[str, str], Mapping[str, list[float]]]
) -> Table:
    rows = []
    for method, base in pairs:
        found = factors[method.arm.name, base.arm.name]
        rows.append(
            [
                f"{method.arm.name} against {base.arm.name}",
                Range(mean_factor(found["tokens"])),
                Range(bootstrap_factor(found["tokens"])),
                Range(mean_factor(found["seconds"])),
                Interval(paired_difference(method.losses, base.losses), signed=True),
            ]
        )
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


def _lead_table(pairs: Sequence[tuple[Cell, Cell]]) -> Table:
    """Whether a lead grows or shrinks: the difference of the curves along the runs."""
    rows = []
    for method, base in pairs:
        apart = (paired_difference(losses_at(method, share), losses_at(base, share)) for share in _SHARES)
        leads = (Interval(change, signed=True) for change in apart)
        rows.append([f"{method.arm.name} against {base.arm.name}", *leads])
    return Table(
        "lead",
        "Held-out loss minus the baseline's along the runs, nats a token",
        ["comparison", *(f"at {share:.0%} of the tokens" for share in _SHARES)],
        rows,
        "Paired by seed; ± is half of Student's 95% interval of the mean difference. Between evaluations curves are "
        "taken to be straight.",
    )


def losses_at(cell: Cell, share: float) -> dict[int, float]:
    """Held-out loss by seed at a share of a run's tokens, of the runs that converged; nan of the others."""
    found: dict[int, float] = {}
    for result in cell.results:
        curve = result.curve
        found[result.seed] = (
            float(np.interp(share * result.tokens, curve["tokens"], curve["eval_loss"]))
            if result.converged
            else math.nan
        )
    return found


def _loss_table(outcome: Outcome, cells: Mapping[str, Cell]) -> Table:
    rows = [[name, f"{cell.rate:g}", Measured(cell.losses)] for name, cell in cells.items()]
    return Table(
        "loss",
        f"Held-out loss at the end, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        ["method", "learning rate", "loss"],
        rows,
        not_converged_text(),
    )


def _published(outcome: Outcome, factors: Mapping[tuple[str, str], Mapping[str, list[float]]]) -> Table:
    ours = factors.get(("sdd-released", "prenorm-qk"), {}).get("tokens", [])
    return Table(
        "published",
        "Figure 1 of arXiv 2502.15499 beside ours",
        ["comparison", "published (1B, 2T tokens)", f"ours ({outcome.plan.request.preset})"],
        [["SDD against Pre-Norm with QK-norm, tokens", f"{PUBLISHED_FACTOR:g}", Range(mean_factor(ours))]],
        "Ours is sdd-released, as the authors ran it, against prenorm-qk, their baseline, here with its rate tuned.",
    )


def _answer(factors: Mapping[tuple[str, str], Mapping[str, list[float]]]) -> str:
    if not factors:
        return "Nothing to compare: that needs a placement of SDD and a baseline."
    method = next(iter(factors))[0]
    parts = [_verdict(mean_factor(found["tokens"]), base) for (name, base), found in factors.items() if name == method]
    return f"Each at its best rate, {method} is {listed(parts)}."


def _verdict(factor: Estimate, baseline: str) -> str:
    if math.isnan(factor.value):
        return f"in no seed to be compared with {baseline}"
    if math.isnan(factor.low):
        return f"{factor_words(factor)} as fast as {baseline} in tokens, in one seed"
    if not factor.excludes(1):
        return f"not told apart from {baseline} in tokens ({factor_words(factor)} as fast)"
    return f"{factor_words(factor)} as fast as {baseline} in tokens"


def _conclusions(
    pairs: Sequence[tuple[Cell, Cell]], factors: Mapping[tuple[str, str], Mapping[str, list[float]]]
) -> list[str]:
    texts: list[str] = []
    for method, base in pairs:
        names = method.arm.name, base.arm.name
        change = paired_difference(method.losses, base.losses)
        if math.isnan(change.value):
            texts.append(f"{names[0]} and {names[1]} have no seed in which both converged.")
            continue
        side = (
            ""
            if math.isnan(change.low)
            else ", more than seeds explain"
            if change.excludes(0)
            else ", no more than seeds explain"
        )
        seconds = mean_factor(factors[names]["seconds"])
        texts.append(
            f"{names[0]} ends {abs(change.value):.3f} nats {'below' if change.value < 0 else 'above'} "
            f"{names[1]}{side}; by the clock of that machine it is {factor_words(seconds)} as fast."
        )
    return texts


def _limits(outcome: Outcome) -> list[str]:
    edges = [arm for (arm, _), grid in outcome.grids.items() if at_edge(grid)]
    warning = [f"The best rate of {listed(edges)} still lies at an end of the extended grid."] if edges else []
    return [
        *warning,
        "The method's curve is read before the end of its schedule, where its rate has not yet fallen, and the "
        "baseline's at its end: that favours the baseline, as in the paper's figure. A run as long as the crossing "
        "would reach the loss sooner.",
        "Seconds are tokens times what a token costs, by training steps of all methods timed in turn on one machine: "
        "no statement about other hardware.",
        *general_limits(outcome),
    ]


def _pictures(cells: Mapping[str, Cell]) -> list[Picture]:
    """Over the stretch in which the baselines' final losses are reached."""
    everything = {"": list(cells.values())}
    ends = {
        f"{name} at its end": Measured(cell.losses).estimate.value for name, cell in cells.items() if not is_sdd(cell)
    }
    ends = {name: loss for name, loss in ends.items() if math.isfinite(loss)}
    started = [
        np.interp(_SHOWN_FROM * result.tokens, result.curve["tokens"], result.curve["eval_loss"])
        for cell in cells.values()
        for result in cell.results
        if result.converged
    ]
    top = float(np.max(started)) if started else None
    return [curves_picture(x, everything, x, ceiling=top, levels=ends) for x in ("tokens", "seconds")]


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
