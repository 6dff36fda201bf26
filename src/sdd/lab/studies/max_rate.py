"""The study `max-rate`: the highest learning rate that a method bears, by a geometric ramp (after arXiv 2601.19895)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Definition, Outcome
from sdd.lab.findings import NOTHING, Findings, Picture, Range, Table, Value, described, listed, seeds_text
from sdd.lab.measures import numbers, training_losses
from sdd.lab.results import RunResult
from sdd.lab.statistics import mean_factor
from sdd.lab.studies import shared
from sdd.models import model_presets
from sdd.report.runs import CONVERGENCE_SHARE
from sdd.train.schedule import learning_rate

FIRST, LAST = 1e-4, 10.0
#: A loss has diverged when the median of so many steps lies so many nats above the lowest such median before it.
WINDOW, MARGIN = 25, 0.5
#: Other margins, to see whether the answer hangs on it.
MARGINS = (0.25, MARGIN, 1.0)
#: The run of every preset.
RAMP = {
    "optim.schedule": "ramp",
    "optim.lr": LAST,
    "optim.first_lr": FIRST / LAST,
    "optim.warmup": 0,
    "steps": 1500,
    "eval_every": 300,
    "checkpoint_every": 1500,
    "probe_every": 0,
}
_POINTS = 150  # of a curve in a figure


@dataclass(frozen=True)
class Ramp:
    """What a ramp of the learning rate ended in.

    Attributes:
        rate: of the last step before the loss diverged, or of the last step; nan if the run did not learn before.
        survived: whether the loss never diverged.
        lowest: the lowest running median of the training loss before that.
        lowest_rate: the rate there.
    """

    rate: float
    survived: bool
    lowest: float
    lowest_rate: float

    def __str__(self) -> str:
        if math.isnan(self.rate):
            return NOTHING
        return f"{'>' if self.survived else ''}{self.rate:.2g}"


def running_median(losses: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """The median of the `window` (odd) losses around each step, nan where they are not all there; float64 `[steps]`."""
    values = np.asarray(losses, float)
    medians = np.full(len(values), math.nan)
    if len(values) >= window:
        half = window // 2
        views = np.lib.stride_tricks.sliding_window_view(np.where(np.isfinite(values), values, math.inf), window)
        medians[half : len(values) - half] = np.median(views, axis=1)
    return medians


def divergence(losses: Sequence[float], margin: float = MARGIN, window: int = WINDOW) -> int | None:
    """The step, from 1, at which a curve has diverged; None if it never does.

    That is the first step whose loss is not finite, or whose running median lies more than `margin` above the lowest
    one before it. A spike that is over within half a window is no divergence, and a rise in the last half window is
    not seen.

    Args:
        losses: of every step in order; steps that were not taken because the run ended count as infinite.
        margin: in nats.
        window: of the running median, in steps; odd.
    """
    medians = running_median(losses, window)
    lowest = np.fmin.accumulate(medians) if len(medians) else medians
    beyond = ~np.isfinite(np.asarray(losses, float)) | (medians > lowest + margin)
    return int(np.argmax(beyond)) + 1 if beyond.any() else None


def ramp_of(result: RunResult, margin: float = MARGIN) -> Ramp:
    """Read a run whose rate rose from its first step to its last."""
    config = result.run_config
    recorded = numbers(result, "losses") or []
    losses = [*recorded, *[math.inf] * (config.steps - len(recorded))]
    diverged = divergence(losses, margin)
    last = config.steps if diverged is None else diverged - 1
    medians = running_median(losses)[:last]
    known = np.flatnonzero(np.isfinite(medians))
    place = int(known[np.argmin(medians[known])]) if len(known) else None
    lowest = math.nan if place is None else float(medians[place])
    if place is None or not lowest < (1 - CONVERGENCE_SHARE) * losses[0]:
        return Ramp(math.nan, False, lowest, math.nan)
    rate = learning_rate(config.optim, last, config.steps)
    return Ramp(rate, diverged is None, lowest, learning_rate(config.optim, place + 1, config.steps))


Ramps = dict[tuple[str, str], dict[int, Ramp]]


def ramps(outcome: Outcome, margin: float = MARGIN) -> Ramps:
    """The ramps of every arm and condition by seed."""
    return {
        names: {result.seed: ramp_of(result, margin) for result in cell.results}
        for names, cell in outcome.cells.items()
    }


def highest(found: dict[int, Ramp]) -> str:
    """The highest rate over seeds: their geometric mean with its interval, or each where some survived or are lost."""
    each = list(found.values())
    texts = [str(ramp) for ramp in each]
    if len(set(texts)) == 1 and (each[0].survived or texts[0] == NOTHING):
        return texts[0]
    if any(ramp.survived or math.isnan(ramp.rate) for ramp in each):
        return ", ".join(texts)
    mean = mean_factor([ramp.rate for ramp in each])
    return f"{mean.value:.2g}" + (f" ({mean.low:.2g} to {mean.high:.2g})" if mean.n > 1 else "")


def read(outcome: Outcome) -> Findings:
    """The highest rate of every method at every depth."""
    found = ramps(outcome)
    return Findings(
        answer=_answer(outcome, found),
        conclusions=_conclusions(outcome, found),
        limits=[
            "A ramp passes each rate in a few steps, after training at all lower ones: a rate that it survives is not "
            "yet one to train at, and one from which a model starts untrained may be lower. Compare methods by it.",
            f"A loss counts as diverged {MARGIN:g} nats above its lowest; the table by margin says what hangs on that.",
            "Weight decay is the rate times 0.1 a step, so at a rate of 10 every matrix is replaced with each step.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _rate_table(outcome, found),
            _factor_table(outcome, found),
            _margin_table(outcome),
            _seed_table(outcome, found),
            shared.cost_table(outcome.under(outcome.plan.conditions[0]), outcome),
        ],
        pictures=[_dots(outcome, found), _curves(outcome)],
    )


def _how() -> str:
    return (
        f"The rate of the last step before the training loss diverged: its median over {WINDOW} steps more than "
        f"{MARGIN:g} nats above the lowest such median before, or not finite. With > it never did. A dash: before that "
        f"the loss had not come {CONVERGENCE_SHARE:.0%} below that of the first step. Geometric mean of the seeds with "
        "Student's 95% interval of the logarithm; where some seeds survived, each seed."
    )


def _rate_table(outcome: Outcome, found: Ramps) -> Table:
    plan = outcome.plan
    rows = [[arm.name, *(highest(found[arm.name, each.name]) for each in plan.conditions)] for arm in plan.arms]
    title = f"Highest learning rate before the loss diverges, {seeds_text(plan.request.seeds)}"
    return Table("rate", title, ["method", *(each.title for each in plan.conditions)], rows, _how())


def _factor_table(outcome: Outcome, found: Ramps) -> Table:
    """How many times the rate of each other method the first one bears."""
    plan = outcome.plan
    ours, *others = [arm.name for arm in plan.arms]

    def factor(other: str, condition: str) -> Value:
        pairs = [(found[ours, condition][seed], ramp) for seed, ramp in found[other, condition].items()]
        both = [(a.rate, b.rate) for a, b in pairs if not (a.survived or b.survived)]
        both = [(a, b) for a, b in both if math.isfinite(a * b)]
        return Range(mean_factor([a / b for a, b in both]))

    rows = [[name, *(factor(name, each.name) for each in plan.conditions)] for name in others]
    return Table(
        "factor",
        f"The highest rate of {ours} over that of the method",
        ["method", *(each.title for each in plan.conditions)],
        rows,
        "Geometric mean over the seeds in which both diverged, with Student's 95% interval of the logarithm; a dash: "
        "none.",
    )


def _margin_table(outcome: Outcome) -> Table:
    by_margin = {margin: ramps(outcome, margin) for margin in MARGINS}
    plan = outcome.plan
    rows = [
        [arm.name, *(highest(by_margin[margin][arm.name, each.name]) for each in plan.conditions for margin in MARGINS)]
        for arm in plan.arms
    ]
    columns = [f"{each.title}, {margin:g} nats" for each in plan.conditions for margin in MARGINS]
    return Table("margin", "The same by the margin that counts as divergence", ["method", *columns], rows)


def _seed_table(outcome: Outcome, found: Ramps) -> Table:
    rows = [
        [arm.name, each.title, seed, str(ramp), round(ramp.lowest, 3), float(f"{ramp.lowest_rate:.2g}")]
        for each in outcome.plan.conditions
        for arm in outcome.plan.arms
        for seed, ramp in found[arm.name, each.name].items()
    ]
    return Table(
        "seeds",
        "Every ramp: where the training loss was lowest, and where it diverged",
        ["method", "blocks", "seed", "highest rate", "lowest loss, nats a token", "rate at the lowest loss"],
        rows,
        f"Losses are running medians over {WINDOW} steps of a batch.",
    )


def _answer(outcome: Outcome, found: Ramps) -> str:
    plan = outcome.plan
    ours = plan.arms[0].name
    parts = [f"{highest(found[ours, each.name])} with {each.title}" for each in plan.conditions]
    return f"{ours} bears learning rates up to {listed(parts)}; {_extremes(outcome, found)}."


def _extremes(outcome: Outcome, found: Ramps) -> str:
    deep = outcome.plan.conditions[-1]
    ranked = _ranked(outcome, found, deep.name)
    return (
        f"with {deep.title} the most is borne by {ranked[0]} ({highest(found[ranked[0], deep.name])}), the least by "
        f"{ranked[-1]} ({highest(found[ranked[-1], deep.name])})"
    )


def _ranked(outcome: Outcome, found: Ramps, condition: str) -> list[str]:
    """Methods from the one that bears the highest rate; those that did not learn come last."""

    def height(name: str) -> float:
        each = found[name, condition].values()
        rates = [0.0 if math.isnan(ramp.rate) else math.inf if ramp.survived else ramp.rate for ramp in each]
        return float(np.median(rates))

    return sorted((arm.name for arm in outcome.plan.arms), key=height, reverse=True)


def _conclusions(outcome: Outcome, found: Ramps) -> list[str]:
    texts = []
    for each in outcome.plan.conditions:
        ranked = [f"{name} {highest(found[name, each.name])}" for name in _ranked(outcome, found, each.name)]
        texts.append(f"With {each.title}, from the highest: {'; '.join(ranked)}.")
    survivors = [
        f"{name} with {each.title}"
        for each in outcome.plan.conditions
        for name in _ranked(outcome, found, each.name)
        if all(ramp.survived for ramp in found[name, each.name].values())
    ]
    if survivors:
        texts.append(f"In every seed the loss of {listed(survivors)} never diverged.")
    return texts


def _dots(outcome: Outcome, found: Ramps) -> Picture:
    plan = outcome.plan
    names = [arm.name for arm in plan.arms]
    words = {name: [f"{each.title} {highest(found[name, each.name])}" for each in plan.conditions] for name in names}

    def cell(name: str, condition: str) -> dict[int, float]:
        """Rates by seed, nan for survivors; without those that did not learn."""
        learned = {seed: ramp for seed, ramp in found[name, condition].items() if math.isfinite(ramp.rate)}
        return {seed: math.nan if ramp.survived else ramp.rate for seed, ramp in learned.items()}

    def draw():
        from sdd.lab.figures import Axis, draw_dots

        series = {each.title: [cell(name, each.name) for name in names] for each in plan.conditions}
        return draw_dots(names, series, Axis("highest learning rate", log=True), f"a seed survived {LAST:g}")

    caption = (
        f"Highest learning rate before the loss diverges, geometric mean of {seeds_text(plan.request.seeds)}; lines "
        "are their range, crosses at the right seeds that survived the whole ramp. No mark: did not learn."
    )
    return Picture("rate", caption, f"Highest learning rates. {described(words)}", draw)


def _curves(outcome: Outcome) -> Picture:
    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, style_of

        panels = []
        axes = Axis("learning rate", log=True), Axis("training loss, nats a token")
        ceiling = 1.1 * max(result.initial_loss for result in outcome.results)
        for each in outcome.plan.conditions:
            curves = []
            for cell in outcome.under(each):
                config = cell.results[0].run_config
                kept = np.unique(np.linspace(1, config.steps, min(_POINTS, config.steps)).round().astype(int))
                rates = [learning_rate(config.optim, int(step), config.steps) for step in kept]
                curves.append(
                    Curve(cell.arm.name, style_of(cell.arm.name, cell.arm.placement), [rates], _smooth(cell, kept))
                )
            panels.append(CurvePanel(each.title, *axes, curves, ceiling))
        return draw_curves(panels)

    plan = outcome.plan
    caption = (
        f"Training loss (running median of {WINDOW} steps) against the learning rate, which rises with every step; "
        f"mean of {seeds_text(plan.request.seeds)}, the band their range."
    )
    words = "Each curve falls while the rate rises, up to the method's highest rate; the numbers are in the tables."
    return Picture("ramp", caption, words, draw)


def _smooth(cell, steps: np.ndarray) -> list[list[float]]:
    rows = []
    for result in cell.results:
        medians = running_median(numbers(result, "losses") or [])
        medians[~np.isfinite(medians)] = math.nan
        padded = np.append(medians, np.full(max(0, int(steps[-1]) - len(medians)), math.nan))
        rows.append(padded[steps - 1].tolist())
    return rows


DEFINITION = Definition(
    name="max-rate",
    title="How high may the learning rate be?",
    question="up to which learning rate does the loss of each method hold, in shallow and in deep models?",
    method=(
        f"The learning rate rises geometrically from {FIRST:g} to {LAST:g} over the run, without warm-up, in models "
        "that differ only in where their norms stand; the protocol follows arXiv 2601.19895.",
        f"The highest rate is that of the last step before the training loss diverges: its median over {WINDOW} steps "
        f"{MARGIN:g} nats above the lowest before, or a loss that is not finite.",
        "Runs go on to the end of the ramp unless they become non-finite, so that another definition can be read off "
        "the same results, which keep the loss of every step.",
    ),
    arms=tuple(
        Arm(name, name)
        for name in ("sdd", "sdd-paper", "postnorm", "deepnorm", "prenorm", "prenorm-qk", "peri", "keel")
    ),
    conditions=(DEFAULT,),
    rates=Rates("common"),
    sizes=dict.fromkeys(model_presets, RAMP),
    read=read,
    depths=(12, 64),
    measure=training_losses,
)
