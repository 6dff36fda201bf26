"""Search for the best learning rate and init scale, one step at a time, as a pure function of losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

#: A search that has moved so often ends where it stands.
MOST_MOVES = 10


class Setting(NamedTuple):
    """What a search decides.

    Attributes:
        rate: the learning rate, before the condition's factor.
        init: multiplies the std of the initial draw.
    """

    rate: float
    init: float = 1.0


@dataclass(frozen=True)
class Lattice:
    """The settings that a search may come to.

    Attributes:
        rate: one of the rates; the others are `rate * spacing**n`, rounded to three digits.
        spacing: the ratio of neighbouring rates.
        inits: the init scales to choose from.
    """

    rate: float
    spacing: float
    inits: tuple[float, ...]

    def neighbours(self, setting: Setting) -> list[Setting]:
        """The settings one step away: two rates, and the inits on both sides."""
        ordered = sorted(self.inits)
        place = ordered.index(setting.init)
        step = round(math.log(setting.rate / self.rate) / math.log(self.spacing))
        rates = [round_rate(self.rate * self.spacing ** (step + one)) for one in (-1, 1)]
        beside = [ordered[at] for at in (place - 1, place + 1) if 0 <= at < len(ordered)]
        return [*(Setting(rate, setting.init) for rate in rates), *(Setting(setting.rate, init) for init in beside)]


@dataclass(frozen=True)
class Search:
    """Where a search stands.

    Attributes:
        best: the setting with the lowest loss so far.
        visited: every setting that was compared, in the order in which the search came to it.
        missing: the settings whose losses the search needs to go on; empty when it has ended.
        ended_by: "found" if no neighbour of `best` is better, "moves" if the search moved `MOST_MOVES` times.
    """

    best: Setting
    visited: tuple[Setting, ...]
    missing: tuple[Setting, ...]
    ended_by: str = ""


def search(loss: Callable[[Setting], float | None], start: Setting, lattice: Lattice) -> Search:
    """Move from a setting to its best neighbour until no neighbour is better.

    The path depends on the losses alone, so a search that was interrupted comes to the same end. Where nothing
    converges it moves to lower rates.

    Args:
        loss: of a setting; infinite if its runs did not converge, None if they have not been run.
        start: the first setting.
        lattice: the settings to choose from.
    """
    best, visited = start, dict[Setting, None]()
    for _ in range(MOST_MOVES):
        around = [best, *lattice.neighbours(best)]
        visited |= dict.fromkeys(around)
        losses = {setting: loss(setting) for setting in around}
        missing = tuple(setting for setting, found in losses.items() if found is None)
        if missing:
            return Search(best, tuple(visited), missing)
        better = min(around, key=lambda setting: _rank(setting, losses[setting]))
        if better == best:
            return Search(best, tuple(visited), (), "found")
        best = better
    return Search(best, tuple(visited), (), "moves")


def round_rate(rate: float) -> float:
    """Round a rate to three digits, so that names and tables show the very rate that is used."""
    return float(f"{rate:.3g}")


def _rank(setting: Setting, loss: float | None) -> tuple[float, float]:
    """Where nothing converged the lower rate comes first."""
    assert loss is not None
    return loss, setting.rate if math.isinf(loss) else 0.0
