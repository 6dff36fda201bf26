"""The page about one or more runs: `sdd report RUN... --out report.html`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd.draw.style import Style, line_styles
from sdd.errors import UserError
from sdd.probing import STATISTICS
from sdd.report import curves, heat
from sdd.report import routers as routing
from sdd.report.extras import require_report_extra
from sdd.report.runs import Run, load_runs
from sdd.report.verdict import verdict

_ENVIRONMENT = ("sdd", "torch", "python", "platform", "device", "cuda", "precision", "threads", "cpus", "command")


def write_report(runs: Sequence[Path], out: Path) -> list[str]:
    """Write one self-contained page (no network, opens from a file) about runs in any state, and its figures.

    Beside PAGE.html the folder PAGE-figures holds every figure as PNG and SVG.

    Args:
        runs: run directories, at least one.
        out: the page; its folder is made if missing.

    Returns:
        A line a run: how it fares.

    Raises:
        UserError: if a directory is no run, a file cannot be written, or the extra `report` is not installed.
    """
    require_report_extra()
    from sdd.report import html as page

    loaded = load_runs(runs)
    page.write_page(out, render(loaded))
    try:
        _write_figures(loaded, out.with_name(f"{out.stem}-figures"))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out.parent}: {error.strerror}") from None
    return [f"{run.name}: {verdict(run).headline}" for run in loaded]


def render(runs: Sequence[Run]) -> str:
    """The page about some runs."""
    from sdd.report import html as page

    styles = line_styles([run.placement for run in runs])
    panels = list(_panels(runs, styles).values())
    routers = list(curves.router_panels(runs, styles).values())
    swatches = [page.swatch(style) for style in styles]
    by_name = {run.name: swatch for run, swatch in zip(runs, swatches, strict=True)}
    return page.render(
        "report.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        verdicts=[verdict(run) for run in runs],
        swatches=swatches,
        figures=page.figure_group("curves", panels, runs) if panels else None,
        maps=[page.map_group(maps, by_name) for maps in heat.block_maps(runs)],
        site_maps=[page.map_group(maps, by_name) for maps in heat.site_maps(runs)],
        router_figures=page.figure_group("routers", routers, runs) if routers else None,
        router_maps=[page.map_group(maps, by_name) for maps in routing.routing_maps(runs)],
        loads=[page.map_group(maps, by_name) for maps in [routing.latest_loads(runs)] if maps],
        earlier_loads=[page.map_group(maps, by_name) for maps in routing.earlier_loads(runs)],
        last_rows=[(run, _last_row(run)) for run in runs if run.probe],
        statistics=STATISTICS,
        settings=settings_tables(runs),
        environments=environment_rows(runs),
    )


def _panels(runs: Sequence[Run], styles: Sequence[Style]) -> dict[str, curves.Panel]:
    """The curves that there are, by the names of their files."""
    built = {
        "heldout": curves.heldout_panel,
        "loss": curves.loss_panel,
        "loss-time": curves.time_panel,
        "grad-norm": curves.grad_norm_panel,
        "lr": curves.lr_panel,
    }
    return {name: panel for name, build in built.items() if (panel := build(runs, styles)) is not None}


def _write_figures(runs: Sequence[Run], folder: Path) -> None:
    from sdd.draw import curves as figures
    from sdd.draw.maps import draw_maps

    note, styles = curves.seeds_note(runs), line_styles([run.placement for run in runs])
    panels = _panels(runs, styles) | curves.router_panels(runs, styles)
    for name, panel in panels.items():
        figures.save_figure(figures.draw([panel], title=note), folder / name.replace("_", "-"))
    groups = [*heat.block_maps(runs), *routing.routing_maps(runs), routing.latest_loads(runs)]
    for maps in filter(None, groups):
        figures.save_figure(draw_maps(maps, maps[0].title), folder / f"map-{maps[0].name}")


def _last_row(run: Run) -> tuple[int, list[str], list[tuple[str, list[float | None]]]]:
    """The last probed step as a table: its number, the statistics, and the sites with their numbers."""
    assert run.probe is not None
    stats = [stat for stat in STATISTICS if run.probe.has(stat)]
    columns = {stat: (run.probe.present[stat], run.probe.stats[stat][-1]) for stat in stats}
    rows = [
        (site, [float(values[index]) if has[index] else None for has, values in columns.values()])
        for index, site in enumerate(run.probe.sites)
    ]
    return int(run.probe.steps[-1]), stats, rows


def settings_tables(runs: Sequence[Run]) -> dict[str, Any]:
    """The config fields: those that differ as `{field: one value a run}`, the others as `{field: value}`."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    labels = placement_labels(runs)
    rows: dict[str, list[Any]] = {
        name: labels if name == "model.placement" else [run.config.get(name) for run in runs] for name in names
    }
    differing = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
    common = {name: row[0] for name, row in rows.items() if name not in differing}
    return {"differing": differing, "common": common}


def placement_labels(runs: Sequence[Run]) -> list[str]:
    """The placements' names; where one name stands for several definitions, a hash tells them apart."""
    digests = [
        hashlib.sha256(json.dumps(run.config.get("model.placement"), sort_keys=True).encode()).hexdigest()[:6]
        for run in runs
    ]
    definitions: dict[str, set[str]] = {}
    for run, digest in zip(runs, digests, strict=True):
        definitions.setdefault(run.placement, set()).add(digest)
    return [
        f"{run.placement} ({digest})" if len(definitions[run.placement]) > 1 else run.placement
        for run, digest in zip(runs, digests, strict=True)
    ]


def environment_rows(runs: Sequence[Run]) -> dict[str, list[tuple[str, Any]]]:
    """Each field of the environments as (names of runs, value) pairs; where all agree, one pair without names."""
    known = sum(bool(run.environment) for run in runs)
    rows: dict[str, list[tuple[str, Any]]] = {}
    for name in _ENVIRONMENT:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = run.environment.get(name)
            if value is not None:
                text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                values.setdefault(text, []).append(run.name)
        if values:
            everywhere = [len(names) for names in values.values()] == [known]
            rows[name] = [("" if everywhere else ", ".join(names), text) for text, names in values.items()]
    return rows
