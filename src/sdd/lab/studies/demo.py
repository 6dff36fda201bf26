"""The study `demo`: four placements under a recommended and a hard setting, in minutes on two cores."""

import math

from sdd.lab.arms import Arm, Condition, Rates
from sdd.lab.definition import Cell, Definition, Outcome
from sdd.lab.findings import Findings, Measured, Table, listed
from sdd.lab.studies import shared

#: At the recommended rate every placement learns within the length of a run (at 0.004 Post-Norm does not). The hard
#: setting joins two perturbations of arXiv 2502.15499, table 2.
RECOMMENDED = Condition("recommended", "recommended")
HARD = Condition("hard", "hard", {"optim.warmup": 0}, rate_factor=10.0)
#: The largest spread of three seeds at this size, in nats a token.
_NOISE = 0.08


def read(outcome: Outcome) -> Findings:
    """Losses under both settings, what the hard one changes, and the curves."""
    panels = {condition.title: outcome.under(condition) for condition in outcome.plan.conditions}
    frequencies = "token frequencies", outcome.results[0].token_frequencies
    return Findings(
        answer=_answer(outcome.under(HARD)),
        conclusions=[*_changes(outcome), *_reasons(outcome)],
        limits=[
            "All methods share the learning rate, which was tuned for none of them: which is best at its own best "
            "rate is not answered here.",
            f"Three seeds of one method lay up to {_NOISE:g} nats apart at this size; smaller differences say nothing.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[_table(outcome), shared.cost_table(outcome.under(RECOMMENDED), outcome)],
        pictures=[
            shared.curves_picture("heldout", panels, quantity=shared.HELD_OUT, reference=frequencies),
            shared.curves_picture("training", panels, quantity=shared.TRAINING),
            shared.curves_picture("grad-norm", panels, quantity=shared.GRAD_NORM),
        ],
    )


def _table(outcome: Outcome) -> Table:
    """The losses, what the hard setting changes, and the losses in bits a byte."""
    losses = shared.loss_table(outcome)
    ratios = (result.bits_per_byte / result.eval_loss for result in outcome.results)
    per_nat = next(filter(math.isfinite, ratios), math.nan)  # one for all: they are measured on the same text
    frequencies = outcome.results[0].token_frequencies
    rows = []
    for row, *cells in zip(losses.rows, *map(outcome.under, outcome.plan.conditions), strict=True):
        in_bytes = ({seed: per_nat * loss for seed, loss in cell.losses.items()} for cell in cells)
        rows.append([*row, shared.change(outcome, str(row[0]), HARD), *map(Measured, in_bytes)])
    return Table(
        losses.name,
        losses.title,
        [*losses.columns, "change", *(f"{column}, bits per byte" for column in losses.columns[1:])],
        rows,
        f"{_settings(outcome)} Token frequencies alone reach {frequencies:.3f} nats a token, in bits per byte "
        f"{Measured({0: per_nat * frequencies})}: a model that ends there has learned nothing from the context. "
        f"{losses.note}",
    )


def _settings(outcome: Outcome) -> str:
    """The learning rates and warm-up steps of the settings."""
    base = outcome.plan.base.optim
    return (
        f"Recommended is a peak learning rate of {base.lr:g} with {base.warmup} warm-up steps, hard one of "
        f"{HARD.rate_factor * base.lr:g} without."
    )


def _answer(cells: list[Cell]) -> str:
    broken = [cell.arm.name for cell in cells if cell.broken]
    trained = [cell.arm.name for cell in cells if not cell.broken]
    if not broken or not trained:
        return f"Under the hard setting {'every method trains' if trained else 'no method trains'}."
    return (
        f"Under the hard setting {listed(trained)} {'trains' if len(trained) == 1 else 'train'}, and {listed(broken)} "
        f"{'does' if len(broken) == 1 else 'do'} not."
    )


def _changes(outcome: Outcome) -> list[str]:
    return [
        f"The hard setting takes the loss of {after.arm.name} from {Measured(before.losses)} to "
        f"{Measured(after.losses)} (change {shared.change(outcome, after.arm.name, HARD)})."
        for before, after in zip(outcome.under(RECOMMENDED), outcome.under(HARD), strict=True)
        if not before.broken and not after.broken
    ]


def _reasons(outcome: Outcome) -> list[str]:
    """Why runs did not converge, one sentence for each method and setting."""
    reasons = {
        (cell.arm.name, condition.title): result.reason
        for condition in outcome.plan.conditions
        for cell in outcome.under(condition)
        for result in cell.results
        if not result.converged
    }
    return [f"{name} does not converge under the {title} setting: {why}." for (name, title), why in reasons.items()]


DEFINITION = Definition(
    name="demo",
    title="Does Post-Norm break? Four placements of the norms, two settings",
    question="does a Post-Norm Transformer break under a hard setting, and what do other placements of the norms do?",
    method=(
        "Small language models that differ only in where their norms stand are trained twice on the same text in the "
        "same order: once under a setting that is kind to all, and once under one that is hard on purpose.",
        "The hard setting multiplies the learning rate by ten and leaves out the warm-up: two of the perturbations of "
        "arXiv 2502.15499, joined.",
        "Nothing is tuned for a method; the loss is that of held-out text at the end of the schedule.",
    ),
    arms=tuple(Arm(name, name) for name in ("sdd", "prenorm-qk", "postnorm", "deepnorm")),
    conditions=(RECOMMENDED, HARD),
    rates=Rates("common"),
    sizes={"nano": {"steps": 350, "optim.lr": 1e-3, "optim.warmup": 40, "eval_every": 35}},
    read=read,
    seeds=1,
    divisible=False,
)
