"""The page about one or more runs: `sdd report RUN... --out report.html`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd.lab import curves
from sdd.lab.extras import require_report_extra
from sdd.lab.runs import Run, load_runs
from sdd.lab.style import line_styles

_ENVIRONMENT = ("sdd", "torch", "python", "platform", "device", "cuda", "precision", "threads", "cpus", "command")


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained page (no network, opens from a file) about runs in any state.

    Args:
        runs: run directories, at least one.
        out: the page; its folder is made if missing.

    Raises:
        UserError: if a directory is no run, the page cannot be written, or the extra `report` is not installed.
    """
    require_report_extra()
    from sdd.lab import page

    loaded = load_runs(runs)
    styles = line_styles([run.placement for run in loaded])
    panels = [
        panel
        for build in (curves.heldout_panel, curves.loss_panel, curves.grad_norm_panel, curves.lr_panel)
        if (panel := build(loaded, styles)) is not None
    ]
    text = page.render(
        "report.html",
        title=loaded[0].name if len(loaded) == 1 else f"{len(loaded)} runs",
        runs=loaded,
        swatches=[page.swatch(style) for style in styles],
        figures=page.figure_group("curves", panels, loaded) if panels else None,
        settings=settings_tables(loaded),
        environments=environment_rows(loaded),
    )
    page.write_page(out, text)


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
