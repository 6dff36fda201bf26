"""The page about one or more runs: `sdd report RUN... --out report.html`."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd.draw.style import line_styles
from sdd.errors import UserError
from sdd.probing import STATISTICS
from sdd.report import curves, heat, require_report_extra
from sdd.report.runs import RunHistory, load_runs
from sdd.report.verdict import verdict

_ENVIRONMENT = ("sdd", "torch", "python", "platform", "device", "cuda", "precision", "threads", "cpus", "command")


def write_report(runs: Sequence[Path], out: Path) -> list[str]:
    """Write one self-contained page (no network, opens from a file) about runs in any state, and its figures.

    Beside PAGE.html the folder PAGE-figures holds every figure as PNG and SVG.

    Args:
        runs: run directories, at least one.
        out: the page; its folder is made if missing.

    Returns:
        For each run a line with its verdict.

    Raises:
        UserError: if a directory is no run, a file cannot be written, or the extra `report` is not installed.
    """
    require_report_extra()
    from sdd.report import html

    loaded = load_runs(runs)
    html.write_page(out, render(loaded))
    try:
        _write_figures(loaded, out.with_name(f"{out.stem}-figures"))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out.parent}: {error.strerror}") from None
    return [f"{run.name}: {verdict(run).headline}" for run in loaded]


def render(runs: Sequence[RunHistory]) -> str:
    """Return the page about some runs."""
    from sdd.report import html

    styles = line_styles([run.placement for run in runs])
    panels = list(curves.run_panels(runs, styles).values())
    routers = list(curves.router_panels(runs, styles).values())
    return html.render(
        "report.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        verdicts=[verdict(run) for run in runs],
        swatches={run.name: html.swatch(style) for run, style in zip(runs, styles, strict=True)},
        figures=html.figure_group("curves", panels, runs) if panels else None,
        maps=[html.map_group(maps) for maps in heat.block_maps(runs)],
        site_maps=[html.map_group(maps) for maps in heat.site_maps(runs)],
        router_figures=html.figure_group("routers", routers, runs) if routers else None,
        router_maps=[html.map_group(maps) for maps in [heat.latest_loads(runs), *heat.router_maps(runs)] if maps],
        earlier_loads=[html.map_group(maps) for maps in heat.earlier_loads(runs)],
        last_rows=[(run, _last_row(run)) for run in runs if run.probe],
        statistics=STATISTICS,
        settings=settings_tables(runs),
        environments=environment_rows(runs),
    )


def _write_figures(runs: Sequence[RunHistory], folder: Path) -> None:
    from sdd.draw import curves as figures
    from sdd.draw.maps import draw_maps

    note, styles = curves.seeds_note(runs), line_styles([run.placement for run in runs])
    panels = curves.run_panels(runs, styles) | curves.router_panels(runs, styles)
    for name, panel in panels.items():
        figures.save_figure(figures.draw([panel], title=note), folder / name.replace("_", "-"))
    for maps in [*heat.block_maps(runs), *heat.router_maps(runs), heat.latest_loads(runs)]:
        if maps:
            figures.save_figure(draw_maps(maps, maps[0].title), folder / f"map-{maps[0].name}")


def _last_row(run: RunHistory) -> tuple[int, list[str], list[tuple[str, list[float | None]]]]:
    """Return the last probed step as a table: its number, the statistics, and each site with its values."""
    assert run.probe is not None
    probe, stats = run.probe, [stat for stat in STATISTICS if run.probe.has(stat)]
    rows = [
        (site, [float(probe.stats[stat][-1, index]) if probe.present[stat][index] else None for stat in stats])
        for index, site in enumerate(probe.sites)
    ]
    return int(probe.steps[-1]), stats, rows


def settings_tables(runs: Sequence[RunHistory]) -> dict[str, Any]:
    """Return the config fields: as "differing" `{field: one value a run}`, as "common" `{field: value}`."""
    rows = {name: [run.config.get(name) for run in runs] for each in runs for name in each.config}
    if "model.placement" in rows:
        rows["model.placement"] = placement_labels(runs)
    differing = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
    common = {name: row[0] for name, row in rows.items() if name not in differing}
    return {"differing": differing, "common": common}


def placement_labels(runs: Sequence[RunHistory]) -> list[str]:
    """Return the placements' names; a hash is added where one name stands for several definitions."""
    digests = [
        hashlib.sha256(json.dumps(run.config.get("model.placement"), sort_keys=True).encode()).hexdigest()[:6]
        for run in runs
    ]
    pairs = [(run.placement, digest) for run, digest in zip(runs, digests, strict=True)]
    definitions = Counter(name for name, _ in set(pairs))
    return [f"{name} ({digest})" if definitions[name] > 1 else name for name, digest in pairs]


def environment_rows(runs: Sequence[RunHistory]) -> dict[str, list[tuple[str, Any]]]:
    """Return each field of the environments as (names of runs, value) pairs; one pair without names if all agree."""
    known = [run for run in runs if run.environment]
    rows: dict[str, list[tuple[str, Any]]] = {}
    for field in _ENVIRONMENT:
        told = {run.name: value for run in known if (value := run.environment.get(field)) is not None}
        values: dict[str, list[str]] = {}
        for name, value in told.items():
            values.setdefault(" ".join(map(str, value)) if isinstance(value, list) else str(value), []).append(name)
        if values:
            alike = len(values) == 1 and len(told) == len(known)
            rows[field] = [("" if alike else ", ".join(names), text) for text, names in values.items()]
    return rows
