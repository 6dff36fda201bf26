"""The study `gradients`: figure 7 of arXiv 2502.15499, gradient norms by layer and group of matrices."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome
from sdd.lab.findings import Findings, Picture, Range, Table, Value, described, listed, seeds_text
from sdd.lab.measures import GROUPS, gradients_and_similarity, numbers
from sdd.lab.results import RunResult
from sdd.lab.statistics import Estimate, mean_factor
from sdd.lab.studies import shared


def read(outcome: Outcome) -> Findings:
    """How evenly gradients spread over the layers, by group of matrices."""
    return Findings(
        answer=_answer(outcome),
        conclusions=_conclusions(outcome),
        limits=[
            "The gradient by V of an SDD layer goes with 1/||V||: its size depends on the init and does not compare "
            "methods. How it spreads over the layers does.",
            "All methods share one rate; each curve is that of one batch at one step.",
            "The paper's figure has no printed numbers, so only its shape can be compared.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _spread_table(outcome),
            _tilt_table(outcome),
            shared.loss_table(outcome),
            shared.cost_table(outcome.under(DEFAULT), outcome),
        ],
        pictures=[_picture(outcome, group) for group in GROUPS],
    )


def layers(result: RunResult, group: str, place: int = -1) -> list[float]:
    """Gradient norms of a group from the first block to the last, at a kept step; empty if there are none.

    Args:
        result: measured by `sdd.lab.measures.group_gradients`.
        group: one of `GROUPS`.
        place: of the step among those kept, 0 for the first step, -1 for the last.
    """
    rows = numbers(result, "norms", group)
    return rows[place] if rows else []


def spread(norms: Sequence[float]) -> float:
    """The largest norm of a layer over the smallest; nan without layers or where one is zero or not finite."""
    return max(norms) / min(norms) if _sound(norms) else math.nan


def tilt(norms: Sequence[float]) -> float:
    """The geometric mean of the first half of the layers over that of the last half; nan as for `spread`.

    Of an odd number of layers the middle one belongs to neither half.
    """
    half = len(norms) // 2
    if not half or not _sound(norms):
        return math.nan
    logs = np.log(norms)
    return math.exp(logs[:half].mean() - logs[-half:].mean())


def _sound(norms: Sequence[float]) -> bool:
    return bool(norms) and all(0 < norm < math.inf for norm in norms)


def _over_seeds(values: Sequence[float]) -> Estimate:
    return mean_factor([value for value in values if math.isfinite(value)])


def _spreads(cell: Cell, group: str, place: int = -1) -> Estimate:
    return _over_seeds([spread(layers(result, group, place)) for result in cell.results])


def _spread_table(outcome: Outcome) -> Table:
    rows: list[list[Value]] = [
        [cell.arm.name, when, *(Range(_spreads(cell, group, place)) for group in GROUPS)]
        for cell in outcome.under(DEFAULT)
        for place, when in _moments(outcome).items()
    ]
    return Table(
        "spread",
        f"Largest gradient norm of a layer over the smallest, {seeds_text(outcome.plan.request.seeds)}",
        ["method", "step", *GROUPS],
        rows,
        "1 is the same in every layer. Geometric mean over seeds with Student's 95% interval of the logarithm. "
        f"{_groups_text()} A dash: a gradient was zero or not finite.",
    )


def _tilt_table(outcome: Outcome) -> Table:
    rows: list[list[Value]] = [
        [
            cell.arm.name,
            when,
            *(
                Range(_over_seeds([tilt(layers(result, group, place)) for result in cell.results]), digits=3)
                for group in GROUPS
            ),
        ]
        for cell in outcome.under(DEFAULT)
        for place, when in _moments(outcome).items()
    ]
    return Table(
        "tilt",
        "Gradient norm of the first half of the layers over that of the last half",
        ["method", "step", *GROUPS],
        rows,
        "Geometric means. Below 1 gradients fade on their way down, above 1 they grow.",
    )


def _groups_text() -> str:
    sites = [f"{group} is {listed([name.split('.')[1] for name in names])}" for group, names in GROUPS.items()]
    return f"Groups are those of the authors' code: {'; '.join(sites)}."


def _moments(outcome: Outcome) -> Mapping[int, str]:
    """The kept steps that tables and figures show, by place: the first, one in the middle, the last."""
    steps = next((found for result in outcome.results if (found := numbers(result, "steps"))), [1.0])
    places = dict.fromkeys((0, len(steps) // 2, len(steps) - 1))
    return {place: f"{steps[place]:g}" for place in places}


def _worst(cell: Cell) -> Estimate:
    """The spread of the group in which it is widest, at the last probed step."""
    found = [_spreads(cell, group) for group in GROUPS]
    return max(found, key=lambda each: each.value if math.isfinite(each.value) else -1.0)


def _answer(outcome: Outcome) -> str:
    """Rank methods by the widest spread of their groups at the last probed step."""
    widest = {cell.arm.name: _worst(cell) for cell in outcome.under(DEFAULT)}
    ranked = sorted(widest, key=lambda name: _ascending(widest[name]))
    parts = [f"{Range(widest[name])} times in {name}" for name in ranked]
    last = list(_moments(outcome).values())[-1]
    return f"At step {last} the gradient norms of a group differ from layer to layer by at most {listed(parts)}."


def _ascending(estimate: Estimate) -> float:
    return estimate.value if math.isfinite(estimate.value) else math.inf


def _conclusions(outcome: Outcome) -> list[str]:
    texts = []
    for group in GROUPS:
        found = {cell.arm.name: _spreads(cell, group) for cell in outcome.under(DEFAULT)}
        ranked = sorted(found, key=lambda name: _ascending(found[name]))
        texts.append(f"{group}, from the most even: {', '.join(f'{name} {Range(found[name])}' for name in ranked)}.")
    broken = [cell.arm.name for cell in outcome.under(DEFAULT) if cell.broken]
    if broken:
        texts.append(f"{listed(broken)} did not converge here: these gradients are those of a run that broke.")
    return texts


def _picture(outcome: Outcome, group: str) -> Picture:
    moments = _moments(outcome)
    words = {
        cell.arm.name: [f"{Range(_spreads(cell, group, place))} at step {when}" for place, when in moments.items()]
        for cell in outcome.under(DEFAULT)
    }

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        axes = Axis("block"), Axis(f"gradient norm of {group}", log=True)
        panels = []
        for place, when in moments.items():
            curves = []
            for cell in outcome.under(DEFAULT):
                kept = [norms for result in cell.results if (norms := layers(result, group, place))]
                if kept:
                    numbered = [float(block) for block in range(1, len(kept[0]) + 1)]
                    rows = [[norm or math.nan for norm in norms] for norms in kept]
                    curves.append(Curve(cell.arm.name, style_of(cell.arm.name, cell.arm.placement), [numbered], rows))
            panels.append(CurvePanel(f"step {when}", *axes, curves))
        return draw_curves(panels, columns=3)

    caption = (
        f"Gradient norm of {group} by layer at three steps, before clipping; mean of "
        f"{seeds_text(outcome.plan.request.seeds)}, the band their range."
    )
    return Picture(
        f"gradients-{group.replace('_', '-')}", caption, f"Largest norm over smallest. {described(words)}", draw
    )


#: The runs that the study `similarity` shares.
ARMS = tuple(Arm(name, name) for name in ("sdd", "sdd-released", "prenorm-qk", "postnorm", "deepnorm"))
SIZES = {"nano": {"optim.lr": 1e-3, "steps": 2000, "optim.warmup": 100}, "micro": {"optim.lr": 5e-4}}

DEFINITION = Definition(
    name="gradients",
    title="Do gradients reach every layer?",
    question="how evenly do the gradients of each group of matrices spread over the layers (figure 7)?",
    method=(
        "Models that differ only in where their norms stand are trained at one rate on the same data in the same "
        "order, the four models of the paper and this project's sdd.",
        "The probe records the gradient of every matrix before clipping, at the first step, during training and at "
        "the end.",
        "The norm of a group is that of all its entries in one block; its spread is the largest over the smallest "
        "layer.",
    ),
    arms=ARMS,
    conditions=(DEFAULT,),
    rates=Rates("common"),
    sizes=SIZES,
    read=read,
    measure=gradients_and_similarity,
    probed=True,
)
