"""The table of "Which normalisation?": every placement, with what the committed studies and benchmarks say of it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdd.placement import placements

ROOT = Path(__file__).parents[2]
BASELINE = "prenorm-qk"
#: The folders of the study `length`; the first that has a length is read: 3M tokens have been run for four methods.
LENGTHS = ("length", "better", "length-3m")
#: Placements under the name that studies had for them as variants.
FORMERLY = {"sdd-depth": "mix-depth"}
#: Placements that differ by the scale of their draw: where that was searched, and in what a step costs, they are one.
DRAWN_ALIKE = {"sdd": "sdd-v1", "sdd-v1": "sdd"}
#: Nothing was measured.
NOTHING = "–"

Cells = Mapping[str, str]


def which_table(root: Path = ROOT) -> str:
    """One row a placement, one column a study or benchmark that has results; a dash where a placement has none."""
    columns = [column for make in COLUMNS for column in make(root)]
    header = ["placement", *(title for title, _ in columns)]
    rows = [[f"`{name}`", *(_cell(cells, name) for _, cells in columns)] for name in placements]
    lines = [header, ["---"] + ["---:"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(cells: Cells, name: str) -> str:
    return cells.get(name) or cells.get(FORMERLY.get(name, ""), NOTHING)


def rows_of(root: Path, study: str, table: str) -> list[dict[str, Any]]:
    """The rows of a study's table; none if it has not been run."""
    path = root / "docs" / "studies" / study / "tables" / f"{table}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def value_text(cell: Mapping[str, Any], signed: bool = False) -> str:
    """A mean with half of its interval, or how many seeds did not converge."""
    if cell["value"] is None:
        return f"no seed of {cell['not_converged']}" if cell.get("not_converged") else NOTHING
    half = "" if cell["low"] is None else f" ± {(cell['high'] - cell['low']) / 2:.3f}"
    return f"{cell['value']:{'+' if signed else ''}.3f}{half}"


def shared(cells: Cells) -> Cells:
    """The same, with what holds for either of two placements that are drawn alike but for the scale."""
    return {**{name: cells[other] for name, other in DRAWN_ALIKE.items() if other in cells}, **cells}


def lead_columns(root: Path) -> list[tuple[str, Cells]]:
    """Loss at each length minus that of the baseline, every method tuned."""
    found: dict[str, Cells] = {}
    for study in LENGTHS:
        rows = rows_of(root, study, "lead")
        for length in rows[0] if rows else {}:
            if length.endswith(" tokens") and length[0].isdigit() and length not in found:
                cells = {
                    row["comparison"].removesuffix(f" against {BASELINE}"): value_text(row[length], signed=True)
                    for row in rows
                    if row["comparison"].endswith(f" against {BASELINE}")
                }
                found[length] = {BASELINE: "0", **shared(cells)}
    return [(f"loss minus `{BASELINE}`'s, {length}", cells) for length, cells in found.items()]


def robust_column(root: Path) -> list[tuple[str, Cells]]:
    """The number of runs that converged under the conditions of table 2."""
    cells = {}
    for row in rows_of(root, "robustness", "loss"):
        runs = [value for value in row.values() if isinstance(value, dict)]
        fine, lost = (sum(value[key] for value in runs) for key in ("n", "not_converged"))
        cells[row["method"]] = f"{fine} of {fine + lost}"
    return [("converged in table 2's settings, 0.2M tokens", cells)] if cells else []


def sensitivity_column(root: Path) -> list[tuple[str, Cells]]:
    """Sensitivity to the learning rate over two decades."""
    cells = {row["method"]: value_text(row["LR sensitivity"]) for row in rows_of(root, "lr", "sensitivity")}
    return [("sensitivity to the rate, 0.08M tokens", cells)] if cells else []


def rate_columns(root: Path) -> list[tuple[str, Cells]]:
    """The highest rate before divergence, by number of blocks."""
    rows = rows_of(root, "max-rate", "rate")
    blocks = [key for key in (rows[0] if rows else {}) if key != "method"]
    return [(f"highest rate, {each}", {row["method"]: str(row[each]) for row in rows}) for each in blocks]


def depth_column(root: Path) -> list[tuple[str, Cells]]:
    """The largest number of blocks at which every seed converged."""
    cells = {}
    for row in rows_of(root, "depth", "loss"):
        runs = {blocks: value for blocks, value in row.items() if isinstance(value, dict)}
        reached = [blocks for blocks, value in runs.items() if value["n"] and not value["not_converged"]]
        cells[row["method"]] = (">= " if reached and reached[-1] == list(runs)[-1] else "") + (reached or [NOTHING])[-1]
    return [("deepest that converged", cells)] if cells else []


def cost_columns(root: Path) -> list[tuple[str, Cells]]:
    """Time and peak memory of a compiled training step over the baseline's."""
    path = root / "benchmarks" / "results" / "step_time_cpu.json"
    if not path.exists():
        return []
    shape = json.loads(path.read_text(encoding="utf-8"))["shapes"][0]
    steps = {name: each["modes"]["compiled"] for name, each in shape["variants"].items() if name in placements}
    where = f"a step of `{shape['preset']}`, compiled, CPU"
    return [
        (f"seconds, {where}", shared({name: f"{step['ratio']:.2f}" for name, step in steps.items()})),
        (f"memory, {where}", shared({name: f"{step['peak_ratio']:.2f}" for name, step in steps.items()})),
    ]


COLUMNS: tuple[Callable[[Path], list[tuple[str, Cells]]], ...] = (
    lead_columns,
    robust_column,
    sensitivity_column,
    rate_columns,
    depth_column,
    cost_columns,
)
