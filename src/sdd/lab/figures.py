"""Figures of studies, drawn with matplotlib in the look of `sdd.draw.curves`. Needs the extra `report`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sdd.draw.curves import look, short_count
from sdd.draw.style import INK, OWN_STYLE, PLACEMENT_STYLES, Marker, Style
from sdd.lab.statistics import mean_factor, mean_interval

_WIDTH, _HEIGHT = 4.6, 3.0  # inches a panel
_MANY_DECADES = 1e3  # a logarithmic axis of more labels powers of ten only


@dataclass(frozen=True)
class Curve:
    """A line with one curve for each seed; their mean is drawn, and their range as a band.

    Attributes:
        label: in the legend.
        style: colour, marker and dash.
        x: one for all seeds, or one for each.
        y: one for each seed; nan is a gap.
    """

    label: str
    style: Style
    x: Sequence[Sequence[float]]
    y: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: with its unit.
        log: logarithmic.
        counts: write 1500000 as 1.5M.
    """

    label: str
    log: bool = False
    counts: bool = False


@dataclass(frozen=True)
class CurvePanel:
    """A panel of curves.

    Attributes:
        title: above it.
        x, y: its axes.
        curves: its lines.
        ceiling: the greatest height shown.
        levels: horizontal lines, by name.
    """

    title: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    ceiling: float | None = None
    levels: Mapping[str, float] | None = None


#: Markers of further arms of one placement.
_FURTHER: tuple[Marker, ...] = ("*", "P", "d", "h", "8")


def style_of(name: str, placement: str) -> Style:
    """The style of a placement, by the name of its arm if that is one."""
    return PLACEMENT_STYLES.get(name) or PLACEMENT_STYLES.get(placement, OWN_STYLE)


def styles_of(arms: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """The style of each arm by name, from (name, placement); one that is named like a placement looks like it.

    Further arms of a placement have its colour, are dashed, and have markers of their own in this order.
    """
    taken = [name for name, _ in arms if name in PLACEMENT_STYLES]
    found = {}
    for name, placement in arms:
        found[name] = style_of(name, placement)
        if name not in PLACEMENT_STYLES:
            if place := taken.count(placement):
                marker = _FURTHER[(place - 1) % len(_FURTHER)]
                found[name] = Style(found[name].color, marker, (5, 2))
            taken.append(placement)
    return found


def draw_curves(panels: Sequence[CurvePanel], columns: int = 2) -> Figure:
    """Draw panels of curves side by side, with one vertical scale and one legend below."""
    limits = _common_limits(panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with look():
        figure = Figure((columns * _WIDTH, rows * _HEIGHT + 0.35), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_curves(axes, panel)
            axes.set_ylim(limits)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, {curve.label: curve.style for panel in panels for curve in panel.curves}, columns)
    return figure


def draw_dots(
    rows: Sequence[str],
    series: Mapping[str, Sequence[Mapping[int, float]]],
    axis: Axis,
    broken: str,
    *,
    zero: bool = False,
) -> Figure:
    """Draw a line for each row with a marker and a range for each series.

    Each seed without a finite value is a cross at the right.

    Args:
        rows: names, from top to bottom.
        series: by name, a measurement for each row: values by seed, nan where the run did not converge.
        axis: of the numbers; on a logarithmic one the marker is the geometric mean.
        broken: names the crosses in the legend.
        zero: draw a line at zero, where numbers are differences.
    """
    styles = dict(zip(series, series_styles(), strict=False))
    finite = [value for cells in series.values() for cell in cells for value in cell.values() if math.isfinite(value)]
    edges = _right_of(finite, axis.log)
    with look():
        figure = Figure((1.5 * _WIDTH, 0.62 + 0.46 * max(2, len(rows))), layout="constrained")
        axes = figure.subplots()
        for number, (name, cells) in enumerate(series.items()):
            offset = (number - (len(series) - 1) / 2) * 0.13
            for place, cell in enumerate(cells):
                _dot(axes, cell, place + offset, styles[name], edges, axis.log)
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8, dashes=(4, 3))
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _set_axis(axes, "x", axis)
        looks = [*((style.color, style.marker) for style in styles.values()), (INK, "x")]
        handles = [Line2D([], [], color=color, marker=marker, linestyle="none") for color, marker in looks]
        figure.legend(handles, [*series, broken], loc="outside lower center", ncols=min(3, len(handles)))
    return figure


def series_styles() -> list[Style]:
    """Styles of series that are not placements, from the same palette."""
    names = ("sdd", "prenorm-qk", "deepnorm", "postnorm", "olmo2", "peri", "prenorm")
    return [PLACEMENT_STYLES[name] for name in names]


def _right_of(values: Sequence[float], log: bool) -> Callable[[int], float]:
    """The places of crosses beyond all values, by number."""
    scaled = [math.log(value) if log else value for value in values] or [0.0, 1.0]
    breadth = (max(scaled) - min(scaled)) or 1

    def place(number: int) -> float:
        found = max(scaled) + (0.08 + 0.018 * number) * breadth
        return math.exp(found) if log else found

    return place


def _dot(
    axes: Axes, cell: Mapping[int, float], height: float, style: Style, edges: Callable[[int], float], log: bool
) -> None:
    """Draw mean and range of the seeds, and a cross at `edges` for each that has no finite value."""
    values = [value for value in cell.values() if math.isfinite(value)]
    for number in range(len(cell) - len(values)):
        axes.plot(edges(number), height, "x", color=style.color, markersize=6)
    if values:
        if len(values) > 1:
            axes.plot([min(values), max(values)], [height, height], color=style.color, linewidth=1)
        mean = mean_factor(values) if log else mean_interval(values)
        axes.plot(mean.value, height, style.marker, color=style.color)


def _draw_curves(axes: Axes, panel: CurvePanel) -> None:
    for curve in panel.curves:
        color = curve.style.color
        x, y = _mean(curve.x), _mean(curve.y)
        (line,) = axes.plot(x, y, color=color, marker=curve.style.marker, markevery=max(1, len(x) // 7))
        if curve.style.dash:
            line.set_dashes(curve.style.dash)
        if len(curve.y) > 1:
            stack = np.array(curve.y, float)
            axes.fill_between(x, stack.min(axis=0), stack.max(axis=0), color=color, alpha=0.15, linewidth=0)
    lowest = min((panel.levels or {"": 0.0}).values())
    for name, height in (panel.levels or {}).items():
        axes.axhline(height, color=INK, linewidth=0.8, dashes=(4, 3))
        side = "top" if height == lowest else "bottom"
        axes.annotate(name, (0.01, height), xycoords=("axes fraction", "data"), va=side, fontsize=7.5)
    axes.set_title(panel.title)
    _set_axis(axes, "x", panel.x)
    _set_axis(axes, "y", panel.y)


def _common_limits(panels: Sequence[CurvePanel]) -> tuple[float, float]:
    """The lowest and highest value shown in any panel, with a small margin."""
    parts = []
    for panel in panels:
        values = np.array([value for curve in panel.curves for row in curve.y for value in row], float)
        levels = np.array(list((panel.levels or {}).values()), float)
        parts.append(np.append(values[np.isfinite(values) & (values <= (panel.ceiling or math.inf))], levels))
    shown = np.concatenate(parts)
    log = panels[0].y.log
    shown = np.log(shown[shown > 0]) if log else shown
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
    margin = 0.05 * ((high - low) or 1)
    low, high = (np.exp([low - margin, high + margin])) if log else (low - margin, high + margin)
    return float(low), float(high)


def _mean(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean over the seeds; nan where any of them is."""
    return np.array(rows, float).mean(axis=0)


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    target = axes.xaxis if which == "x" else axes.yaxis
    target.set_label_text(axis.label)
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
        low, high = target.get_data_interval()
        if not 0 < low <= high < math.inf:  # nothing to show
            axes.set(**{f"{which}lim": (1, 10)})
        target.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _MANY_DECADES * low else (1,)))
        target.set_minor_formatter(NullFormatter())
    text = short_count if axis.counts else lambda value: f"{value:g}"
    target.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _legend(figure: Figure, styles: Mapping[str, Style], columns: int) -> None:
    handles = [
        Line2D([], [], color=style.color, marker=style.marker or None, dashes=style.dash or (None, None))
        for style in styles.values()
    ]
    labels = [f" {name}" for name in styles]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(styles), 3 * columns))
