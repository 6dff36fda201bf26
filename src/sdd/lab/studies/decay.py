"""The study `decay`: whether rate times decay sets the size of V, and what that does to the loss.

With AdamW every element of V moves by about the rate lr a step, and of moves in random directions the squares add up.
Decay d shrinks V by (1 - lr d), so that

    rms(V)^2 <- (1 - lr d)^2 rms(V)^2 + lr^2     and, at rest,     rms(V) = sqrt(lr / (2 d)).

The first is followed along the schedule from the first draw on; the second is reached after some 1 / (2 lr d) steps.
"""

import math
from collections.abc import Sequence

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Condition
from sdd.lab.definition import Outcome
from sdd.lab.findings import Measured, Picture, Table, described, seeds_text
from sdd.lab.results import RunResult
from sdd.lab.studies.changes import Change, OneAtATime, Own, View, define, end_words, spread_words
from sdd.train import RunConfig
from sdd.train.schedule import learning_rate

#: How far the rms of V may lie from the formula's, as a factor, for the formula to hold.
_CLOSE = 1.25


def expected_rms(config: RunConfig, start: float) -> list[float]:
    """The rms of V by the formula, before the first step and after each one.

    Args:
        config: of a run under AdamW.
        start: the rms of the first draw.
    """
    decay = config.optim.weight_decay if config.optim.sdd_weight_decay is None else config.optim.sdd_weight_decay
    square, found = start**2, [start]
    for step in range(1, config.steps + 1):
        lr = learning_rate(config.optim, step, config.steps)
        square = (1 - lr * decay) ** 2 * square + lr**2
        found.append(math.sqrt(square))
    return found


def at_rest(config: RunConfig) -> float:
    """sqrt(lr / (2 d)) at the peak rate; infinite without decay."""
    decay = config.optim.weight_decay if config.optim.sdd_weight_decay is None else config.optim.sdd_weight_decay
    return math.sqrt(config.optim.lr / (2 * decay)) if decay else math.inf


def measured_rms(run: RunResult) -> float:
    """The median over the SDD layers of the rms of V at the last probed step; nan if none was probed."""
    return run.probe.get("v_rms", [math.nan])[-1] if run.converged else math.nan


def formula_rms(run: RunResult) -> float:
    """The formula's value at the last probed step; nan if none was probed."""
    if "v_rms" not in run.probe:
        return math.nan
    steps = round(run.probe["tokens"][-1] / run.run_config.tokens_per_step)
    return expected_rms(run.run_config, run.probe["v_rms"][0])[steps - 1]  # a probe looks before the step's update


def _own(outcome: Outcome, views: Sequence[View]) -> Own:
    runs = [run for view in views for cell in view.cells.values() for run in cell.results]
    pairs = [(measured_rms(run), formula_rms(run)) for run in runs]
    ratios = [measured / formula for measured, formula in pairs if math.isfinite(measured)]
    rests = [
        measured / rest
        for run, (measured, _) in zip(runs, pairs, strict=True)
        if math.isfinite(measured) and (rest := _rest(run))
    ]
    moved = spread_words(SHAPE, views[0])
    answer = None
    if ratios:
        holds = all(map(_close, ratios))
        word = ("Yes" if all(map(_close, rests)) else "On the way there, yes") if holds else "Not within a quarter"
        loss = f"; beside that of {SHAPE.base.name} the loss moves {moved} nats" if moved else ""
        answer = (
            f"{word}: after {end_words(outcome)} tokens rms(V) is {min(ratios):.2f} to {max(ratios):.2f} times what "
            f"the formula gives along the schedule, {min(formula for _, formula in pairs):.3f} to "
            f"{max(formula for _, formula in pairs):.3f}{loss}."
        )
    limits = [
        *_unrested(rests),
        "The formula takes moves as random from step to step and of size lr: early in training they are neither, and "
        "Adam's moves are smaller where gradients are noise of changing size.",
        "Only V decays otherwise here: the plain matrices keep the decay of the base.",
    ]
    return Own(answer, limits=limits, tables=[_table(outcome, views)], pictures=[_picture(outcome, views)])


def _close(ratio: float) -> bool:
    return 1 / _CLOSE <= ratio <= _CLOSE


def _rest(run: RunResult) -> float:
    """The rms of V at rest at the peak rate; 0 where V grows without end or the run did not converge."""
    rest = at_rest(run.run_config)
    return rest if run.converged and math.isfinite(rest) else 0.0


def _unrested(rests: Sequence[float]) -> list[str]:
    """A sentence, where V has not come to rest in every run that decays."""
    if all(map(_close, rests)):
        return []
    return [
        f"V has not come to rest: it ends at {min(rests):.2f} to {max(rests):.2f} times sqrt(lr / (2 decay)) at the "
        "peak rate. What is shown is the way there; a falling rate moves the place of rest too."
    ]


def _table(outcome: Outcome, views: Sequence[View]) -> Table:
    rows = []
    for view in views:
        for name, cell in view.cells.items():
            runs = [run for run in cell.results if run.converged]
            start = {run.seed: run.probe.get("v_rms", [math.nan])[0] for run in runs}
            end = {run.seed: measured_rms(run) for run in runs}
            formula = {run.seed: formula_rms(run) for run in runs}
            ratio = {seed: end[seed] / formula[seed] for seed in end}
            turn = {run.seed: 1e3 * run.probe.get("v_angle", [math.nan])[-1] for run in runs}
            rest = at_rest(cell.results[0].run_config)
            rows.append(
                [
                    name,
                    f"{cell.rate:g}",
                    *(Measured(values) for values in (start, end, formula)),
                    "grows" if math.isinf(rest) else f"{rest:.3f}",
                    Measured(ratio, 2),
                    Measured(turn, 2),
                ]
            )
    return Table(
        "rms",
        f"rms of V, median over the SDD layers, {seeds_text(outcome.plan.request.seeds)}",
        [
            "method",
            "rate",
            "at first",
            f"at {end_words(outcome)} tokens",
            "by the formula",
            "at rest at the peak rate",
            "measured / formula",
            "turn in the last probed step, mrad",
        ],
        rows,
        "By the formula: rms(V)^2 <- (1 - lr d)^2 rms(V)^2 + lr^2 along the schedule, from the first draw on. At rest: "
        "sqrt(lr / (2 d)).",
    )


def _picture(outcome: Outcome, views: Sequence[View]) -> Picture:
    lines = {
        f"rate {next(iter(view.cells.values())).rate:g}": {
            name: runs
            for name, cell in view.cells.items()
            if (runs := [run for run in cell.results if run.converged and "v_rms" in run.probe])
        }
        for view in views
    }

    def draw():
        from sdd.draw.style import INK, Style
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, series_styles

        panels = []
        for title, runs_of in lines.items():
            curves = []
            for (name, runs), style in zip(runs_of.items(), series_styles(), strict=False):
                first = runs[0]
                xs, start = first.probe["tokens"], first.probe["v_rms"][0]
                ys = [np.interp(xs, run.probe["tokens"], run.probe["v_rms"]).tolist() for run in runs]
                expected = expected_rms(first.run_config, start)
                by_formula = [expected[round(at / first.run_config.tokens_per_step) - 1] for at in xs]
                curves += [Curve(name, style, [xs], ys), Curve("formula", Style(INK, "", (3, 2)), [xs], [by_formula])]
            panels.append(CurvePanel(title, Axis("tokens", counts=True), Axis("rms of V", log=True), curves))
        return draw_curves(panels)

    words = {
        f"{title}, {name}": [f"{measured_rms(runs[0]):.3g}, by the formula {formula_rms(runs[0]):.3g}"]
        for title, runs_of in lines.items()
        for name, runs in runs_of.items()
    }
    caption = (
        f"rms of V over training, median over the SDD layers, {seeds_text(outcome.plan.request.seeds)}; dashed, the "
        "formula along the schedule."
    )
    return Picture("rms", caption, f"rms of V against tokens. At the end: {described(words)}", draw)


SHAPE = OneAtATime(
    base=Arm("decay0.1", "sdd-v1", {"optim.sdd_weight_decay": 0.1}),
    changes=[
        Change(Arm(f"decay{value:g}", "sdd-v1", {"optim.sdd_weight_decay": value}), f"decay of {value:g} on V")
        for value in (0.0, 0.01, 0.03, 0.3, 1.0)
    ],
    own=_own,
)

DEFINITION = define(
    SHAPE,
    "decay",
    "Does rate x decay set the size of V?",
    "does decay on V act through rms(V) = sqrt(lr / (2 decay)), and does the loss depend on it?",
    (
        "SDD computes nothing from V but its direction, which turns by about lr / rms(V) a step; the study changes the "
        "decay on V, and on V alone.",
        "All are trained at {rates}, with the same data in the same order.",
        "The rms of V at the end, median over the SDD layers, is set beside what rate and decay give along the "
        "schedule.",
    ),
    length=1_000_000,
    probed=True,
    conditions=(DEFAULT, Condition("half", "half the rate", rate_factor=0.5)),
)
