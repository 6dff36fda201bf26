"""Parts of findings that several studies have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdd.lab.arms import Condition
from sdd.lab.definition import Cell, Outcome, at_edge, best_rate
from sdd.lab.findings import Interval, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.results import LEARNED_SHARE, RunResult
from sdd.lab.search import Search
from sdd.lab.statistics import Estimate, paired_difference
from sdd.placement import placements
from sdd.report.runs import CONVERGENCE_SHARE


@dataclass(frozen=True)
class Quantity:
    """A column of run results that figures show over training.

    Attributes:
        name: in captions.
        unit: in captions.
        source: the field of the result that has it.
        column: its column there.
        log: whether its axis is logarithmic.
    """

    name: str
    unit: str
    source: Literal["curve", "training"]
    column: str
    log: bool = False

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.name[0].lower()}{self.name[1:]}, {self.unit}"

    def columns(self, result: RunResult, x: str) -> tuple[list[float], list[float]]:
        """The column x of a result, and this quantity."""
        found = result.curve if self.source == "curve" else result.training
        return found[x], found[self.column]

    def axis(self):
        """The vertical axis of this quantity."""
        from sdd.lab.figures import Axis

        return Axis(self.label, log=self.log)


HELD_OUT = Quantity("Held-out loss", "nats a token", "curve", "eval_loss")
TRAINING = Quantity("Training loss", "nats a token", "training", "loss")
GRAD_NORM = Quantity("Gradient norm", "before clipping", "training", "grad_norm", log=True)


def ours(outcome: Outcome) -> str:
    """The SDD that others are set beside: the placement `sdd`, or where a study has not trained it the first other."""
    trained = [arm.placement for arm in outcome.plan.arms]
    return "sdd" if "sdd" in trained else next((name for name in trained if name.startswith("sdd")), "sdd")


def not_converged_text() -> str:
    """Table footnote: a dash marks runs that did not converge."""
    return (
        "A dash: did not converge, with how many of the seeds. That is a run whose loss, gradient or weights became "
        f"non-finite, or which ended more than {CONVERGENCE_SHARE:.0%} above its own lowest held-out loss, or less "
        f"than {CONVERGENCE_SHARE:.0%} below the loss of its first step, or less than {LEARNED_SHARE:.0%} below what "
        "token frequencies alone reach. ± is half of Student's 95% interval of the mean."
    )


def loss_at(run: RunResult, tokens: int | None) -> float:
    """The held-out loss of a run at a number of tokens, linear between evaluations, or at its end; nan if it diverged.

    Args:
        run: ended.
        tokens: None for the end.
    """
    if not run.converged:
        return math.nan
    if tokens is None:
        return run.eval_loss
    return float(np.interp(tokens, run.curve["tokens"], run.curve["eval_loss"]))


def loss_table(outcome: Outcome) -> Table:
    """Held-out loss of each method under each condition."""
    plan = outcome.plan
    columns = [outcome.under(condition) for condition in plan.conditions]
    return Table(
        "loss",
        f"Held-out loss at the end, nats a token, {seeds_text(plan.request.seeds)}",
        ["method", *(condition.title for condition in plan.conditions)],
        [[cells[0].arm.name, *(Measured(cell.losses) for cell in cells)] for cells in zip(*columns, strict=True)],
        not_converged_text(),
    )


def change(outcome: Outcome, arm: str, condition: Condition) -> Interval:
    """The change of a method's loss from the first condition to another, paired by seed."""
    losses = [outcome.cells[arm, each.name].losses for each in (condition, outcome.plan.conditions[0])]
    return Interval(paired_difference(*losses), signed=True)


def cost_table(cells: Sequence[Cell], outcome: Outcome) -> Table:
    """Parameters, tokens, speed and time of a run of each method.

    Args:
        cells: one for each method.
        outcome: has the seconds of a token.
    """
    rows = []
    for cell in cells:
        tokens = max((result.tokens for result in cell.results), default=0)
        parameters = max((result.parameters for result in cell.results), default=0)
        seconds = outcome.seconds_per_token[cell.arm.name]
        rows.append([cell.arm.name, parameters, tokens, round(1 / seconds), round(seconds * tokens)])
    return Table(
        "cost",
        "Cost of a default run",
        ["method", "parameters", "tokens", "tokens a second", "seconds in training steps"],
        rows,
        "Speed is that of training steps of all methods timed in turn on one machine, one at a time: the clocks of "
        "runs that stood beside others do not compare methods. Seconds are tokens at that speed.",
    )


def rates_table(outcome: Outcome) -> list[Table]:
    """The rates that were tried and the one that was taken; empty where rates are not tuned."""
    if outcome.plan.rates.kind != "tuned":
        return []
    rows = []
    for (arm, condition), grid in outcome.grids.items():
        tried = ", ".join(f"{rate:g}" for rate in sorted(grid))
        rows.append([arm, condition, f"{best_rate(grid):g}", tried, "yes" if at_edge(grid) else "no"])
    seeds = listed([str(seed) for seed in outcome.plan.grid_seeds])
    return [
        Table(
            "rates",
            "Learning rates",
            ["method", "setting", "taken", "tried", "at an end"],
            rows,
            f"Taken is the rate with the lowest loss on the tuning segment of the held-out text, on seeds {seeds}, "
            "which are not reported. A grid is extended while its best rate lies at an end.",
        )
    ]


def settings_table(outcome: Outcome) -> Table:
    """The settings that a search found for each method, with the number it compared."""
    rows = []
    for (arm, condition), (found, _) in outcome.searches.items():
        rates = sorted({setting.rate for setting in found.visited})
        ended = " and ".join(_ends(outcome, found)) or "no"
        rate, init = found.best
        tried = f"{rates[0]:g} to {rates[-1]:g}"
        rows.append([arm, condition, f"{rate:g}", f"x{init:g}", len(found.visited), tried, ended])
    seeds = listed([str(seed) for seed in outcome.plan.grid_seeds])
    return Table(
        "settings",
        "Learning rates and init scales that were found",
        ["method", "tokens", "rate", "init", "settings compared", "rates compared", "at an end"],
        rows,
        "Every method was searched alike: from one setting to its best neighbour, until no neighbour had a lower loss "
        f"on the tuning segment of the held-out text. Seeds {seeds}, which are not reported. The search at a length "
        "starts from the setting that was found at the length before.",
    )


def search_limits(outcome: Outcome) -> list[str]:
    """A warning that names methods whose search stopped at an end; empty if there are none."""
    ends = {names: _ends(outcome, found) for names, (found, _) in outcome.searches.items()}
    texts = [f"{arm} at {condition} ({' and '.join(end)})" for (arm, condition), end in ends.items() if end]
    return [f"These searches stopped at an end of what was tried: {listed(texts)}."] if texts else []


def _ends(outcome: Outcome, found: Search) -> list[str]:
    inits = outcome.plan.rates.inits
    limit = {min(inits): "smallest init", max(inits): "largest init"} if len(inits) > 1 else {}
    ends = [limit[found.best.init]] if found.best.init in limit else []
    return [*ends, *(["number of moves"] if found.ended_by == "moves" else [])]


def edge_limits(outcome: Outcome) -> list[str]:
    """A warning that names methods whose best rate still lies at an end of the grid; empty if there are none."""
    several = len(outcome.plan.conditions) > 1
    edges = [f"{arm} ({name})" if several else arm for (arm, name), grid in outcome.grids.items() if at_edge(grid)]
    return [f"The best rate of {listed(edges)} still lies at an end of the extended grid."] if edges else []


def general_limits(outcome: Outcome) -> list[str]:
    """Sentences on what no study of this size can show."""
    results = outcome.results
    parameters = max((result.parameters for result in results), default=0)
    tokens = max((result.tokens for result in results), default=0)
    n = outcome.plan.request.seeds
    spread = (
        "an interval over seeds needs two or more, so here there is none"
        if n == 1
        else f"an interval from {n} seeds is wide (Student's t with {n - 1} degrees of freedom) and covers initial "
        "draws and order of the data only"
    )
    return [
        *_redrawn(outcome),
        f"This is {seeds_text(n)}: {spread}.",
        f"Models have {parameters / 1e6:.1f} million parameters and see {tokens:,} tokens; the published ones have 581 "
        "million and more, and see 200 billion. What holds here need not hold there, nor the other way round.",
    ]


def _redrawn(outcome: Outcome) -> list[str]:
    """Name the methods that do not start from the init of their authors, and those that start smaller than others."""
    arms = [arm for arm in outcome.plan.arms if not arm.variant]
    small = [arm.name for arm in arms if outcome.plan.placement(arm).init == "base/2"]
    names = [arm.name for arm in arms if outcome.plan.placement(arm) != placements[arm.placement]]
    texts = []
    if small:
        start = "starts" if len(small) == 1 else "start"
        texts.append(f"{listed(small)} {start} from half the std 1/sqrt(2.5 d), by definition.")
    if names:
        start, their = ("starts", "its") if len(names) == 1 else ("start", "their")
        texts.append(
            f"{listed(names)} {start} from std 1/sqrt(2.5 d), not from {their} authors' 0.02, which at the widths of "
            "their models is about the same."
        )
    return texts


def curves_picture(
    name: str,
    panels: Mapping[str, Sequence[Cell]],
    x: str = "tokens",
    quantity: Quantity = HELD_OUT,
    *,
    ceiling: float | None = None,
    levels: Mapping[str, float] | None = None,
    reference: tuple[str, float] | None = None,
) -> Picture:
    """Draw a quantity over training, a panel for each setting and a line for each method.

    Args:
        name: of the figure's files.
        panels: the cells of each panel, by title.
        x: "tokens" or "seconds".
        quantity: the vertical axis.
        ceiling: the greatest value shown; by default a little above the loss before training, or none on a
            logarithmic axis.
        levels: horizontal lines that are labelled in the panels, by name.
        reference: a horizontal line that is named in the legend.
    """
    seeds = max(len(cell.results) for cells in panels.values() for cell in cells)
    ends = {
        title: [f"{cell.arm.name} ends at {_end(cell, quantity)}" for cell in cells] for title, cells in panels.items()
    }

    def draw():
        from sdd.draw.style import REFERENCE_STYLE
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves

        everything = [result for cells in panels.values() for cell in cells for result in cell.results]
        untrained = math.inf if quantity.log else 1.05 * float(np.median([run.initial_loss for run in everything]))
        axes = (
            Axis("tokens", counts=True) if x == "tokens" else Axis("seconds in training steps"),
            quantity.axis(),
        )
        lines = []
        if reference:
            end = max((at for run in everything for at in quantity.columns(run, x)[0]), default=0.0)
            lines = [Curve(reference[0], REFERENCE_STYLE, [[0.0, end]], [[reference[1]] * 2])]
        return draw_curves(
            [
                CurvePanel(title, *axes, [*_curves(cells, x, quantity), *lines], ceiling or untrained, levels)
                for title, cells in panels.items()
            ]
        )

    caption = (
        f"{quantity.name} over training, mean of {seeds_text(seeds)}, the band their range; a line ends where a run "
        "does."
    )
    return Picture(name, caption, f"{quantity.name} in {quantity.unit} against {x}. {described(ends)}", draw)


def difference_words(difference: Estimate) -> str:
    """Such as `0.089 ± 0.010 nats below`; says where an interval holds zero."""
    if math.isnan(difference.value):
        return "in no seed beside"
    text = f"{abs(difference.value):.3f}"
    if not math.isnan(difference.half_width):
        text += f" ± {difference.half_width:.3f}"
    side = "below" if difference.value < 0 else "above"
    unclear = "" if difference.n < 2 or difference.excludes(0) else " (not told apart from zero)"
    return f"{text} nats{unclear} {side}"


def factor_words(factor: Estimate) -> str:
    """Write a factor with its interval, for a sentence."""
    if math.isnan(factor.low):
        return f"{factor.value:.2f} times"
    return f"{factor.value:.2f} times (95% interval {factor.low:.2f} to {factor.high:.2f})"


def _end(cell: Cell, quantity: Quantity) -> Measured:
    """The last value of a quantity by seed; of held-out losses only those of runs that converged."""
    if quantity is HELD_OUT:
        return Measured(cell.losses)
    return Measured({result.seed: [math.nan, *quantity.columns(result, "tokens")[1]][-1] for result in cell.results})


def _curves(cells: Sequence[Cell], x: str, quantity: Quantity):
    from sdd.lab.figures import Curve, styles_of

    curves: list[Curve] = []
    styles = styles_of([(cell.arm.name, cell.arm.placement) for cell in cells])
    for cell in cells:
        columns = [quantity.columns(result, x) for result in cell.results]
        longest = max((xs for xs, _ in columns), key=lambda xs: xs[-1:])
        # a run that ended early is a gap from there on; one without a point is a gap everywhere
        values = [np.interp(longest, xs or [0.0], ys or [math.nan], right=math.nan).tolist() for xs, ys in columns]
        curves.append(Curve(cell.arm.name, styles[cell.arm.name], [longest], values))
    return curves
