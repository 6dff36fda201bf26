"""A page drawn from the result files of benchmarks: what was measured, where, the numbers, and what was wanted."""

import ast
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from tables import table

from sdd.bench.table import kernels_table, small_table, step_time_table
from sdd.bench.targets import TARGETS, check

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: Files of `sdd bench` by a key that only they have, and what draws them on a terminal.
DRAWN = {"operations": kernels_table, "small": small_table, "shapes": step_time_table}
#: Columns of a table; more go under headings of their own.
COLUMNS = 12
#: Rounds of which a result has the medians too.
RAW = "seconds"


def target_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every target, with each number that a result has for it."""
    rows = []
    for target in TARGETS:
        wanted = [target.measure, f"{target.sign} {target.at_least:g}", f"{target.sign} {target.aim:g}"]
        found = [(name, one) for name, result in results.items() for one in check(result) if one.target is target]
        rows += [
            [
                *wanted,
                f"{one.value:.3f}",
                {"at least": "met", "aim": "aim met"}.get(one.reached, "**missed**"),
                f"{one.what} (`{name}`)",
            ]
            for name, one in found
        ] or [[*wanted, "", "not measured yet", ""]]
    return table(["measure", "at least", "aim", "measured", "", "of"], rows)


def heading(name: str, result: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """The command, what it measures, and the machine."""
    bench = max((one for one in about if name.startswith(one)), key=len, default="")
    lines = [f"`./dev bench {bench}`: {about[bench]}"] if bench else []
    lines += [f"What the numbers are: {result['what']}."] if "what" in result else []
    lines += ["**Interrupted before it was done.**"] if result.get("interrupted") else []
    known = {key: value for key, value in result.get("machine", {}).items() if value is not None}
    lines.append("Machine: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known.items()) + ".")
    return "\n\n".join(lines)


def numbers(result: Mapping[str, Any]) -> Iterator[nodes.Node | str]:
    """A result's numbers: as its command shows them, or as tables that follow from the file's own structure."""
    values = {key: value for key, value in result.items() if key not in ("machine", "what", "interrupted")}
    drawn = next((key for key in DRAWN if values.get(key)), None)
    if drawn is None:
        yield from structure(values)
        return
    yield loose_line({key: value for key, value in values.items() if is_cell(value)})
    text = "\n".join(DRAWN[drawn](result)).strip()
    yield nodes.literal_block(text, text, language="text")


def structure(values: Mapping[str, Any], title: str = "") -> Iterator[str]:
    """Markdown: loose values in one line, likes in one table, the rest under titles of its own."""
    loose = {key: value for key, value in values.items() if is_cell(value)}
    rest = {key: value for key, value in values.items() if key not in loose and value and key != RAW}
    if title and (loose or is_table(rest)):
        yield f"**{title}**"
    if loose:
        yield loose_line(loose)
    if is_table(rest):
        yield rows_table([(key, flat(value)) for key, value in rest.items()])
        return
    for key, value in rest.items():
        inner = f"{title}, {plain(key)}" if title else plain(key)
        if isinstance(value, Mapping):
            yield from structure(value, inner)
        else:
            yield f"**{inner}**"
            yield rows_table([(str(index + 1), flat(row)) for index, row in enumerate(value)])


def loose_line(values: Mapping[str, Any]) -> str:
    """Values that belong to no table."""
    return ", ".join(f"{plain(key)} {cell(value)}" for key, value in values.items())


def is_cell(value: Any) -> bool:
    """Whether a value fits into a cell: a number, a text, or a list of them."""
    return not isinstance(value, Mapping) and not (isinstance(value, list) and value and isinstance(value[0], Mapping))


def is_table(values: Mapping[str, Any]) -> bool:
    """Whether these are the rows of one table: several, of values that fit into not too many columns."""
    rows = [flat(value) for value in values.values() if isinstance(value, Mapping)]
    columns = {key for row in rows for key in row}
    fit = all(is_cell(value) for row in rows for value in row.values())
    return 1 < len(rows) == len(values) and len(columns) <= COLUMNS and fit


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names joined."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value) if isinstance(value, Mapping) else None
        found |= {key: value} if inner is None else {f"{key} {name}": one for name, one in inner.items()}
    return found


def rows_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table with a column for every name that occurs."""
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    body = [[f"`{name}`", *(cell(row[column]) if column in row else "" for column in columns)] for name, row in rows]
    return table(["", *map(plain, columns)], body)


def plain(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ")


def cell(value: Any) -> str:
    """A number with as many digits as matter; many numbers as median and range."""
    if isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
        if len(value) <= 2:
            return " to ".join(map(cell, value))
        return f"{cell(statistics.median(value))} ({cell(min(value))} to {cell(max(value))}, {len(value)} times)"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file of a folder by its name, those about targets first."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: not (DRAWN.keys() & item[1].keys())))


def read_about(folder: Path) -> dict[str, str]:
    """The first line about each benchmark."""
    texts = {
        file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in folder.glob("[!_]*.py")
    }
    return {name: (text or "").split("\n")[0] for name, text in texts.items()}


class Results(SphinxDirective):
    """Insert the targets, or a section for every result file, as the argument says: `targets` or `results`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table, or the sections."""
        self.env.note_reread()  # files come and go
        results = read_results(BENCHMARKS / "results")
        if self.arguments[0] == "targets":
            return self.parse_text_to_nodes(target_table(results))
        about = read_about(BENCHMARKS)
        return [self._section(name, result, about) for name, result in results.items()]

    def _section(self, name: str, result: Mapping[str, Any], about: Mapping[str, str]) -> nodes.Node:
        section = nodes.section("", nodes.title(name, name), ids=[nodes.make_id(name)], names=[name])
        section += self.parse_text_to_nodes(heading(name, result, about))
        for part in numbers(result):
            section += self.parse_text_to_nodes(part) if isinstance(part, str) else part
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("benchmark", Results)
    return {"parallel_read_safe": True}
