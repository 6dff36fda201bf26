"""The study `depth`: figure 10 of arXiv 2502.15499 and beyond, the loss against the number of blocks."""

import math
from collections.abc import Sequence

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome
from sdd.lab.findings import Findings, Measured, Picture, Range, Table, Value, described, listed, seeds_text
from sdd.lab.measures import numbers, stream_gradients
from sdd.lab.results import RunResult
from sdd.lab.statistics import mean_factor, paired_difference
from sdd.lab.studies import shared

#: The last part of a run whose gradient norms are averaged.
_LATE = 0.25


def read(outcome: Outcome) -> Findings:
    """Loss, gradient norm and the decay of gradients along the model, by depth."""
    return Findings(
        answer=_answer(outcome),
        conclusions=_conclusions(outcome),
        limits=[
            f"{_rates(outcome)} Width, steps and tokens are the same at every depth, so deep models see fewer tokens a "
            "parameter and are far deeper than anyone would build them at this width.",
            "What does not learn in this many steps may learn in more.",
            *shared.edge_limits(outcome),
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            shared.loss_table(outcome),
            _end_table(outcome),
            _norm_table(outcome),
            _stream_table(outcome),
            *shared.rates_table(outcome),
            shared.cost_table(outcome.under(outcome.plan.conditions[0]), outcome),
        ],
        pictures=[*([_by_depth(outcome)] if len(_blocks(outcome)) > 1 else []), _curves(outcome), _along(outcome)],
    )


def late_norm(result: RunResult) -> float:
    """Mean gradient norm before clipping over the last quarter of a run; nan if it ended early."""
    norms = result.training.get("grad_norm", [])
    kept = norms[-max(1, round(_LATE * len(norms))) :]
    return float(np.mean(kept)) if result.step == result.run_config.steps and kept else math.nan


def stream_ratio(result: RunResult, place: int) -> float:
    """Gradient by the input of the first block over that by the output of the last, rms; nan if there is none.

    Args:
        result: measured by `sdd.lab.measures.stream_gradients`.
        place: 0 for the first step, -1 for the last.
    """
    rows = numbers(result, "grad_rms")
    if not rows or not rows[place] or not rows[place][-1] > 0:
        return math.nan
    return rows[place][0] / rows[place][-1]


def _blocks(outcome: Outcome) -> list[int]:
    return list(outcome.plan.depths)


def _cells(outcome: Outcome, arm: str) -> list[Cell]:
    """The cells of a method by rising depth."""
    return [outcome.cells[arm, condition.name] for condition in outcome.plan.conditions]


def _end_table(outcome: Outcome) -> Table:
    """Where runs ended, converged or not: it tells slow ones from those that broke."""
    rows = [
        [arm.name, *(Measured({run.seed: run.eval_loss for run in cell.results}) for cell in _cells(outcome, arm.name))]
        for arm in outcome.plan.arms
    ]
    return Table(
        "end",
        "The same of all runs, whether they converged or not",
        ["method", *(each.title for each in outcome.plan.conditions)],
        rows,
        f"Token frequencies alone reach {outcome.results[0].token_frequencies:.3f}. A dash: became non-finite.",
    )


def _runs(outcome: Outcome, arm: str) -> list[tuple[RunResult, ...]]:
    """The runs of a method by depth, each in the order of the seeds."""
    return [cell.results for cell in _cells(outcome, arm)]


def _norm_table(outcome: Outcome) -> Table:
    rows = [
        [arm.name, *(_geometric([late_norm(run) for run in cell.results]) for cell in _cells(outcome, arm.name))]
        for arm in outcome.plan.arms
    ]
    seeds = seeds_text(outcome.plan.request.seeds)
    return Table(
        "grad-norm",
        f"Gradient norm before clipping, mean of the last quarter of training, {seeds}",
        ["method", *(each.title for each in outcome.plan.conditions)],
        rows,
        "Geometric mean over seeds, in brackets Student's 95% interval of the logarithm. A dash: the run became "
        "non-finite.",
    )


def _stream_table(outcome: Outcome) -> Table:
    rows: list[list[Value]] = []
    for arm in outcome.plan.arms:
        for place, when in ((0, "first step"), (-1, "end")):
            cells = _cells(outcome, arm.name)
            ratios = [_geometric([stream_ratio(run, place) for run in cell.results]) for cell in cells]
            rows.append([arm.name, when, *ratios])
    return Table(
        "stream",
        "Gradient by the input of the first block over that by the output of the last",
        ["method", "at", *(each.title for each in outcome.plan.conditions)],
        rows,
        "Root mean squares over tokens and features, geometric mean over seeds; the end is the last probed step. Far "
        "below 1 gradients vanish on their way down, far above they explode.",
    )


def _geometric(values: Sequence[float]) -> Range:
    kept = [value for value in values if math.isfinite(value) and value > 0]
    return _Significant(mean_factor(kept))


class _Significant(Range):
    """A positive number that may be tiny, with three significant digits."""

    def __str__(self) -> str:
        if math.isnan(self.estimate.value):
            return "-"
        value, low, high = (f"{x:.3g}" for x in (self.estimate.value, self.estimate.low, self.estimate.high))
        return value if math.isnan(self.estimate.low) else f"{value} ({low} to {high})"


def _rates(outcome: Outcome) -> str:
    if outcome.plan.rates.kind == "common":
        return (
            f"All methods share the learning rate {outcome.plan.base.optim.lr:g} at every depth: a dash says that a "
            "method does not learn at this rate, not that it could not at another (--tuned asks that)."
        )
    return "Each method has its best rate at each depth."


def _broken(outcome: Outcome, arm: str) -> list[int]:
    """The depths at which most seeds of a method do not converge."""
    cells = _cells(outcome, arm)
    return [blocks for blocks, cell in zip(_blocks(outcome), cells, strict=True) if cell.broken]


def _answer(outcome: Outcome) -> str:
    ours, blocks = outcome.plan.arms[0].name, _blocks(outcome)
    firm = [arm.name for arm in outcome.plan.arms if not _broken(outcome, arm.name)]
    others = [arm.name for arm in outcome.plan.arms if arm.name not in firm]
    losses = [Measured(cell.losses) for cell in _cells(outcome, ours)]
    broken = _broken(outcome, ours)
    several = len(blocks) > 1
    if broken:
        own = f"{ours} does not train with {listed([str(each) for each in broken])} blocks"
    elif several:
        where = f"from {blocks[0]} to {blocks[-1]} blocks"
        own = f"{ours} trains at every depth {where} (loss {losses[0]} at the first, {losses[-1]} at the last)"
    else:
        own = f"{ours} trains with {blocks[0]} blocks (loss {losses[0]})"
    parts = [own]
    if also := [name for name in firm if name != ours]:
        where = " at every depth" if several else f" with {blocks[0]}" if broken else ""
        too = "" if broken else " too"
        parts.append(f"{listed(also)} {'trains' if len(also) == 1 else 'train'}{where}{too}")
    if lost := [name for name in others if name != ours]:
        where = " at some depth" if several else ""
        parts.append(f"{listed(lost)} {'fails' if len(lost) == 1 else 'fail'}{where}")
    return "; ".join(parts) + "."


def _conclusions(outcome: Outcome) -> list[str]:
    texts = []
    for arm in outcome.plan.arms:
        if broken := _broken(outcome, arm.name):
            texts.append(f"{arm.name} does not converge with {listed([str(each) for each in broken])} blocks.")
    for arm in outcome.plan.arms:
        cells = [cell for cell in _cells(outcome, arm.name) if not cell.broken]
        if len(cells) > 1:
            first, last = cells[0], cells[-1]
            change = paired_difference(last.losses, first.losses)
            texts.append(
                f"{arm.name} ends {shared.difference_words(change)} its own {first.condition.title} with "
                f"{last.condition.title}."
            )
    deepest = outcome.plan.conditions[-1]
    losses = {cell.arm.name: Measured(cell.losses) for cell in outcome.under(deepest) if not cell.broken}
    ranked = sorted(losses, key=lambda name: losses[name].estimate.value)
    if len(ranked) > 1:
        numbered = ", ".join(f"{name} {losses[name]}" for name in ranked)
        texts.append(f"With {deepest.title}, from the lowest loss: {numbered}.")
    return texts


def _curves(outcome: Outcome) -> Picture:
    """Losses over training at the greatest depth: which method is slow there, and whether it catches up."""
    deepest = outcome.plan.conditions[-1]
    return shared.curves_picture("curves", {deepest.title: outcome.under(deepest)})


def _by_depth(outcome: Outcome) -> Picture:
    names = [arm.name for arm in outcome.plan.arms]
    words = {
        name: [f"{cell.condition.title} {Measured(cell.losses)}" for cell in _cells(outcome, name)] for name in names
    }

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        blocks = [float(each) for each in _blocks(outcome)]
        curves = [
            Curve(
                arm.name,
                style_of(arm.name, arm.placement),
                [blocks],
                [[run.eval_loss for run in runs] for runs in zip(*_runs(outcome, arm.name), strict=True)],
            )
            for arm in outcome.plan.arms
        ]
        frequencies = {"token frequencies": outcome.results[0].token_frequencies}
        axes = Axis("blocks", log=True), shared.HELD_OUT.axis()
        return draw_curves([CurvePanel("", *axes, curves, levels=frequencies)])

    caption = (
        f"Held-out loss at the end against depth, mean of {seeds_text(outcome.plan.request.seeds)}, the band their "
        "range. Near or above the line a model has learned nothing from the context; a gap: became non-finite."
    )
    return Picture("depth", caption, f"Held-out loss in nats a token. {described(words)}", draw)


def _along(outcome: Outcome) -> Picture:
    """The gradient by the residual stream along the deepest models, at the first step and at the end."""
    deepest = outcome.plan.conditions[-1]
    cells = outcome.under(deepest)
    words = {
        cell.arm.name: [
            f"{_geometric([stream_ratio(run, place) for run in cell.results])} {when}"
            for place, when in ((0, "at the first step"), (-1, "at the end"))
        ]
        for cell in cells
    }

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        axes = Axis("block"), Axis("gradient by the stream, rms", log=True)
        panels = []
        for place, title in ((0, "first step"), (-1, "end")):
            curves = []
            for cell in cells:
                rows = [numbers(run, "grad_rms") for run in cell.results]
                kept = [[value or math.nan for value in row[place]] for row in rows if row and row[place]]
                layers = [float(layer) for layer in range(len(kept[0]))] if kept else []
                if kept:
                    curves.append(Curve(cell.arm.name, style_of(cell.arm.name, cell.arm.placement), [layers], kept))
            panels.append(CurvePanel(f"{deepest.title}, {title}", *axes, curves))
        return draw_curves(panels)

    caption = (
        f"Root mean square of the loss gradient by the residual stream, from the first block's input to the last "
        f"block's output, with {deepest.title}; mean of {seeds_text(outcome.plan.request.seeds)}, the band their range."
    )
    return Picture("along", caption, f"Gradient at the first block's input over the last. {described(words)}", draw)


DEFINITION = Definition(
    name="depth",
    title="How deep can it be?",
    question="to what depth does each method train, and what does depth do to its loss?",
    method=(
        "Narrow models that differ only in where their norms stand and in their number of blocks are trained on the "
        "same data in the same order.",
        "One learning rate is common to all methods and depths, low enough for each to train when it is shallow.",
        "The loss is that of held-out text at the end; the gradients by the residual stream are those that the probe "
        "recorded at the first step and at the end.",
    ),
    arms=tuple(
        Arm(name, name) for name in ("sdd", "sdd-released", "prenorm-qk", "postnorm", "deepnorm", "peri", "keel")
    ),
    conditions=(DEFAULT,),
    rates=Rates("common"),
    sizes={
        "nano": {
            "model.d_model": 32,
            "model.d_ff": 88,
            "model.n_heads": 2,
            "model.n_kv_heads": 1,
            "optim.lr": 1e-3,
            "optim.warmup": 60,
            "steps": 600,
            "eval_every": 100,
            "checkpoint_every": 200,
        }
    },
    read=read,
    tuned_rates=Rates("tuned", (0.5, 1.0, 2.0, 4.0), tuning_seeds=1),
    seeds=2,
    depths=(8, 16, 32, 64, 128, 256),
    measure=stream_gradients,
    probed=True,
)
