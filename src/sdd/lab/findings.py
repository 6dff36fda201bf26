"""What a finished study says, before it is drawn: tables of measured numbers, figures, and sentences that follow."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.lab.statistics import Estimate, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "-"


@dataclass(frozen=True)
class Measured:
    """A number measured once a seed; nan where the run did not converge.

    Attributes:
        values: by seed.
        digits: after the point, when it is written out.
    """

    values: Mapping[int, float]
    digits: int = 3

    @property
    def estimate(self) -> Estimate:
        """Mean and interval over the seeds that converged."""
        return mean_interval([value for value in self.values.values() if math.isfinite(value)])

    @property
    def failed(self) -> int:
        """Seeds that did not converge."""
        return sum(not math.isfinite(value) for value in self.values.values())

    def __str__(self) -> str:
        if not self.failed:
            return with_interval(self.estimate, self.digits)
        dash = NOTHING if len(self.values) == 1 else f"{NOTHING} ({self.failed} of {len(self.values)})"
        return dash if self.failed == len(self.values) else f"{dash}, else {with_interval(self.estimate, self.digits)}"


@dataclass(frozen=True)
class Interval:
    """An estimate in a table.

    Attributes:
        estimate: the number.
        digits: after the point, when it is written out.
        signed: write a plus.
    """

    estimate: Estimate
    digits: int = 3
    signed: bool = False

    def __str__(self) -> str:
        return with_interval(self.estimate, self.digits, signed=self.signed)


@dataclass(frozen=True)
class Range:
    """An estimate whose interval is written by its ends, as a factor's is."""

    estimate: Estimate
    digits: int = 2

    def __str__(self) -> str:
        estimate = self.estimate
        if math.isnan(estimate.value):
            return NOTHING
        text = f"{estimate.value:.{self.digits}f}"
        return (
            text
            if math.isnan(estimate.low)
            else f"{text} ({estimate.low:.{self.digits}f} to {estimate.high:.{self.digits}f})"
        )


Value = str | int | float | Measured | Interval | Range


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its files.
        title: what it shows, with units.
        columns: headings; the first column names the row.
        rows: as many values each.
        note: what to know when reading it.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""

    def texts(self) -> list[list[str]]:
        """The rows as people read them."""
        return [[_text(value) for value in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(not isinstance(row[place], str) for row in self.rows) for place in range(len(self.columns))]

    def markdown(self) -> str:
        """A Markdown table, without title and note."""
        rule = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = [list(self.columns), rule, *self.texts()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

    def csv(self) -> str:
        """One line a row; a measured number is five columns: value, low, high, seeds, seeds that did not converge."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        wide = [
            any(isinstance(row[place], Measured | Interval | Range) for row in self.rows)
            for place in range(len(self.columns))
        ]
        writer.writerow(
            [
                f"{column}{suffix}"
                for column, parts in zip(self.columns, wide, strict=True)
                for suffix in (("", " low", " high", " seeds", " not converged") if parts else ("",))
            ]
        )
        for row in self.rows:
            writer.writerow([part for value, parts in zip(row, wide, strict=True) for part in _parts(value, parts)])
        return stream.getvalue()

    def json(self) -> dict[str, Any]:
        """Ready for JSON: every number with its interval and the values of its seeds."""
        rows = [{column: _json(value) for column, value in zip(self.columns, row, strict=True)} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: of its files.
        caption: what it shows, the number of seeds included.
        description: the same in words with the numbers, for those who cannot see it.
        draw: makes it; needs matplotlib.
    """

    name: str
    caption: str
    description: str
    draw: Callable[[], "Figure"]


@dataclass(frozen=True)
class Findings:
    """What a study says.

    Attributes:
        answer: to its question, in one sentence.
        conclusions: further sentences that follow from the numbers.
        limits: what cannot be concluded.
        published: what was published, beside ours.
        tables: ours.
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
        """Those of ours, and the published one."""
        return [*self.tables, *([self.published] if self.published else [])]


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Each table as NAME.md, NAME.csv and NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        title = f"{table.title}\n\n" if table.title else ""
        note = f"\n{table.note}\n" if table.note else ""
        (folder / f"{table.name}.md").write_text(title + table.markdown() + note, encoding="utf-8")
        (folder / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
        text = json.dumps(table.json(), indent=1, allow_nan=False) + "\n"
        (folder / f"{table.name}.json").write_text(text, encoding="utf-8")


def with_interval(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """`5.123 ± 0.012`; without the interval where there is none."""
    if math.isnan(estimate.value):
        return NOTHING
    text = f"{estimate.value:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(estimate.half_width) else f"{text} ± {estimate.half_width:.{digits}f}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def seeds_text(n: int) -> str:
    """`one seed`, `3 seeds`."""
    return "one seed" if n == 1 else f"{n} seeds"


def _text(value: Value) -> str:
    if isinstance(value, float):
        return NOTHING if math.isnan(value) else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parts(value: Value, wide: bool) -> list[Any]:
    if isinstance(value, Measured):
        estimate, failed = value.estimate, value.failed
        return [*_numbers(estimate), len(value.values), failed]
    if isinstance(value, Interval | Range):
        return [*_numbers(value.estimate), value.estimate.n, 0]
    return [value, "", "", "", ""] if wide else [value]


def _numbers(estimate: Estimate) -> list[Any]:
    return ["" if math.isnan(number) else number for number in (estimate.value, estimate.low, estimate.high)]


def _json(value: Value) -> Any:
    if isinstance(value, Measured):
        by_seed = {str(seed): _finite(number) for seed, number in value.values.items()}
        return {**_estimate(value.estimate), "not_converged": value.failed, "seeds": by_seed}
    if isinstance(value, Interval | Range):
        return _estimate(value.estimate)
    return _finite(value) if isinstance(value, float) else value


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _finite(estimate.value),
        "low": _finite(estimate.low),
        "high": _finite(estimate.high),
        "n": estimate.n,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
