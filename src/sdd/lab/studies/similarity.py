"""The study `similarity`: figure 9 of arXiv 2502.15499, how alike the features of different layers are."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sdd.lab.arms import DEFAULT, Rates
from sdd.lab.definition import Cell, Definition, Outcome
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.measures import gradients_and_similarity, numbers
from sdd.lab.results import RunResult
from sdd.lab.statistics import Estimate, paired_difference
from sdd.lab.studies import shared
from sdd.lab.studies.gradients import ARMS, SIZES

#: The two readings of "feature similarity between layers", by the name of what is compared.
READINGS = {"outputs": "outputs of neighbouring blocks", "updates": "updates of neighbouring blocks"}


def neighbours(result: RunResult, reading: str) -> list[float]:
    """The cosine of each layer with the next, from the first; empty if the run diverged.

    Args:
        result: measured by `sdd.lab.measures.layer_similarity`.
        reading: one of `READINGS`.
    """
    rows = numbers(result, reading)
    return [row[place + 1] for place, row in enumerate(rows[:-1])] if rows else []


def overall(result: RunResult, reading: str) -> float:
    """The mean cosine over all pairs of two different layers; nan if the run diverged."""
    rows = numbers(result, reading)
    if not rows or len(rows) < 2:
        return math.nan
    table = np.array(rows)
    return float(table[~np.eye(len(table), dtype=bool)].mean())


def _mean(result: RunResult, reading: str) -> float:
    found = neighbours(result, reading)
    return float(np.mean(found)) if found else math.nan


def _by_seed(cell: Cell, reading: str) -> dict[int, float]:
    """The mean similarity of neighbours by seed."""
    return {result.seed: _mean(result, reading) for result in cell.results}


def _apart(ours: Cell, other: Cell, reading: str) -> Estimate:
    """The mean similarity of neighbours in one method minus that in another, paired by seed."""
    return paired_difference(_by_seed(ours, reading), _by_seed(other, reading))


def read(outcome: Outcome) -> Findings:
    """The similarity of layers in both readings, and which of them sets SDD apart in which direction."""
    return Findings(
        answer=_answer(outcome),
        conclusions=_conclusions(outcome),
        limits=[
            "The paper prints no numbers and does not say what its features are; these are the two readings that can "
            "be measured without guessing more.",
            "A cosine is raised by directions that all tokens share; it says how far a block turns the stream, not how "
            "much it adds to the prediction.",
            "Models differ in their loss too: what differs here need not be why.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _table(outcome),
            _difference_table(outcome),
            shared.loss_table(outcome),
            shared.cost_table(outcome.under(DEFAULT), outcome),
        ],
        pictures=[_picture(outcome)],
    )


def _table(outcome: Outcome) -> Table:
    rows = []
    for cell in outcome.under(DEFAULT):
        pairs = [{run.seed: overall(run, reading) for run in cell.results} for reading in READINGS]
        rows.append(
            [cell.arm.name, *(Measured(values) for values in (*(_by_seed(cell, each) for each in READINGS), *pairs))]
        )
    return Table(
        "similarity",
        f"Mean cosine between layers on held-out text, {seeds_text(outcome.plan.request.seeds)}",
        ["method", *READINGS.values(), "all pairs of outputs", "all pairs of updates"],
        rows,
        "Outputs are the residual stream: the input of the first block and the output of each. An update is a block's "
        "output minus its input. Means over tokens and layers; ± is half of Student's 95% interval of the mean over "
        "seeds. A dash: diverged.",
    )


def _difference_table(outcome: Outcome) -> Table:
    ours, *others = outcome.under(DEFAULT)
    rows = [
        [
            cell.arm.name,
            *(
                Interval(paired_difference(_by_seed(ours, each), _by_seed(cell, each)), signed=True)
                for each in READINGS
            ),
        ]
        for cell in others
    ]
    return Table(
        "difference",
        f"Similarity of {ours.arm.name} minus that of the method",
        ["method", *READINGS.values()],
        rows,
        "Paired by seed; ± is half of Student's 95% interval of the mean difference.",
    )


def _ranked(outcome: Outcome, reading: str) -> list[str]:
    """Methods from the most alike layers to the least; without those that diverged."""
    means = {cell.arm.name: Measured(_by_seed(cell, reading)).estimate.value for cell in outcome.under(DEFAULT)}
    return sorted((name for name, mean in means.items() if math.isfinite(mean)), key=lambda name: -means[name])


def _answer(outcome: Outcome) -> str:
    ours = outcome.plan.arms[0].name
    parts = []
    for reading, what in READINGS.items():
        ranked = _ranked(outcome, reading)
        if ours not in ranked:
            return f"{ours} diverged: there is nothing to compare."
        mean = Measured(_by_seed(outcome.cells[ours, DEFAULT.name], reading))
        parts.append(f"{_place(ranked, ours)} (mean cosine {mean}) when {what} are compared")
    return f"The layers of {ours} are {listed(parts)}."


def _place(ranked: Sequence[str], name: str) -> str:
    """Such as `the least alike of 5`."""
    place, n = ranked.index(name), len(ranked)
    if place in (0, n - 1) and n > 1:
        return f"the {'most' if place == 0 else 'least'} alike of {n} methods"
    return f"number {place + 1} of {n} methods from the most alike"


def _conclusions(outcome: Outcome) -> list[str]:
    cells = {cell.arm.name: cell for cell in outcome.under(DEFAULT)}
    texts = []
    for reading, what in READINGS.items():
        ranked = [f"{name} {Measured(_by_seed(cells[name], reading))}" for name in _ranked(outcome, reading)]
        if ranked:
            texts.append(f"{what[0].upper()}{what[1:]}, from the most alike: {', '.join(ranked)}.")
    ours, *others = cells.values()
    clear = {
        reading: {
            other.arm.name: difference.value
            for other in others
            if (difference := _apart(ours, other, reading)).excludes(0)
        }
        for reading in READINGS
    }
    return [*texts, *(_sides(ours.arm.name, clear[reading], what) for reading, what in READINGS.items())]


def _sides(ours: str, clear: Mapping[str, float], what: str) -> str:
    """Say against which methods a reading sets SDD apart by more than seeds explain, and in which direction."""
    parts = []
    for word, names in (
        ("lower than in", [name for name, value in clear.items() if value < 0]),
        ("higher than in", [name for name, value in clear.items() if value > 0]),
    ):
        if names:
            parts.append(f"{word} {listed(names)}")
    told = " and ".join(parts) if parts else "not told apart from any other method's"
    return f"The similarity of {what} in {ours} is {told}."


def _picture(outcome: Outcome) -> Picture:
    words = {
        cell.arm.name: [f"{what} {Measured(_by_seed(cell, reading))}" for reading, what in READINGS.items()]
        for cell in outcome.under(DEFAULT)
    }

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        axes = Axis("block"), Axis("cosine with the next layer")
        panels = []
        for reading, what in READINGS.items():
            curves = []
            for cell in outcome.under(DEFAULT):
                rows = [found for result in cell.results if (found := neighbours(result, reading))]
                if rows:
                    blocks = [float(block) for block in range(1, len(rows[0]) + 1)]
                    curves.append(Curve(cell.arm.name, style_of(cell.arm.name, cell.arm.placement), [blocks], rows))
            panels.append(CurvePanel(what, *axes, curves))
        return draw_curves(panels)

    caption = (
        "Cosine on held-out text between the input and the output of each block (left), and between the update of "
        f"each block and of the next (right); mean of {seeds_text(outcome.plan.request.seeds)}, the band their range."
    )
    return Picture("similarity", caption, f"Mean cosines. {described(words)}", draw)


DEFINITION = Definition(
    name="similarity",
    title="How alike are the layers?",
    question="are the features of neighbouring layers more or less alike under SDD than under other methods (figure 9, "
    "whose caption and text contradict each other)?",
    method=(
        "Models that differ only in where their norms stand are trained at one rate on the same data in the same "
        "order, the four models of the paper and this project's sdd.",
        "Features are compared by their cosine, token by token, on held-out text, in two readings: the outputs of "
        "neighbouring blocks, and what neighbouring blocks add to the stream.",
        "Outputs that are alike mean blocks that change little; updates that are alike mean blocks that repeat each "
        "other.",
    ),
    arms=ARMS,
    conditions=(DEFAULT,),
    rates=Rates("common"),
    sizes=SIZES,
    read=read,
    measure=gradients_and_similarity,
    probed=True,
)
