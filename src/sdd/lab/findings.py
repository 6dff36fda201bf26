"""Findings of a study: tables of measured numbers, figures, and the sentences that follow from them."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.lab.statistics import Estimate, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Placeholder in tables for a missing number.
NOTHING = "-"


@dataclass(frozen=True)
class Measured:
    """A number measured once for each seed; nan where the run did not converge.

    Attributes:
        values: by seed.
        digits: after the point, in tables.
    """

    values: Mapping[int, float]
    digits: int = 3

    @property
    def estimate(self) -> Estimate:
        """Mean and interval over the seeds that converged."""
        return mean_interval([value for value in self.values.values() if math.isfinite(value)])

    @property
    def failed(self) -> int:
        """The number of seeds that did not converge."""
        return sum(not math.isfinite(value) for value in self.values.values())

    def __str__(self) -> str:
        if not self.failed:
            return with_interval(self.estimate, self.digits)
        dash = NOTHING if len(self.values) == 1 else f"{NOTHING} ({self.failed} of {len(self.values)})"
        return dash if self.failed == len(self.values) else f"{dash}, else {with_interval(self.estimate, self.digits)}"


@dataclass(frozen=True)
class Interval:
    """An estimate in a table, written as `5.123 ± 0.012`.

    Attributes:
        estimate: the number and its interval.
        digits: after the point, in tables.
        signed: write a plus before positive numbers.
    """

    estimate: Estimate
    digits: int = 3
    signed: bool = False

    def __str__(self) -> str:
        return with_interval(self.estimate, self.digits, signed=self.signed)


@dataclass(frozen=True)
class Range(Interval):
    """An estimate in a table, written with the ends of its interval as `1.50 (1.42 to 1.59)`: for factors."""

    digits: int = 2

    def __str__(self) -> str:
        value, low, high = (f"{number:.{self.digits}f}" for number in _numbers(self.estimate))
        if math.isnan(self.estimate.value):
            return NOTHING
        return value if math.isnan(self.estimate.low) else f"{value} ({low} to {high})"


Value = str | int | float | Measured | Interval


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its files.
        title: says what it shows, with units.
        columns: headings; the first column names the row.
        rows: one value for each column.
        note: explains how to read it.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""

    def texts(self) -> list[list[str]]:
        """The rows as text."""
        return [[_text(value) for value in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(not isinstance(row[place], str) for row in self.rows) for place in range(len(self.columns))]

    def markdown(self, *, padded: bool = False) -> str:
        """A Markdown table, without title and note; `padded` aligns the columns for a terminal."""
        rule = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.columns, rule, *self.texts())]
        if padded:
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def csv(self) -> str:
        """One line for each row. A measured number fills five columns: value, low, high, seeds, not converged."""
        columns = list(zip(*self.rows, strict=True)) or [() for _ in self.columns]
        wide = [any(isinstance(value, Measured | Interval) for value in column) for column in columns]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            f"{column}{suffix}"
            for column, parts in zip(self.columns, wide, strict=True)
            for suffix in (("", " low", " high", " seeds", " not converged") if parts else ("",))
        )
        for row in self.rows:
            writer.writerow(part for value, parts in zip(row, wide, strict=True) for part in _parts(value, parts))
        return stream.getvalue()

    def json(self) -> dict[str, Any]:
        """The table for a JSON file: every number with its interval and the values of its seeds."""
        rows = [{column: _json(value) for column, value in zip(self.columns, row, strict=True)} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: of its files.
        caption: says what it shows, with the number of seeds.
        description: the figure in words and numbers, for those who cannot see it.
        draw: draws it; needs matplotlib.
    """

    name: str
    caption: str
    description: str
    draw: Callable[[], "Figure"]


@dataclass(frozen=True)
class Findings:
    """The content of a study's page.

    Attributes:
        answer: to the study's question, in one sentence.
        conclusions: further sentences that follow from the numbers.
        limits: sentences that say what cannot be concluded.
        published: a table of published numbers beside ours; None if there are none.
        tables: our numbers; the first one is printed by the command.
        pictures: figures.
    """

    answer: str
    conclusions: Sequence[str]
    limits: Sequence[str]
    published: Table | None
    tables: Sequence[Table]
    pictures: Sequence[Picture] = field(default_factory=tuple)

    @property
    def all_tables(self) -> list[Table]:
        """Our tables and the published one."""
        return [*self.tables, *([self.published] if self.published else [])]


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Write each table as NAME.md, NAME.csv and NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        title = f"{table.title}\n\n" if table.title else ""
        note = f"\n{table.note}\n" if table.note else ""
        (folder / f"{table.name}.md").write_text(title + table.markdown() + note, encoding="utf-8")
        (folder / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
        text = json.dumps(table.json(), indent=1, allow_nan=False) + "\n"
        (folder / f"{table.name}.json").write_text(text, encoding="utf-8")


def with_interval(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """Write an estimate as `5.123 ± 0.012`, or without an interval as `5.123`."""
    if math.isnan(estimate.value):
        return NOTHING
    text = f"{estimate.value:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(estimate.half_width) else f"{text} ± {estimate.half_width:.{digits}f}"


def listed(names: Sequence[str]) -> str:
    """Join names as `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def described(groups: Mapping[str, Iterable[str]]) -> str:
    """Write parts by name as `a: x, y. b: z.`, for descriptions of figures; an empty name is left out."""
    return " ".join((f"{name}: " if name else "") + f"{', '.join(parts)}." for name, parts in groups.items())


def seeds_text(n: int) -> str:
    """Write a number of seeds as `one seed` or `3 seeds`."""
    return "one seed" if n == 1 else f"{n} seeds"


def _text(value: Value) -> str:
    if isinstance(value, float):
        return NOTHING if math.isnan(value) else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parts(value: Value, wide: bool) -> list[Any]:
    """The fields of a value in a CSV file."""
    if not isinstance(value, Measured | Interval):
        return [value, "", "", "", ""] if wide else [value]
    seeds, failed = (len(value.values), value.failed) if isinstance(value, Measured) else (value.estimate.n, 0)
    return [*("" if math.isnan(number) else number for number in _numbers(value.estimate)), seeds, failed]


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _json(value: Value) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, Measured | Interval):
        return value
    numbers = zip(("value", "low", "high"), map(_json, _numbers(value.estimate)), strict=True)
    found = {**dict(numbers), "n": value.estimate.n}
    if isinstance(value, Measured):
        by_seed = {str(seed): _json(number) for seed, number in value.values.items()}
        found |= {"not_converged": value.failed, "seeds": by_seed}
    return found
