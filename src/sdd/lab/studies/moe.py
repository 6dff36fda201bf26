"""The study `moe`: figures 5 and 6 of arXiv 2502.15499 at small size, mixtures of experts against dense models.

The dense models have as many active parameters as the mixtures, but for the routers (0.6% of `moe-nano`).
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from sdd.lab.definition import DEFAULT, Arm, Cell, Definition, Outcome, Rates
from sdd.lab.findings import Findings, Interval, Measured, Range, Table, Value
from sdd.lab.statistics import mean_factor, paired_difference
from sdd.lab.studies import convergence
from sdd.lab.studies.convergence import clocked, factors_of
from sdd.lab.studies.shared import factor_words


def read(outcome: Outcome) -> Findings:
    """As `convergence`, and each mixture beside the dense model of its placement; the paper prints no numbers."""
    found = convergence.read(outcome)
    pairs = _with_dense(outcome)
    if not pairs:
        return replace(found, published=None)
    return replace(
        found,
        conclusions=[*found.conclusions, *(_conclusion(*pair) for pair in pairs)],
        published=None,
        tables=[found.tables[0], _table(pairs), *found.tables[1:]],
    )


def _with_dense(outcome: Outcome) -> list[tuple[Cell, Cell]]:
    """Each mixture with the dense model of its placement."""
    cells = {arm.name: clocked(outcome.cells[arm.name, DEFAULT.name], outcome) for arm in outcome.plan.arms}
    dense = {cell.arm.placement: cell for cell in cells.values() if cell.arm.dense}
    mixtures = [cell for cell in cells.values() if not cell.arm.dense]
    return [(cell, dense[cell.arm.placement]) for cell in mixtures if cell.arm.placement in dense]


def _table(pairs: list[tuple[Cell, Cell]]) -> Table:
    rows: list[list[Value]] = []
    for mixture, dense in pairs:
        factors = factors_of(mixture, dense)
        rows.append(
            [
                mixture.arm.placement,
                Measured(mixture.losses),
                Measured(dense.losses),
                Interval(paired_difference(mixture.losses, dense.losses), signed=True),
                Range(mean_factor(factors["tokens"])),
                Range(mean_factor(factors["seconds"])),
            ]
        )
    return Table(
        "experts",
        "A mixture of experts and a dense model of as many active parameters, nats a token",
        ["placement", "mixture", "dense", "difference", "tokens, factor", "seconds, factor"],
        rows,
        "Each at its own best rate, paired by seed. Factors: how many times fewer tokens or seconds the mixture needs "
        "to the dense model's final loss; below 1 it needs more.",
    )


def _conclusion(mixture: Cell, dense: Cell) -> str:
    change = paired_difference(mixture.losses, dense.losses)
    name = mixture.arm.placement
    if math.isnan(change.value):
        return f"With {name}, the mixture and the dense model have no seed in which both converged."
    factors: Mapping[str, list[float]] = factors_of(mixture, dense)
    tokens, seconds = (factor_words(mean_factor(factors[column])) for column in ("tokens", "seconds"))
    side = "below" if change.value < 0 else "above"
    return (
        f"With {name}, the mixture ends {abs(change.value):.3f} nats {side} the dense model of as "
        f"many active parameters: {tokens} as fast in tokens, {seconds} by the clock."
    )


DEFINITION: Definition = replace(
    convergence.DEFINITION,
    name="moe",
    title="Does SDD train mixtures of experts better?",
    question="do mixtures of experts reach a lower loss with SDD, Post-Norm or Pre-Norm, than with QK-norm alone, and "
    "than dense models of as many active parameters?",
    method=(
        "Mixtures of experts in three placements, and dense models of as many active parameters in two of them, have "
        "their learning rates tuned on seeds and held-out windows of their own.",
        "At these rates each is trained on fresh seeds, the same data in the same order for all.",
        "The losses are those of held-out text, without the router's; factors are as in the study convergence.",
    ),
    arms=(
        Arm("sdd", "sdd"),
        Arm("sdd-prenorm", "sdd-prenorm"),
        Arm("prenorm-qk", "prenorm-qk"),
        Arm("dense", "prenorm-qk", dense=True),
        Arm("dense-sdd", "sdd", dense=True),
    ),
    conditions=(DEFAULT,),
    rates=Rates("tuned", (0.25, 0.5, 1.0, 2.0, 4.0), tuning_seeds=1),
    sizes={},
    read=read,
    preset="moe-nano",
)
