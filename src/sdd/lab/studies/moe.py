"""The study `moe`: figures 5 and 6 of arXiv 2502.15499 at small size, mixtures of experts against dense models.

The dense models have as many active parameters as the mixtures, apart from the routers (0.6% of `moe-nano`).
"""

import math
from dataclasses import replace

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Definition, Outcome
from sdd.lab.findings import Findings, Interval, Measured, Range, Table
from sdd.lab.studies import convergence
from sdd.lab.studies.convergence import Comparison, clocked_cells
from sdd.lab.studies.shared import factor_words


def read(outcome: Outcome) -> Findings:
    """The findings of `convergence`, and each mixture beside the dense model of its placement.

    The paper prints no numbers to compare with.
    """
    found = replace(convergence.read(outcome), published=None)
    pairs = _with_dense(outcome)
    if not pairs:
        return found
    return replace(
        found,
        conclusions=[*found.conclusions, *map(_conclusion, pairs)],
        tables=[found.tables[0], _table(pairs), *found.tables[1:]],
    )


def _with_dense(outcome: Outcome) -> list[Comparison]:
    """Each mixture with the dense model of its placement."""
    cells = clocked_cells(outcome)
    dense = {cell.arm.placement: cell for cell in cells if cell.arm.dense}
    return [
        Comparison(cell, dense[cell.arm.placement])
        for cell in cells
        if not cell.arm.dense and cell.arm.placement in dense
    ]


def _table(pairs: list[Comparison]) -> Table:
    rows = [
        [
            pair.method.arm.placement,
            Measured(pair.method.losses),
            Measured(pair.baseline.losses),
            Interval(pair.difference, signed=True),
            Range(pair.mean_factor("tokens")),
            Range(pair.mean_factor("seconds")),
        ]
        for pair in pairs
    ]
    return Table(
        "experts",
        "A mixture of experts and a dense model of as many active parameters, nats a token",
        ["placement", "mixture", "dense", "difference", "tokens, factor", "seconds, factor"],
        rows,
        "Each at its own best rate, paired by seed. Factors: how many times fewer tokens or seconds the mixture needs "
        "to the dense model's final loss; below 1 it needs more.",
    )


def _conclusion(pair: Comparison) -> str:
    name, difference = pair.method.arm.placement, pair.difference.value
    if math.isnan(difference):
        return f"With {name}, the mixture and the dense model have no seed in which both converged."
    tokens, seconds = (factor_words(pair.mean_factor(column)) for column in ("tokens", "seconds"))
    return (
        f"With {name}, the mixture ends {abs(difference):.3f} nats {'below' if difference < 0 else 'above'} the dense "
        f"model of as many active parameters: {tokens} as fast in tokens, {seconds} by the clock."
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
    optional=(Arm("sdd-v1", "sdd-v1"), Arm("dense-sdd-v1", "sdd-v1", dense=True)),
    conditions=(DEFAULT,),
    rates=Rates("tuned", (0.25, 0.5, 1.0, 2.0, 4.0), tuning_seeds=1),
    sizes={},
    read=read,
    preset="moe-nano",
)
