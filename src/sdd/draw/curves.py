"""Panels drawn with matplotlib: as files, and as SVG that stands inside a page and takes its colours.

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

from sdd.draw.style import INK, PAPER, REFERENCE_STYLE, Style
from sdd.report.curves import Line, Panel

_WIDTH, _HEIGHT = 4.6, 3.0  # inches a panel
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
    "lines.markerfacecolor": "none",  # hollow, so that curves that coincide are seen to
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "sdd",  # the same figure gives the same file
    "text.color": INK,
    "text.parse_math": False,  # a $ in a run's name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
}


_TRIANGLE = {
    "arrowstyle": "-|>,head_width=0.35,head_length=0.7",
    "color": INK,
    "linewidth": 0,
    "shrinkA": 0,
    "shrinkB": 1,
}


def draw(panels: Sequence[Panel], *, columns: int = 2, title: str = "", legend: bool = True) -> Figure:
    """Draw panels side by side.

    Args:
        panels: at least one.
        columns: panels in a row.
        title: above all; should say the number of seeds.
        legend: name the lines below the panels.
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
            _legend(figure, legend_styles(panels), columns)
    return figure


def save_figure(fig: Figure, path_without_suffix: Path) -> list[Path]:
    """Write a figure as PNG (200 dots an inch) and SVG; returns the two paths."""
    path_without_suffix.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: a name may hold a dot.
    paths = [path_without_suffix.with_name(f"{path_without_suffix.name}.{kind}") for kind in ("png", "svg")]
    with look():
        for path in paths:
            fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def inline_svg(fig: Figure, name: str, description: str) -> str:
    """A figure as an `<svg>` element without background, in the text colour and font of the page it stands in.

    Args:
        fig: the figure.
        name: unique in the page; becomes part of every id.
        description: read out in place of the picture.
    """
    buffer = io.StringIO()
    with look():
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(re.escape(INK), "currentColor", svg, flags=re.IGNORECASE)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def legend_styles(panels: Sequence[Panel]) -> dict[str, Style]:
    """What a legend of these panels names: each run once, and the references."""
    styles = {line.label: line.style for panel in panels for line in panel.lines}
    return styles | {panel.reference[1]: REFERENCE_STYLE for panel in panels if panel.reference}


def swatch_svg(style: Style) -> str:
    """A short piece of a line with its marker, for a legend in HTML."""
    color = "currentColor" if style.color == INK else style.color
    dash = f' stroke-dasharray="{" ".join(f"{1.5 * part:g}" for part in style.dash)}"' if style.dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        f'<line x1="0" y1="6" x2="34" y2="6" stroke="{color}" stroke-width="2"{dash}/>{_marker_svg(style)}</svg>'
    )


def _marker_svg(style: Style) -> str:
    if not style.marker:
        return ""
    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    points = " ".join(f"{17 + 8 * x:.1f},{6 - 8 * y:.1f}" for x, y in np.asarray(path.to_polygons()[0]))
    return f'<polygon points="{points}" fill="none" stroke="{style.color}" stroke-width="1.5"/>'


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        _draw_line(axes, line)
    if panel.reference:
        axes.axhline(panel.reference[0], color=INK, linewidth=0.9, dashes=REFERENCE_STYLE.dash)
    low, high = panel.limits or panel.extent()
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(low, high)
    axes.set_xlim(left=0)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel(panel.against)
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
    if line.alarm is not None:
        _draw_alarm(axes, *line.at(line.alarm))


def _draw_alarm(axes: Axes, x: float, y: float) -> None:
    """A filled triangle that stands on the curve."""
    axes.annotate("", (x, y), xytext=(0, 9), textcoords="offset points", annotation_clip=False, arrowprops=_TRIANGLE)


def _legend(figure: Figure, styles: dict[str, Style], columns: int) -> None:
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, dashes=style.dash or (None, None))
        for style in styles.values()
    ]
    labels = [f" {label}" for label in styles]  # matplotlib takes a label that begins with _ for none
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns))


def short_count(value: float) -> str:
    """A number of tokens as an axis shows it: 500, 20k, 1.5M, 200B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


@contextmanager
def look() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says; a glyph that the font lacks is drawn as a box, silently."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield
