"""Draw heat maps with matplotlib. Needs the extra `report`."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sdd.draw.curves import look
from sdd.draw.panel import HeatMap
from sdd.probing.checks import layer_of

#: Fit for colour-blind readers, and of evenly rising lightness (Nuñez, Anderton and Renslow, 2018).
COLOR_MAP = "cividis"
#: The colour of non-finite values. It is not in the map, and differs from it in grey too.
BROKEN = "#d55e00"
# All sizes are in inches.
_MAP = (2.25, 1.75)  # of a map without its labels
_LEFT, _RIGHT, _BELOW, _ABOVE = 0.52, 0.88, 0.44, 0.1  # room around it; the colour bar is at the right
_NAME, _TITLE = 0.2, 0.22  # height of a run's name, and of the title above all maps
_TALLER = 0.011  # added height for each row beyond 60
_STEP_LABELS, _ROW_LABELS = 5, 8


def draw_maps(maps: Sequence[HeatMap], title: str = "") -> Figure:
    """Draw maps side by side, each with its scale of colour.

    Args:
        maps: at least one.
        title: above all maps; "" leaves out the runs' names as well.
    """
    wide, high = _MAP
    high += _TALLER * max(0, max(len(each.rows) for each in maps) - 60)
    above = _ABOVE + (_NAME + _TITLE if title else 0)
    width, height = _LEFT + wide + _RIGHT, _BELOW + high + above
    with look(), mpl.rc_context({"axes.grid": False}):
        figure = Figure((width * len(maps), height))
        for index, each in enumerate(maps):
            # placed by hand: a layout engine would take longer than all the drawing
            left, whole = index * width + _LEFT, width * len(maps)
            axes = figure.add_axes((left / whole, _BELOW / height, wide / whole, high / height))
            bar = axes.inset_axes((1.03, 0.0, 0.05, 1.0))
            _draw_map(figure, axes, bar, each)
            if title:
                axes.set_title(each.run)
        if title:
            figure.suptitle(title, x=0.01, y=1 - 0.05 / height, ha="left", va="top", fontsize=9.5)
    return figure


def _draw_map(figure: Figure, axes: Axes, bar: Axes, drawn: HeatMap) -> None:
    low, high = drawn.scale
    norm = LogNorm(low, high, clip=True) if drawn.log else Normalize(low, high)
    colors = mpl.colormaps[COLOR_MAP].with_extremes(bad=BROKEN)
    values = np.where(drawn.values <= 0, low, drawn.values) if drawn.log else drawn.values
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colors, norm=norm, aspect="auto", origin="lower", interpolation="none"
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    _label_columns(axes, drawn)
    _label_rows(axes, drawn.rows)
    _color_bar(figure, bar, image, drawn)
    for row, column in drawn.marks:
        axes.plot(column, row, "s", color="white", markersize=7, markeredgewidth=3, clip_on=False)
        axes.plot(column, row, "s", color="black", markersize=7, markeredgewidth=1.2, clip_on=False)


def _label_columns(axes: Axes, drawn: HeatMap) -> None:
    """Label a few columns, at round steps where possible. The axis counts columns, so steps are not evenly spaced."""
    axes.set_xlabel(drawn.across)
    steps = drawn.steps
    if not drawn.across.endswith("step"):
        places = range(0, len(steps), -(-len(steps) // _ROW_LABELS))
        axes.set_xticks(places, [str(steps[place]) for place in places])
        return
    slack = len(steps) // (4 * _STEP_LABELS)
    ideal = np.unique(np.linspace(0, len(steps) - 1, min(_STEP_LABELS, len(steps))).round().astype(int))
    inner = [_roundest(steps, range(at - slack, at + slack + 1)) for at in ideal[1:-1]]
    places = [ideal[0], *inner, ideal[-1]] if len(ideal) > 1 else ideal
    axes.set_xticks(places, [f"{steps[place]:,}" for place in places])


def _roundest(steps: np.ndarray, places: Sequence[int]) -> int:
    """Return the place whose step ends in the most zeros; the middle one among equals."""
    zeros = [len(text := str(steps[place])) - len(text.rstrip("0")) for place in places]
    best = [place for place, count in zip(places, zeros, strict=True) if count == max(zeros)]
    return best[len(best) // 2]


def _label_rows(axes: Axes, rows: Sequence[str]) -> None:
    """Label each block with its number, at its first row if it has several sites."""
    names = [row if row.isdigit() or row == "in" else layer_of(row) for row in rows]
    first = {str(name): place for place, name in reversed(list(enumerate(names))) if name is not None}
    starts = sorted((place, name) for name, place in first.items())[:: max(1, -(-len(first) // _ROW_LABELS))]
    axes.set_yticks([place for place, _ in starts], [name for _, name in starts])
    axes.set_ylabel("block" if len(first) == len(rows) else f"block ({len(rows)} sites)")


def _color_bar(figure: Figure, axes: Axes, image: AxesImage, drawn: HeatMap) -> None:
    bar = figure.colorbar(image, cax=axes)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.solids.set_rasterized(True)  # pyright: ignore[reportOptionalMemberAccess]
    bar.ax.tick_params(length=2)
    bar.set_label(drawn.unit)
    if drawn.log:
        low, high = image.get_clim()
        axis = bar.ax.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,), numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
        if drawn.threshold is not None and low < drawn.threshold < high:
            bar.ax.axhline(drawn.threshold, color=BROKEN, linewidth=1.5)
