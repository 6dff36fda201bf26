"""Build the panels of curves of a page from runs. Numbers only; `sdd.draw.curves` draws them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdd.draw.panel import Line, Panel
from sdd.draw.style import Style
from sdd.files import number
from sdd.probing.alarms import broke_first
from sdd.report.runs import RunHistory

_SMOOTHED_OVER = 25  # a smoothed curve averages over 1/25 of the run
_MOST_POINTS = 600
#: Title and unit for each of `sdd.report.runs.ROUTER_COLUMNS`.
_ROUTER_PANELS = {
    "router_entropy": ("Router entropy", "nats, mean over layers"),
    "worst_load": ("Busiest expert", "tokens / mean, worst layer"),
    "dead_experts": ("Experts without tokens", "experts, all layers"),
    "balance_loss": ("Load balancing loss", "before its weight; 1 is balanced"),
    "router_z_loss": ("Router z-loss", "before its weight"),
}

Runs = Sequence[RunHistory]
Styles = Sequence[Style]
_Points = Callable[[RunHistory], tuple[np.ndarray, np.ndarray]]
_Smoother = Callable[[np.ndarray], np.ndarray]


def heldout_panel(runs: Runs, styles: Styles, title: str = "Held-out text") -> Panel | None:
    """Held-out bits per byte against tokens, or the loss if a run has no bits per byte; None without evaluations."""
    evaluated = [run for run in runs if len(run.evals["step"])]
    in_bytes = all(np.isfinite(run.evals["eval_bits_per_byte"]).any() for run in evaluated)
    column, unit = ("eval_bits_per_byte", "bits per byte") if in_bytes else ("eval_loss", "nats a token")
    lines = _lines(runs, styles, lambda run: (run.evals["tokens"], run.evals[column]), marked=True)
    return Panel(title, unit, lines, ceiling=_ceiling(evaluated, in_bytes)) if lines else None


def loss_panel(runs: Runs, styles: Styles, title: str = "Training loss") -> Panel | None:
    """Training loss against tokens, smoothed, with the raw values underneath."""
    lines = _lines(runs, styles, _column("loss"), smooth, raw=True, marks=True)
    return Panel(title, "nats a token", lines, ceiling=_ceiling(runs)) if lines else None


def time_panel(runs: Runs, styles: Styles, title: str = "Training loss in time") -> Panel | None:
    """Training loss against the time spent in training steps, smoothed."""
    ends = [run.seconds for run in runs if math.isfinite(run.seconds)]
    if not ends:
        return None
    size, unit = _time_unit(max(ends))
    lines = _lines(runs, styles, lambda run: (run.steps["seconds"] / size, run.steps["loss"]), smooth)
    return Panel(title, "nats a token", lines, ceiling=_ceiling(runs), against=f"{unit} of training") if lines else None


def grad_norm_panel(runs: Runs, styles: Styles, title: str = "Gradient norm") -> Panel | None:
    """Global gradient norm before clipping, its logarithm smoothed."""
    lines = _lines(runs, styles, _column("grad_norm"), _smooth_log, raw=True, marks=True)
    return Panel(title, "global norm before clipping", lines, log=True) if lines else None


def lr_panel(runs: Runs, styles: Styles, title: str = "Learning rate") -> Panel | None:
    """Learning rate against tokens."""
    lines = _lines(runs, styles, _column("lr"))
    return Panel(title, "learning rate", lines) if lines else None


#: The panels of a page by the names of their files.
_PANELS = {
    "heldout": heldout_panel,
    "loss": loss_panel,
    "loss-time": time_panel,
    "grad-norm": grad_norm_panel,
    "lr": lr_panel,
}


def run_panels(runs: Runs, styles: Styles) -> dict[str, Panel]:
    """Return all panels that the runs have data for, by the names of their files."""
    return {name: panel for name, build in _PANELS.items() if (panel := build(runs, styles))}


def router_panels(runs: Runs, styles: Styles) -> dict[str, Panel]:
    """Return the panels about routers of mixtures of experts, by column; empty if all models are dense."""
    experts = {run.config.get("model.moe.n_experts") for run in runs if run.routers}
    references = {"router_entropy": _uniform(experts)}
    return {
        name: Panel(title, unit, lines, reference=references.get(name))
        for name, (title, unit) in _ROUTER_PANELS.items()
        if (lines := _lines(runs, styles, _router_column(name), smooth, raw=True))
    }


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of 1/25 of the run, over its finite values; non-finite values become nan."""
    width = max(1, len(values) // _SMOOTHED_OVER)
    finite = np.isfinite(values)
    window = np.ones(width)
    count = np.convolve(finite, window, "same")
    total = np.convolve(np.where(finite, values, 0), window, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most about 600 points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept += sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
    return x[kept], y[kept]


def seeds_note(runs: Runs) -> str:
    """State the number of seeds, as every figure does."""
    seeds = {run.config.get("seed") for run in runs}
    return f"One curve per run, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}"


def _lines(
    runs: Runs,
    styles: Styles,
    points: _Points,
    smoother: _Smoother | None = None,
    *,
    raw: bool = False,
    marks: bool = False,
    marked: bool = False,
) -> list[Line]:
    """Build the curves of the runs that have a finite point.

    Args:
        runs: the runs.
        styles: one for each run.
        points: from a run to its x and y.
        smoother: applied to y.
        raw: whether the points before smoothing are drawn underneath.
        marks: whether the first alarm and the actions of the guard are marked.
        marked: whether every point gets a marker.
    """
    lines: list[Line] = []
    for run, style in zip(runs, styles, strict=True):
        x, y = points(run)
        y = np.where(np.isfinite(y), y, np.nan)
        if np.isfinite(y).any():
            curve, under = thin(x, smoother(y) if smoother else y), thin(x, y) if raw else None
            alarm, events = _alarm_and_events(run) if marks else (None, ())
            broken = run.result.get("status") == "failed"
            lines.append(Line(run.name, *curve, style, under, marked, broken, alarm, events))
    return lines


def _column(name: str) -> _Points:
    return lambda run: (run.steps["tokens"], run.steps[name])


def _router_column(name: str) -> _Points:
    def points(run: RunHistory) -> tuple[np.ndarray, np.ndarray]:
        if run.routers is None:
            return np.empty(0), np.empty(0)
        return np.interp(run.routers.steps, run.steps["step"], run.steps["tokens"]), run.routers.columns[name]

    return points


def _alarm_and_events(run: RunHistory) -> tuple[float | None, tuple[float, ...]]:
    """Return the tokens at which the first alarm began, and those at which the guard acted."""
    first = broke_first(run.alarms)
    steps = [first.since_step if first else 0, *(number(row.get("step")) for row in run.events)]
    alarm, *events = np.interp(steps, run.steps["step"], run.steps["tokens"]).tolist()
    return alarm if first else None, tuple(event for event in events if math.isfinite(event))


def _time_unit(seconds: float) -> tuple[float, str]:
    """Return a unit of time that suits a run of that length, and its seconds."""
    for size, unit in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, unit
    return 1.0, "seconds"


def _smooth_log(values: np.ndarray) -> np.ndarray:
    positive = np.where(values > 0, values, np.nan)
    return np.exp(smooth(np.log(positive)))


def _ceiling(runs: Runs, in_bytes: bool = False) -> float | None:
    """Return a value a little above the loss before training: what is higher tells nothing more."""
    first = [run.steps["loss"][0] for run in runs if len(run.steps["loss"]) and math.isfinite(run.steps["loss"][0])]
    if not first:
        return None
    per_nat = 1.0
    if in_bytes:
        ratios = np.concatenate([run.evals["eval_bits_per_byte"] / run.evals["eval_loss"] for run in runs])
        per_nat = float(np.nanmedian(ratios))
    return 1.1 * float(np.median(first)) * per_nat


def _uniform(experts: set[Any]) -> tuple[float, str] | None:
    """Return the entropy of a router without preferences; None unless all mixtures have as many experts."""
    count = next(iter(experts)) if len(experts) == 1 else None
    return (math.log(count), f"ln {count}: no preference") if isinstance(count, int) and count > 1 else None
