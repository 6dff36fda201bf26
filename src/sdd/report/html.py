"""Self-contained HTML pages: one file, style and figures inline, nothing fetched. Needs the extra `report`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sdd.draw.curves import draw, inline_svg, legend_styles, swatch_svg
from sdd.draw.maps import draw_maps
from sdd.draw.panel import HeatMap, Panel
from sdd.draw.style import Style
from sdd.errors import UserError
from sdd.files import write_aside
from sdd.report.curves import seeds_note
from sdd.report.runs import CONVERGENCE_SHARE, RunHistory
from sdd.report.verdict import place, places, span
from sdd.terminal import clock

_NOTHING = "–"


@dataclass(frozen=True)
class FigureGroup:
    """Panels that share a legend and a note.

    Attributes:
        svgs: one picture a panel.
        legend: (swatch, run) for each line.
        note: how to read the curves.
    """

    svgs: list[Markup]
    legend: list[tuple[Markup, str]]
    note: str


def figure_group(name: str, panels: Sequence[Panel], runs: Sequence[RunHistory]) -> FigureGroup:
    """Draw panels for a page, each as a picture of its own, so that a phone can stack them.

    Args:
        name: unique in the page.
        panels: the panels.
        runs: the runs that the curves belong to.
    """
    svgs = [
        Markup(inline_svg(draw([panel], legend=False), f"{name}-{index}", panel.describe()))
        for index, panel in enumerate(panels)
    ]
    legend = [(swatch(style), label) for label, style in legend_styles(panels).items()]
    return FigureGroup(svgs, legend, _note(panels, runs))


def map_group(maps: Sequence[HeatMap]) -> tuple[str, list[tuple[str, Markup]]]:
    """Draw the maps of one statistic, at least one, each as a picture of its own; their name is unique in the page.

    Returns:
        The statistic's title, and (run, picture) for each run.
    """
    svgs = [inline_svg(draw_maps([each]), f"map-{each.name}-{i}", each.describe()) for i, each in enumerate(maps)]
    return maps[0].title, [(each.run, Markup(svg)) for each, svg in zip(maps, svgs, strict=True)]


def swatch(style: Style) -> Markup:
    """Return the piece of line that stands for a run in tables and legends."""
    return Markup(swatch_svg(style))


def render(template: str, **values: Any) -> str:
    """Fill one of the package's templates; every value is escaped unless it is Markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdd.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (decimals, signed, count, duration, setting, significant, place, places, span)
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals["convergence_percent"] = round(100 * CONVERGENCE_SHARE)
    return environment.get_template(template).render(**values)


def write_page(path: Path, text: str) -> None:
    """Write a page aside and rename it.

    Raises:
        UserError: if it cannot be written.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is not an ordinary file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, text, durable=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def decimals(value: Any, places: int = 3) -> str:
    """Format a number with fixed decimals; a dash stands for anything else."""
    if not isinstance(value, int | float) or math.isnan(value):
        return _NOTHING
    return f"{value:.{places}f}" if math.isfinite(value) else "infinite"


def signed(value: Any, places: int = 3) -> str:
    """Format a number with fixed decimals and its sign, a true minus."""
    text = decimals(value, places)
    return text.replace("-", "−") if text[0] in f"-{_NOTHING}i" else f"+{text}"


def significant(value: float | None) -> str:
    """Format a number with three significant digits; None becomes empty."""
    return "" if value is None else f"{value:.3g}".replace("-inf", "−inf").replace("inf", "infinite")


def count(value: Any) -> str:
    """Format a whole number with separators; a dash stands for anything else."""
    return f"{value:,.0f}" if _is_finite(value) else _NOTHING


def duration(seconds: Any) -> str:
    """Format seconds as h:mm:ss or m:ss; a dash stands for anything else."""
    return clock(seconds) if _is_finite(seconds) else _NOTHING


def setting(value: Any) -> str:
    """Format a value of a config: 4,096, 0.004, true, none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return format(value, {int: ",", float: "g"}.get(type(value), ""))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _note(panels: Sequence[Panel], runs: Sequence[RunHistory]) -> str:
    lines = [line for panel in panels for line in panel.lines]
    notes = {
        f"{seeds_note(runs)}.": True,
        "Curves are smoothed over 1/25 of the run; the raw values lie faint underneath.": any(x.raw for x in lines),
        "Losses far above that of an untrained model are cut off at the top.": any(x.clipped for x in panels),
        "A cross marks where a run failed.": any(x.broken for x in lines),
        "A triangle marks where the first thing to break began to.": any(x.alarm is not None for x in lines),
        "A vertical stroke marks an action of the guard.": any(x.events for x in lines),
    }
    return " ".join(note for note, applies in notes.items() if applies)
