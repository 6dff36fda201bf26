"""Parts of findings that several studies have."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sdd.lab.definition import Cell, Outcome
from sdd.lab.findings import Measured, Picture, Table, Value, listed, seeds_text
from sdd.lab.results import LEARNED_SHARE, RunResult
from sdd.lab.statistics import Estimate
from sdd.lab.tuning import at_edge, best_rate
from sdd.placement import placements
from sdd.report.runs import CONVERGENCE_SHARE

LOSS_UNIT = "held-out loss, nats a token"


def loss_axis():
    """The axis of held-out losses."""
    from sdd.lab.figures import Axis

    return Axis(LOSS_UNIT)


def not_converged_text() -> str:
    """What a dash is."""
    return (
        "A dash: did not converge, with how many of the seeds. That is a run whose loss, gradient or weights became "
        f"non-finite, or which ended more than {CONVERGENCE_SHARE:.0%} above its own lowest held-out loss, or less "
        f"than {CONVERGENCE_SHARE:.0%} below the loss of its first step, or less than {LEARNED_SHARE:.0%} below what "
        "token frequencies alone reach. ± is half of Student's 95% interval of the mean."
    )


def cost_table(cells: Sequence[Cell], outcome: Outcome) -> Table:
    """Parameters, tokens, speed and time of a run of each method; a cell each."""
    rows: list[list[Value]] = []
    for cell in cells:
        tokens = max((result.tokens for result in cell.results), default=0)
        parameters = max((result.parameters for result in cell.results), default=0)
        cost = outcome.seconds_per_token[cell.arm.name]
        rows.append([cell.arm.name, parameters, tokens, round(1 / cost), round(cost * tokens)])
    return Table(
        "cost",
        "Cost of a default run",
        ["method", "parameters", "tokens", "tokens a second", "seconds in training steps"],
        rows,
        "Speed is that of training steps of all methods timed in turn on one machine, one at a time: the clocks of "
        "runs that stood beside others do not compare methods. Seconds are tokens at that speed.",
    )


def rates_table(outcome: Outcome) -> list[Table]:
    """Which rates were tried, and which was taken; empty where rates are not tuned."""
    if outcome.plan.rates.kind != "tuned":
        return []
    rows = []
    for (arm, condition), grid in outcome.grids.items():
        tried = ", ".join(f"{rate:g}" for rate in sorted(grid))
        end = "yes" if at_edge(grid) else "no"
        rows.append([arm, condition, f"{best_rate(grid):g}", tried, end])
    seeds = listed([str(seed) for seed in outcome.plan.tuning_seeds])
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


def general_limits(outcome: Outcome) -> list[str]:
    """What no study of this size can say."""
    results = outcome.results
    parameters = max((result.parameters for result in results), default=0)
    tokens = max((result.tokens for result in results), default=0)
    n = outcome.plan.request.seeds
    spread = (
        "an interval over seeds needs two or more, so here there is none"
        if n == 1
        else (
            f"an interval from {n} seeds is wide (Student's t with {n - 1} degrees of freedom) and covers initial "
            "draws and order of the data only"
        )
    )
    return [
        *_redrawn(outcome),
        f"This is {seeds_text(n)}: {spread}.",
        f"Models have {parameters / 1e6:.1f} million parameters and see {tokens:,} tokens; the published ones have 581 "
        "million and more, and see 200 billion. What holds here need not hold there, nor the other way round.",
    ]


def _redrawn(outcome: Outcome) -> list[str]:
    """Which methods do not start from the init of their authors."""
    names = [arm.name for arm in outcome.plan.arms if outcome.plan.placement(arm) != placements[arm.placement]]
    if not names:
        return []
    start, their = ("starts", "its") if len(names) == 1 else ("start", "their")
    return [
        f"{listed(names)} {start} from std 1/sqrt(2.5 d) like SDD, not from {their} authors' 0.02, which at the widths "
        "of their models is about the same."
    ]


def curves_picture(
    name: str,
    panels: Mapping[str, Sequence[Cell]],
    x: str = "tokens",
    *,
    ceiling: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> Picture:
    """Held-out loss over training, a panel a setting and a line a method.

    Args:
        name: of the figure's files.
        panels: the cells of each panel, by title.
        x: "tokens" or "seconds".
        ceiling: the greatest loss shown; by default a little above that before training.
        levels: horizontal lines, by name.
    """
    seeds = max(len(cell.results) for cells in panels.values() for cell in cells)
    words = [
        (f"{title}: " if title else "")
        + ", ".join(f"{cell.arm.name} ends at {Measured(cell.losses)}" for cell in cells)
        + "."
        for title, cells in panels.items()
    ]

    def draw():
        from sdd.lab.figures import Axis, CurvePanel, draw_curves

        everything = [result for cells in panels.values() for cell in cells for result in cell.results]
        top = ceiling or 1.05 * float(np.median([result.initial_loss for result in everything]))
        axis = Axis("tokens", counts=True) if x == "tokens" else Axis("seconds in training steps")
        return draw_curves(
            [CurvePanel(title, axis, loss_axis(), _curves(cells, x), top, levels) for title, cells in panels.items()]
        )

    caption = (
        f"Held-out loss over training, mean of {seeds_text(seeds)}, the band their range; a line ends where a run does."
    )
    return Picture(name, caption, f"Held-out loss in nats a token against {x}. {' '.join(words)}", draw)


def mean_curve(results: Sequence[RunResult], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns x and held-out loss, one row a seed, as long as the longest; where a run ended early, nan."""
    points = max((len(result.curve["tokens"]) for result in results), default=0)
    columns = [[_padded(result.curve[key], points) for result in results] for key in (x, "eval_loss")]
    across = np.array(columns[0], float)
    longest = np.array(max((result.curve[x] for result in results), key=len, default=[]), float)
    return np.where(np.isnan(across), longest, across), np.array(columns[1], float)


def factor_words(factor: Estimate) -> str:
    """A factor with its interval, in a sentence."""
    if math.isnan(factor.low):
        return f"{factor.value:.2f} times"
    return f"{factor.value:.2f} times (95% interval {factor.low:.2f} to {factor.high:.2f})"


def _curves(cells: Sequence[Cell], x: str):
    from sdd.lab.figures import Curve, style_of

    curves: list[Curve] = []
    seen: list[str] = []
    for cell in cells:
        placement = cell.arm.placement
        across, losses = mean_curve(cell.results, x)
        style = style_of(cell.arm.name, placement, seen.count(placement))
        curves.append(Curve(cell.arm.name, style, across.tolist(), losses.tolist()))
        seen.append(placement)
    return curves


def _padded(values: Sequence[float], points: int) -> list[float]:
    return [*values, *[math.nan] * (points - len(values))]
