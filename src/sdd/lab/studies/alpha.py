"""The study `alpha`: where alpha starts, whether it decays and how fast it may move."""

from collections.abc import Sequence
from dataclasses import replace

from sdd.lab.arms import Arm
from sdd.lab.definition import Outcome
from sdd.lab.studies import shared
from sdd.lab.studies.changes import Change, OneAtATime, Own, View, define, end_words, spread_words
from sdd.placement import placements

_SDD = placements["sdd-v1"]


def _start(factor: float) -> Change:
    """SDD whose output alphas start at a multiple."""
    outputs = {site: replace(_SDD.norms[site], alpha_factor=factor) for site in ("attn_out", "ffn_out")}
    variant = replace(_SDD, norms={**_SDD.norms, **outputs}, source="a variant of sdd-v1 in this study")
    return Change(Arm(f"init{factor:g}", "sdd-v1", variant=variant), f"output alphas from {factor:g}/sqrt(2L)")


def _decay(value: float) -> Change:
    return Change(
        Arm(f"decay{value:g}", "sdd-v1", {"optim.alpha_weight_decay": value}),
        f"decay of {value:g} on all alphas and norms",
    )


def _rate(factor: float) -> Change:
    return Change(
        Arm(f"rate{factor:g}", "sdd-v1", {"optim.alpha_lr": factor}), f"rate of all alphas and norms x{factor:g}"
    )


#: By what they change.
FACTORS = {
    "init": tuple(_start(factor) for factor in (0.1, 0.3, 3.0, 10.0)),
    "decay": tuple(_decay(value) for value in (0.01, 0.1, 1.0)),
    "rate": tuple(_rate(factor) for factor in (0.1, 0.3, 3.0, 10.0)),
}


def _own(outcome: Outcome, views: Sequence[View]) -> Own:
    (view,) = views
    base = SHAPE.base.name
    words = {name: spread_words(SHAPE, view, [change.arm.name for change in FACTORS[name]]) for name in FACTORS}
    said = [f"its {name} moves it {text}" for name, text in words.items() if text]
    if not said:
        return Own()
    lowest = min((change.arm.name for change in SHAPE.changes if change.arm.name in view.cells), key=view.mean)
    best = f"lowest is {lowest}, {shared.difference_words(view.difference(lowest, base))} the default"
    return Own(
        f"Alpha moves the loss at {end_words(outcome)} tokens, against that of the default, as follows: "
        f"{'; '.join(said)} nats; {best}."
    )


SHAPE = OneAtATime(
    base=Arm("sdd-v1", "sdd-v1"),
    changes=[change for changes in FACTORS.values() for change in changes],
    early=(300_000,),
    own=_own,
)

DEFINITION = define(
    SHAPE,
    "alpha",
    "Does alpha matter?",
    "do the initial value, the decay or the learning rate of alpha matter?",
    (
        "In sdd-v1 the alphas of the two output projections start at 1/sqrt(2L), all other alphas and norms at 1; none "
        "decays, and all have the rate of the matrices.",
        "One of these is changed at a time; decay and rate are those of all alphas and norms.",
        "All are trained at one rate with the same data in the same order.",
    ),
    length=1_000_000,
)
