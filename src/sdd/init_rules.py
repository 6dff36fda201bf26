"""Init rules by name, and what a placement draws by another; `sdd.models.init` has the numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

InitName = Literal[
    "base", "base/2", "base-unit-embed", "megatron", "deepnorm", "normal-0.02", "1/sqrt(d)", "1/d", "unit"
]
#: The parts of a model that may be drawn apart: the matrices of the blocks, the embedding, and a head that is not tied
#: to it.
DrawnPart = Literal["blocks", "embed", "head"]


@dataclass(frozen=True)
class Draw:
    """How one part of a model is drawn, where it differs from the rest: `std = factor * rule`.

    Attributes:
        rule: named init rule; None for the placement's.
        factor: multiplies the rule's standard deviation.
    """

    rule: InitName | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rule is not None:
            check_rule("rule", self.rule)
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor={self.factor} must be positive and finite")


def check_rule(name: str, rule: str) -> None:
    """Raise ValueError if a field's value names no init rule."""
    if rule not in get_args(InitName):
        raise ValueError(f"{name}={rule!r} is not an init rule: choose one of {list(get_args(InitName))}")


def check_draws(draws: Mapping[DrawnPart, Draw]) -> None:
    """Raise ValueError if a part is none that may be drawn apart."""
    for part in draws:
        if part not in get_args(DrawnPart):
            raise ValueError(f"draws names {part!r}: choose from {list(get_args(DrawnPart))}")


def init_words(rule: str, draws: Mapping[DrawnPart, Draw]) -> str:
    """The rule and what differs from it, such as `base; blocks x0.25, embed unit`."""
    parts = [
        " ".join([part, *([draw.rule] if draw.rule else []), *([f"x{draw.factor:g}"] if draw.factor != 1 else [])])
        for part, draw in draws.items()
    ]
    return "; ".join([rule, ", ".join(parts)] if parts else [rule])
