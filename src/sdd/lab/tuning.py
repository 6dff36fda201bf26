"""Which learning rate a method gets: the best on seeds and held-out windows that are not reported."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sdd.lab.definition import Cell, round_rate

#: How far a grid is extended beyond its first ends, in steps of its spacing.
MOST_EXTENSIONS = 4


def tuning_loss(cell: Cell) -> float:
    """Mean loss on the tuning segment over the cell's seeds; infinite if one did not converge."""
    if not cell.results or cell.failed:
        return math.inf
    return float(np.mean([result.tuning_loss for result in cell.results]))


def best_rate(grid: Mapping[float, Cell]) -> float:
    """The rate with the lowest tuning loss; the lowest rate if nothing converged at any."""
    return min(sorted(grid), key=lambda rate: tuning_loss(grid[rate]))


def extension(rates: Sequence[float], best: float, first: Sequence[float], spacing: float) -> float | None:
    """The rate to add where the best one lies at an end of the grid.

    Args:
        rates: the grid so far, ascending.
        best: one of them.
        first: the grid at the start, ascending; beyond its ends at most `MOST_EXTENSIONS` rates are added.
        spacing: the ratio of neighbouring rates.

    Returns:
        None if the best rate is no end, or the grid has been extended enough on that side.
    """
    if best == rates[0] and sum(rate < first[0] for rate in rates) < MOST_EXTENSIONS:
        return round_rate(best / spacing)
    if best == rates[-1] and sum(rate > first[-1] for rate in rates) < MOST_EXTENSIONS:
        return round_rate(best * spacing)
    return None


def at_edge(grid: Mapping[float, Cell]) -> bool:
    """Whether the best rate still lies at an end."""
    return best_rate(grid) in (min(grid), max(grid))
