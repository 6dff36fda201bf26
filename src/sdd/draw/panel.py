"""The contents of figures, as numbers: curves in a panel, and heat maps.

`sdd.draw.curves` and `sdd.draw.maps` draw them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from sdd.draw.style import Style

#: A logarithmic scale of colour spans at most so many decades; smaller values get the darkest colour.
_DECADES = 9


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: the run's name, for legend and description.
        x, y: the points; a non-finite y is a gap.
        style: colour, marker and dash.
        raw: the points before smoothing, drawn faintly underneath.
        marked: whether every point gets a marker.
        broken: whether the run failed; the curve then ends in a cross.
        alarm: the x at which the first alarm began, marked by a triangle; None if there is no alarm.
        events: the x of each action of the guard, marked by a stroke.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Style
    raw: tuple[np.ndarray, np.ndarray] | None = None
    marked: bool = False
    broken: bool = False
    alarm: float | None = None
    events: tuple[float, ...] = ()

    def at(self, x: float) -> tuple[float, float]:
        """Return the point of the curve nearest to x; gaps do not count."""
        finite = np.flatnonzero(np.isfinite(self.y))
        if not len(finite):
            return x, math.nan
        nearest = finite[np.abs(self.x[finite] - x).argmin()]
        return float(self.x[nearest]), float(self.y[nearest])


@dataclass(frozen=True)
class Panel:
    """One pair of axes with curves.

    Attributes:
        title: stands above the axes.
        unit: label of the vertical axis.
        lines: the curves.
        log: whether the vertical axis is logarithmic.
        ceiling: the greatest value shown; higher ones are cut off at the top. None shows all.
        limits: of the vertical axis; None fits it to the curves.
        reference: a horizontal line, as height and name.
        against: label of the horizontal axis.
    """

    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    log: bool = False
    ceiling: float | None = None
    limits: tuple[float, float] | None = None
    reference: tuple[float, str] | None = None
    against: str = "tokens"

    @property
    def clipped(self) -> bool:
        """Whether a curve is cut off at the top."""
        return self.ceiling is not None and bool((self._values() > self.ceiling).any())

    def describe(self) -> str:
        """Describe the figure in words, for readers who cannot see it."""
        parts = [f"{self.title}, {self.unit}, against {self.against}."]
        if self.reference:
            parts.append(f"{self.reference[1]}: {self.reference[0]:.3g}.")
        for line in self.lines:
            finite = line.y[np.isfinite(line.y)]
            if len(finite):
                end = ", where it broke off" if line.broken else ""
                parts.append(f"{line.label}: from {finite[0]:.3g} to {finite[-1]:.3g}{end}.")
        return " ".join(parts)

    def extent(self) -> tuple[float, float] | None:
        """The lowest and the highest value shown, the reference included, with a small margin; None without values."""
        values = np.append(self._values(), self.reference[0] if self.reference else [])
        if not len(values):
            return None
        low, high = float(values.min()), float(values.max())
        high = high if self.ceiling is None else max(low, min(high, self.ceiling))
        if self.log:
            margin = max((high / low) ** 0.05, 1.01)
            return low / margin, high * margin
        margin = 0.05 * ((high - low) or abs(high) or 1)
        return low - margin, high + margin

    def _values(self) -> np.ndarray:
        curves = [y for line in self.lines for y in (line.y, line.raw[1] if line.raw else line.y[:0])]
        values = np.concatenate(curves) if curves else np.empty(0)
        return values[values > 0] if self.log else values[np.isfinite(values)]


@dataclass(frozen=True)
class HeatMap:
    """One statistic of one run, in rows of blocks or sites.

    Attributes:
        name: of the statistic, fit for a file name.
        title: stands above the map.
        unit: label of the scale of colour.
        run: the run's name.
        steps: int `[S]`, the step of each column, or the expert.
        rows: the name of each row, from the input on.
        values: float64 `[R, S]`; non-finite values have a colour of their own.
        log: whether the scale of colour is logarithmic.
        threshold: the value above which an alarm is raised; None if the alarm does not depend on the value itself.
        marks: (row, column) of the cells in which an alarm about this statistic began.
        limits: of the scale of colour; None fits it to the values.
        across: label of the columns.
        missing: describes a non-finite cell.
    """

    name: str
    title: str
    unit: str
    run: str
    steps: np.ndarray
    rows: tuple[str, ...]
    values: np.ndarray
    log: bool = True
    threshold: float | None = None
    marks: tuple[tuple[int, int], ...] = ()
    limits: tuple[float, float] | None = None
    across: str = "probed step"
    missing: str = "not finite"

    def extent(self) -> tuple[float, float] | None:
        """The lowest and the highest finite value, positive ones only on a logarithmic scale; None without any."""
        shown = self.values[np.isfinite(self.values) & ((self.values > 0) | (not self.log))]
        return (float(shown.min()), float(shown.max())) if len(shown) else None

    @property
    def scale(self) -> tuple[float, float]:
        """The ends of the scale of colour: `limits` or the extent, widened if they coincide, at most nine decades."""
        low, high = self.limits or self.extent() or (1.0, 10.0)
        if not self.log:
            return low, high if high > low else low + 1
        low = max(low, high * 10.0**-_DECADES)
        return (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)

    def describe(self) -> str:
        """Describe the map in words, for readers who cannot see it."""
        over = f"by block over {self.across}s {self.steps[0]} to {self.steps[-1]}"
        begin = f"{self.title}, {self.unit}, of {self.run}, {over}."
        found = self.extent()
        if found is None:
            return f"{begin} No value is finite."
        last, lacking = self.values[:, -1], int((~np.isfinite(self.values)).sum())
        parts = [begin, f"Between {found[0]:.3g} and {found[1]:.3g}."]
        if self.across.endswith("step") and np.isfinite(last).any():
            parts.append(f"At the last step from {np.nanmin(last):.3g} to {np.nanmax(last):.3g}.")
        if lacking:
            parts.append(f"{lacking} of {self.values.size} are {self.missing}.")
        return " ".join(parts)


_Content = TypeVar("_Content", Panel, HeatMap)


def share_scale(contents: Sequence[_Content]) -> list[_Content]:
    """Give panels, or maps, one common scale, so that they can be compared by eye."""
    extents = [extent for each in contents if (extent := each.extent())]
    limits = (min(low for low, _ in extents), max(high for _, high in extents)) if extents else None
    return [replace(each, limits=limits) for each in contents]
