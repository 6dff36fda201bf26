"""Draw panels with matplotlib: into files, and as SVG inside a page, whose colours and font they take.

Needs the extra `report`.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sdd.draw.panel import Line, Panel
from sdd.draw.style import INK, PAPER, REFERENCE_STYLE, Style

_WIDTH, _HEIGHT = 4.6, 3.0  # of a panel, in inches
_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": PAPER,
    "font.size": 9,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markeredgewidth": 1.1,
    "lines.markerfacecolor": "none",  # hollow: curves that coincide can still be told apart
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "sdd",  # the same figure gives the same file
    "text.color": INK,
    "text.parse_math": False,  # a $ in a run's name is a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}
_TRIANGLE = {"arrowstyle": "-|>,head_width=0.35,head_length=0.7", "color": INK, "lw": 0, "shrinkA": 0, "shrinkB": 1}
#: Replacements that fit an SVG of matplotlib into a page: its size, fonts and text colour come from the page.
_INTO_PAGE = (
    (r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>", ""),
    (r'(?s)^(<svg[^>]*?) width="[^"]*"', r"\1"),
    (r'(?s)^(<svg[^>]*?) height="[^"]*"', r"\1"),
    (r"font-family: [^;\"]*", "font-family: inherit"),
    (r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit"),
    (f"(?i){INK}", "currentColor"),
)


def draw(panels: Sequence[Panel], *, columns: int = 2, title: str = "", legend: bool = True) -> Figure:
    """Draw panels side by side.

    Args:
        panels: at least one.
        columns: panels in a row.
        title: above all panels; should state the number of seeds.
        legend: whether to name the lines below the panels.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with look():
        figure = Figure((columns * _WIDTH, rows * _HEIGHT), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
        if legend:
            styles = legend_styles(panels)
            handles = [
                Line2D([], [], color=x.color, marker=x.marker, dashes=x.dash or (None, None)) for x in styles.values()
            ]
            labels = [f" {label}" for label in styles]  # matplotlib leaves out labels that begin with _
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns))
    return figure


def save_figure(fig: Figure, path_without_suffix: Path) -> list[Path]:
    """Write a figure as PNG (200 dots per inch) and SVG, and return the two paths."""
    path_without_suffix.parent.mkdir(parents=True, exist_ok=True)
    # with_suffix would cut off the end of a name that has a dot
    paths = [path_without_suffix.with_name(f"{path_without_suffix.name}.{kind}") for kind in ("png", "svg")]
    with look():
        for path in paths:
            fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def inline_svg(fig: Figure, name: str, description: str) -> str:
    """Return a figure as an `<svg>` element without background, in the text colour and font of the page around it.

    Args:
        fig: the figure.
        name: unique in the page; becomes part of every id.
        description: read out in place of the picture.
    """
    buffer = io.StringIO()
    with look():
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    for pattern, replacement in _INTO_PAGE:
        svg = re.sub(pattern, replacement, svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def legend_styles(panels: Sequence[Panel]) -> dict[str, Style]:
    """Return the styles that a legend of these panels explains, by label: each run once, and the references."""
    styles = {line.label: line.style for panel in panels for line in panel.lines}
    return styles | {panel.reference[1]: REFERENCE_STYLE for panel in panels if panel.reference}


def swatch_svg(style: Style) -> str:
    """Return a short piece of a line with its marker as SVG, for a legend in HTML."""
    color = "currentColor" if style.color == INK else style.color
    dash = f' stroke-dasharray="{" ".join(f"{1.5 * part:g}" for part in style.dash)}"' if style.dash else ""
    marker = ""
    if style.marker:
        shape = MarkerStyle(style.marker)
        polygon = np.asarray(shape.get_path().transformed(shape.get_transform()).to_polygons()[0])
        points = " ".join(f"{17 + 8 * x:.1f},{6 - 8 * y:.1f}" for x, y in polygon)
        marker = f'<polygon points="{points}" fill="none" stroke="{style.color}" stroke-width="1.5"/>'
    return (
        '<svg class="swatch" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<line x1="0" y1="6" x2="34" y2="6" stroke="{color}" stroke-width="2"{dash}/>{marker}</svg>'
    )


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        _draw_line(axes, line)
    if panel.reference:
        axes.axhline(panel.reference[0], color=INK, linewidth=0.9, dashes=REFERENCE_STYLE.dash)
    low, high = panel.limits or panel.extent() or (1, 10)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(low, high)
    axes.set_xlim(left=0)
    axes.set(title=panel.title, ylabel=panel.unit, xlabel=panel.against)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def _draw_line(axes: Axes, line: Line) -> None:
    look: dict[str, Any] = {"color": line.style.color}
    if line.raw:
        axes.plot(*line.raw, **look, linewidth=0.5, alpha=0.25)
    if line.style.dash:
        look["dashes"] = line.style.dash
    every = 1 if line.marked else max(1, len(line.x) // 6)
    offset = 0 if line.marked else every // 2
    axes.plot(line.x, line.y, **look, marker=line.style.marker, markevery=(offset, every))
    if line.broken and len(line.x):
        axes.plot(*line.at(line.x[-1]), "x", color=INK, markersize=7, markeredgewidth=1.4)
    for event in line.events:
        axes.plot(*line.at(event), "|", color=INK, markersize=9, markeredgewidth=1.2)
    if line.alarm is not None:  # a filled triangle that points at the curve from above
        at = line.at(line.alarm)
        axes.annotate("", at, xytext=(0, 9), textcoords="offset points", annotation_clip=False, arrowprops=_TRIANGLE)


def short_count(value: float) -> str:
    """Format a number of tokens for an axis: 500, 20k, 1.5M, 200B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


@contextmanager
def look() -> Iterator[None]:
    """Use our settings, whatever the user's matplotlibrc says; a glyph that the font lacks becomes a box, silently."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield
