"""Which curves of which runs stand in which panel; numbers only, `sdd.draw.curves` draws them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sdd.draw.style import Style
from sdd.files import number
from sdd.probing.alarms import broke_first
from sdd.report.runs import Run

_SMOOTHED_OVER = 25  # a smoothed curve averages over 1/25 of the run
_MOST_POINTS = 600
#: Title and unit of each column of `sdd.report.routers`.
_ROUTER_PANELS = {
    "router_entropy": ("Router entropy", "nats, mean over layers"),
    "worst_load": ("Busiest expert", "tokens / mean, worst layer"),
    "dead_experts": ("Experts without tokens", "experts, all layers"),
    "balance_loss": ("Load balancing loss", "before its weight; 1 is balanced"),
    "router_z_loss": ("Router z-loss", "before its weight"),
}


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: the run, for legend and description.
        x, y: its points; not finite ones are gaps.
        style: how it is drawn.
        raw: the points before smoothing, drawn faintly underneath.
        marked: whether every point gets its marker.
        broken: whether it ends because the run failed; it then ends in a cross.
        alarm: where the first alarm begins, marked by a triangle; None for nowhere.
        events: where the guard acted, marked by a stroke.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Style
    raw: tuple[np.ndarray, np.ndarray] | None = None
    marked: bool = False
    broken: bool = False
    alarm: float | None = None
    events: tuple[float, ...] = ()

    def at(self, x: float) -> tuple[float, float]:
        """The point of the curve nearest to x, among those that are drawn."""
        finite = np.flatnonzero(np.isfinite(self.y))
        if not len(finite):
            return x, math.nan
        nearest = finite[np.abs(self.x[finite] - x).argmin()]
        return float(self.x[nearest]), float(self.y[nearest])


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what is shown.
        unit: of the vertical axis.
        lines: its curves.
        log: whether the vertical axis is logarithmic.
        ceiling: the greatest value shown; what lies above runs off the top. None shows all.
        limits: of the vertical axis; None fits it to the curves.
        reference: a horizontal line, its height and name.
        against: the horizontal axis.
    """

    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    log: bool = False
    ceiling: float | None = None
    limits: tuple[float, float] | None = None
    reference: tuple[float, str] | None = None
    against: str = "tokens"

    @property
    def clipped(self) -> bool:
        """Whether a curve runs off the top."""
        return self.ceiling is not None and bool((self._values() > self.ceiling).any())

    def describe(self) -> str:
        """The figure in words, for those who cannot see it."""
        parts = [f"{self.title}, {self.unit}, against {self.against}."]
        if self.reference:
            parts.append(f"{self.reference[1]}: {self.reference[0]:.3g}.")
        for line in self.lines:
            finite = line.y[np.isfinite(line.y)]
            if len(finite):
                end = ", where it broke off" if line.broken else ""
                parts.append(f"{line.label}: from {finite[0]:.3g} to {finite[-1]:.3g}{end}.")
        return " ".join(parts)

    def extent(self) -> tuple[float, float]:
        """The lowest and highest value shown, with a small margin; the reference counts."""
        values = np.append(self._values(), self.reference[0] if self.reference else [])
        low, high = float(values.min()), float(values.max())
        high = high if self.ceiling is None else max(low, min(high, self.ceiling))
        if self.log:
            margin = max((high / low) ** 0.05, 1.01)
            return low / margin, high * margin
        margin = 0.05 * ((high - low) or abs(high) or 1)
        return low - margin, high + margin

    def _values(self) -> np.ndarray:
        curves = [curve for line in self.lines for curve in (line.y, line.raw[1] if line.raw else line.y[:0])]
        values = np.concatenate(curves) if curves else np.empty(0)
        return values[values > 0] if self.log else values[np.isfinite(values)]


def share_scale(panels: Sequence[Panel]) -> list[Panel]:
    """The same panels, all with one vertical scale."""
    extents = [panel.extent() for panel in panels if panel.lines]
    limits = (min(low for low, _ in extents), max(high for _, high in extents)) if extents else None
    return [replace(panel, limits=limits) for panel in panels]


def heldout_panel(runs: Sequence[Run], styles: Sequence[Style], title: str = "Held-out text") -> Panel | None:
    """Held-out bits per byte against tokens, or the loss if a run has no bits per byte; None without evaluations."""
    evaluated = [run for run in runs if len(run.evals["step"])]
    if not evaluated:
        return None
    in_bytes = all(np.isfinite(run.evals["eval_bits_per_byte"]).any() for run in evaluated)
    column = "eval_bits_per_byte" if in_bytes else "eval_loss"
    lines = [
        Line(run.name, run.evals["tokens"], _finite(run.evals[column]), style, marked=True, broken=_broke(run))
        for run, style in zip(runs, styles, strict=True)
        if len(run.evals["step"])
    ]
    return Panel(title, _unit(in_bytes), lines, ceiling=_untrained(evaluated, in_bytes))


def loss_panel(runs: Sequence[Run], styles: Sequence[Style], title: str = "Training loss") -> Panel | None:
    """Training loss against tokens, smoothed, raw underneath."""
    lines = _smooth_lines(runs, styles, "loss", smooth)
    return Panel(title, "nats a token", lines, ceiling=_untrained(runs, False)) if lines else None


def time_panel(runs: Sequence[Run], styles: Sequence[Style], title: str = "Training loss in time") -> Panel | None:
    """Training loss against the time spent in training steps, smoothed."""
    ends = [run.seconds for run in runs if math.isfinite(run.seconds)]
    if not ends:
        return None
    size, unit = _time_unit(max(ends))
    lines = []
    for run, style in zip(runs, styles, strict=True):
        y = _finite(run.steps["loss"])
        if np.isfinite(y).any():
            curve = thin(run.steps["seconds"] / size, smooth(y))
            lines.append(Line(run.name, *curve, style, broken=_broke(run)))
    ceiling = _untrained(runs, False)
    return Panel(title, "nats a token", lines, ceiling=ceiling, against=f"{unit} of training") if lines else None


def grad_norm_panel(runs: Sequence[Run], styles: Sequence[Style], title: str = "Gradient norm") -> Panel | None:
    """Global gradient norm before clipping, smoothed in its logarithm."""
    lines = _smooth_lines(runs, styles, "grad_norm", _smooth_log)
    return Panel(title, "global norm before clipping", lines, log=True) if lines else None


def lr_panel(runs: Sequence[Run], styles: Sequence[Style], title: str = "Learning rate") -> Panel | None:
    """Learning rate against tokens."""
    lines = [
        Line(run.name, *thin(run.steps["tokens"], _finite(run.steps["lr"])), style)
        for run, style in zip(runs, styles, strict=True)
        if np.isfinite(run.steps["lr"]).any()
    ]
    return Panel(title, "learning rate", lines) if lines else None


def router_panels(runs: Sequence[Run], styles: Sequence[Style]) -> dict[str, Panel]:
    """What the routers of mixtures of experts do, against tokens, smoothed; empty if all models are dense."""
    routed = [(run, style) for run, style in zip(runs, styles, strict=True) if run.routing]
    found = {
        name: Panel(title, unit, [_router_line(run, style, name) for run, style in routed])
        for name, (title, unit) in _ROUTER_PANELS.items()
        if routed
    }
    experts = {run.config.get("model.moe.n_experts") for run, _ in routed}
    if len(experts) == 1 and isinstance(count := experts.pop(), int) and count > 1:
        found["router_entropy"] = replace(
            found["router_entropy"], reference=(math.log(count), f"ln {count}: no preference")
        )
    return {name: panel for name, panel in found.items() if any(np.isfinite(line.y).any() for line in panel.lines)}


def _router_line(run: Run, style: Style, column: str) -> Line:
    assert run.routing is not None
    x = np.interp(run.routing.steps, run.steps["step"], run.steps["tokens"])
    y = _finite(run.routing.columns[column])
    return Line(run.name, *thin(x, smooth(y)), style, raw=thin(x, y), broken=_broke(run))


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over 1/25 of the run, of the finite values in the window; nan where a value is not finite."""
    width = max(1, len(values) // _SMOOTHED_OVER)
    finite = np.isfinite(values)
    window = np.ones(width)
    count = np.convolve(finite, window, "same")
    total = np.convolve(np.where(finite, values, 0), window, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about 600 points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept += sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
    return x[kept], y[kept]


def seeds_note(runs: Sequence[Run]) -> str:
    """How many seeds the curves are of, as every figure says."""
    seeds = {run.config.get("seed") for run in runs}
    return f"One curve a run, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}"


def _smooth_lines(
    runs: Sequence[Run], styles: Sequence[Style], column: str, smoother: Callable[[np.ndarray], np.ndarray]
) -> list[Line]:
    lines: list[Line] = []
    for run, style in zip(runs, styles, strict=True):
        x, y = run.steps["tokens"], _finite(run.steps[column])
        if np.isfinite(y).any():
            curve = thin(x, smoother(y))
            marks = {"alarm": _alarm_at(run, x), "events": _events_at(run, x)}
            lines.append(Line(run.name, *curve, style, raw=thin(x, y), broken=_broke(run), **marks))
    return lines


def _alarm_at(run: Run, x: np.ndarray) -> float | None:
    first = broke_first(run.alarms)
    return float(np.interp(first.since_step, run.steps["step"], x)) if first else None


def _events_at(run: Run, x: np.ndarray) -> tuple[float, ...]:
    steps = [number(row.get("step")) for row in run.events]
    return tuple(float(np.interp(step, run.steps["step"], x)) for step in steps if math.isfinite(step))


def _time_unit(seconds: float) -> tuple[float, str]:
    """What a run of that length is measured in."""
    for size, unit in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return size, unit
    return 1.0, "seconds"


def _smooth_log(values: np.ndarray) -> np.ndarray:
    positive = np.where(values > 0, values, np.nan)
    return np.exp(smooth(np.log(positive)))


def _untrained(runs: Sequence[Run], in_bytes: bool) -> float | None:
    """A little above the loss of the models before training: what is higher than that tells nothing more."""
    first = [run.steps["loss"][0] for run in runs if len(run.steps["loss"]) and math.isfinite(run.steps["loss"][0])]
    if not first:
        return None
    per_nat = 1.0
    if in_bytes:
        ratios = np.concatenate([run.evals["eval_bits_per_byte"] / run.evals["eval_loss"] for run in runs])
        per_nat = float(np.nanmedian(ratios))
    return 1.1 * float(np.median(first)) * per_nat


def _unit(in_bytes: bool) -> str:
    return "bits per byte" if in_bytes else "nats a token"


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _broke(run: Run) -> bool:
    return run.result.get("status") == "failed"
