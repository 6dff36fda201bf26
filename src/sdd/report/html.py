"""Self-contained HTML pages: one file, style and figures inline, nothing fetched. Needs the extra `report`."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sdd.draw.curves import draw, inline_svg, legend_styles, swatch_svg
from sdd.draw.maps import draw_maps
from sdd.draw.style import Style
from sdd.errors import UserError
from sdd.report.curves import Panel, seeds_note
from sdd.report.heat import HeatMap
from sdd.report.runs import CONVERGENCE_SHARE, Run
from sdd.report.verdict import brief, place, places, span

_NOTHING = "–"


@dataclass(frozen=True)
class FigureGroup:
    """Panels that share a legend and a note.

    Attributes:
        svgs: one picture a panel.
        legend: (swatch, run) for each line.
        note: what to know about the curves.
    """

    svgs: list[Markup]
    legend: list[tuple[Markup, str]]
    note: str


def figure_group(name: str, panels: Sequence[Panel], runs: Sequence[Run]) -> FigureGroup:
    """Draw panels for a page, each as a picture of its own, so that they stand below each other on a phone.

    Args:
        name: unique in the page.
        panels: what to draw.
        runs: whose curves these are.
    """
    svgs = [
        Markup(inline_svg(draw([panel], legend=False), f"{name}-{index}", panel.describe()))
        for index, panel in enumerate(panels)
    ]
    legend = [(swatch(style), label) for label, style in legend_styles(panels).items()]
    return FigureGroup(svgs, legend, _note(panels, runs))


@dataclass(frozen=True)
class MapGroup:
    """Maps of one statistic.

    Attributes:
        title: of the statistic.
        maps: (swatch, run, picture) for each run.
    """

    title: str
    maps: list[tuple[Markup, str, Markup]]


def map_group(maps: Sequence[HeatMap], swatches: Mapping[str, Markup]) -> MapGroup:
    """Draw the maps of one statistic, each as a picture of its own.

    Args:
        maps: of one statistic; the first in the page of their name.
        swatches: by run.
    """
    svgs = [
        inline_svg(draw_maps([each]), f"map-{each.name}-{index}", each.describe()) for index, each in enumerate(maps)
    ]
    drawn = [(swatches[each.run], each.run, Markup(svg)) for each, svg in zip(maps, svgs, strict=True)]
    return MapGroup(maps[0].title, drawn)


def swatch(style: Style) -> Markup:
    """The piece of line that stands for a run in tables and legends."""
    return Markup(swatch_svg(style))


def render(template: str, **values: Any) -> str:
    """Fill one of the package's templates; every value is escaped, but for those that are Markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdd.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decimals": decimals,
        "signed": signed,
        "count": count,
        "duration": duration,
        "setting": setting,
        "significant": significant,
        "brief": brief,
        "place": place,
        "places": places,
        "span": span,
    }
    environment.globals["convergence_percent"] = round(100 * CONVERGENCE_SHARE)
    return environment.get_template(template).render(**values)


def write_page(path: Path, text: str) -> None:
    """Write a page aside and rename it.

    Raises:
        UserError: if that is refused.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is no ordinary file")
    aside = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8", errors="replace")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def decimals(value: Any, places: int = 3) -> str:
    """A number with fixed decimals; a dash for none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return _NOTHING
    return f"{value:.{places}f}" if math.isfinite(value) else "infinite"


def signed(value: Any, places: int = 3) -> str:
    """The same with its sign, a true minus."""
    text = decimals(value, places)
    return text.replace("-", "−") if text[0] in f"-{_NOTHING}i" else f"+{text}"


def significant(value: Any) -> str:
    """A number with three significant digits; a dash for none."""
    if value is None:
        return ""
    return f"{value:.3g}" if math.isfinite(value) else {math.inf: "infinite", -math.inf: "−infinite"}.get(value, "nan")


def count(value: Any) -> str:
    """A whole number with separators; a dash for none."""
    return f"{value:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else _NOTHING


def duration(seconds: Any) -> str:
    """Seconds as h:mm:ss or m:ss; a dash for none."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return _NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def setting(value: Any) -> str:
    """A value of a config as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note(panels: Sequence[Panel], runs: Sequence[Run]) -> str:
    parts = [f"{seeds_note(runs)}."]
    lines = [line for panel in panels for line in panel.lines]
    if any(line.raw for line in lines):
        parts.append("Smoothed over 1/25 of the run, the raw values faint underneath.")
    if any(panel.clipped for panel in panels):
        parts.append("What lies far above the loss of an untrained model runs off the top.")
    if any(line.broken for line in lines):
        parts.append("A cross marks where a run became non-finite.")
    if any(line.alarm is not None for line in lines):
        parts.append("A triangle marks where what broke first began to.")
    if any(line.events for line in lines):
        parts.append("A stroke marks where the guard acted.")
    return " ".join(parts)
