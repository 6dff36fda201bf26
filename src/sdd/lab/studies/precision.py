"""The study `precision`: what bfloat16 costs in activations, and in the norms as well."""

from collections.abc import Sequence

from sdd.lab.arms import DEFAULT, Arm, Condition
from sdd.lab.definition import Outcome
from sdd.lab.statistics import Estimate
from sdd.lab.studies import shared
from sdd.lab.studies.changes import Change, OneAtATime, Own, View, define, end_words

_FULL, _HALF, _ALL = "float32", "bfloat16", "bfloat16-norms"


def _own(outcome: Outcome, views: Sequence[View]) -> Own:
    parts, steps = [], []
    for view in views:
        where = "by default " if view.title in ("", DEFAULT.title) else f"at {view.title} "
        names = [name for name in (_HALF, _ALL) if {name, _FULL} <= view.cells.keys()]
        words = [f"{name} ends {_words(view.difference(name, _FULL))} {_FULL}" for name in names]
        parts += [f"{where}{' and '.join(words)}"] if words else []
        if len(names) == 2:
            change = view.difference(_ALL, _HALF)
            steps.append(f"With bfloat16 activations, norms in bfloat16 end {where}{_words(change)} norms in float32.")
    answer = f"At {end_words(outcome)} tokens {'; '.join(parts)}." if parts else None
    limits = [
        "Matrix products are those of this machine's bfloat16, by autocast: weights, optimiser and loss are float32 "
        "throughout.",
        "In bfloat16 norms the mean square, the quotient and the sum with the residual stream are each rounded, as "
        "they are where a whole model runs in bfloat16.",
    ]
    return Own(answer, steps, limits)


def _words(difference: Estimate) -> str:
    return shared.difference_words(difference)


SHAPE = OneAtATime(
    base=Arm(_FULL, "sdd-v1", {"precision": "float32", "model.statistics": "float32"}),
    changes=[
        Change(Arm(_HALF, "sdd-v1", {"precision": "bfloat16", "model.statistics": "float32"}), "products in bfloat16"),
        Change(
            Arm(_ALL, "sdd-v1", {"precision": "bfloat16", "model.statistics": "bfloat16"}),
            "products, norms and residual stream in bfloat16, as released",
        ),
    ],
    early=(300_000,),
    own=_own,
)

DEFINITION = define(
    SHAPE,
    "precision",
    "Does SDD need float32 statistics?",
    "what do bfloat16 activations cost, and what norms that are computed in bfloat16 too?",
    (
        "SDD is trained in float32, with matrix products in bfloat16, and with norms and residual stream in bfloat16 "
        "as well.",
        "The released code computes its norms in bfloat16; here they are float32 whatever the activations are.",
        "All are trained at one rate with the same data in the same order, by default and drawn at a tenth of the std.",
    ),
    length=1_000_000,
    conditions=(DEFAULT, Condition("init-x0.1", "init std x0.1", {"model.init_scale": 0.1})),
)
