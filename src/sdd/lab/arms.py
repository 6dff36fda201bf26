"""The parts of a study: its methods, the settings they are compared under, and how learning rates are decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sdd.placement import Placement


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Attributes:
        name: in tables, figures and run names.
        placement: the placement's name.
        changes: fields of the run that this method sets, by dotted name.
        dense: replace the experts of a preset by one feed-forward network, as wide as the experts that a token uses.
        variant: a placement of the study's own; `placement` then names the one that it is drawn like in figures.
    """

    name: str
    placement: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dense: bool = False
    variant: Placement | None = None


@dataclass(frozen=True)
class Condition:
    """A training setting: the default one, or one that makes training harder.

    Attributes:
        name: in run names.
        title: in tables.
        changes: fields of the run that it sets, by dotted name.
        rate_factor: multiplies the learning rate.
    """

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0


DEFAULT = Condition("default", "default")


@dataclass(frozen=True)
class Rates:
    """How learning rates are decided.

    Attributes:
        kind: "common" gives all arms the base rate; "tuned" takes for each arm and condition the rate that is best on
            seeds and held-out windows of their own; "searched" does so by steps of `sdd.lab.search`, which tries init
            scales too, and starts under each condition from what was best under the one before; "sweep" reports every
            rate.
        factors: of the base rate, evenly spaced in their logarithm, ascending; while a best rate lies at an end, the
            grid is extended by its own spacing. A search starts from the one in the middle.
        tuning_seeds: number of seeds that rates are tuned on.
        inits: the init scales of a search; it starts from the first.
    """

    kind: Literal["common", "tuned", "searched", "sweep"]
    factors: tuple[float, ...] = (1.0,)
    tuning_seeds: int = 2
    inits: tuple[float, ...] = (1.0,)

    @property
    def spacing(self) -> float:
        """The ratio of neighbouring rates."""
        return (self.factors[-1] / self.factors[0]) ** (1 / (len(self.factors) - 1))


def at_depth(blocks: int) -> Condition:
    """The condition of a study by depth."""
    return Condition(f"{blocks}-blocks", f"{blocks} blocks", {"model.n_layers": blocks})


def crossed(levels: Sequence[Condition], own: Sequence[Condition]) -> tuple[Condition, ...]:
    """Every condition at every level; the conditions themselves if there are no levels."""
    if not levels:
        return tuple(own)
    return tuple(
        level
        if condition is DEFAULT
        else Condition(
            f"{condition.name}-{level.name}",
            f"{level.title}, {condition.title}",
            {**level.changes, **condition.changes},
            condition.rate_factor,
        )
        for level in levels
        for condition in own
    )


def without_rates(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Drop factors of the rate, and conditions that then repeat others: with tuned rates they mean nothing."""
    plain: list[Condition] = []
    for condition in conditions:
        if condition.rate_factor != 1:
            title = ", ".join(part for part in condition.title.split(", ") if not part.startswith("lr "))
            condition = replace(condition, name=f"{condition.name}-tuned", title=title, rate_factor=1.0)
        if all(condition.changes != other.changes for other in plain):
            plain.append(condition)
    return tuple(plain)
