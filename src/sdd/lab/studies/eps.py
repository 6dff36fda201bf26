"""The study `eps`: how large eps may be, at the usual init and at a tenth of it."""

import math
from collections.abc import Sequence

from sdd.lab.arms import DEFAULT, Arm, Condition
from sdd.lab.definition import Cell, Outcome
from sdd.lab.findings import Interval, Table, Value, listed, seeds_text
from sdd.lab.studies.changes import Change, OneAtATime, Own, View, define, end_words
from sdd.placement import placements

_SDD = placements["sdd-v1"]
VALUES = (1e-12, 1e-9, 1e-5, 1e-4, 1e-3, 1e-2)
#: A share of eps in a norm from which on it bends the method, as the probe's checks have it.
_BENDS = 0.01


def shares(cell: Cell, column: str, place: int) -> list[float]:
    """The share eps / mean(z^2) in each run of a cell, by a column of `RunResult.probe`, first (0) or last (-1)."""
    return [run.probe[column][place] for run in cell.results if run.probe.get(column)]


def harmless(view: View, base: str) -> list[str]:
    """The methods whose loss is not told apart from the base's, or lies below it."""
    return [
        name
        for name in view.cells
        if name == base or (not view.difference(name, base).low > 0 and math.isfinite(view.mean(name)))
    ]


def _own(outcome: Outcome, views: Sequence[View]) -> Own:
    base = SHAPE.base.name
    parts = []
    for view in views:
        if base not in view.cells or len(view.cells) < 2:
            continue
        if math.isinf(view.mean(base)):
            parts.append(f"{_words(view)} nothing can be said, since {base} did not converge in every seed")
            continue
        changed = [name for name in view.cells if name != base]
        costs = {name: view.difference(name, base) for name in changed}
        finite = {name: one for name, one in costs.items() if math.isfinite(one.value)}
        worst = max(finite, key=lambda name: finite[name].value, default=None)
        kept = [name for name in harmless(view, base) if name != base]
        text = f"{listed(kept)} cost nothing that seeds do not explain" if kept else "every other eps costs something"
        if worst is not None:
            text += f", the worst is {worst} with {Interval(finite[worst], signed=True)} nats"
        lost = [name for name in changed if name not in finite]
        text += f", and {listed(lost)} did not converge" if lost else ""
        parts.append(f"{_words(view)} {text}")
    answer = f"Beside {base} at {end_words(outcome)} tokens, {'; '.join(parts)}." if parts else None
    return Own(answer, tables=[_table(outcome, views)])


def _words(view: View) -> str:
    return "at the usual init" if view.title in ("", DEFAULT.title) else f"at {view.title}"


def _table(outcome: Outcome, views: Sequence[View]) -> Table:
    rows: list[list[Value]] = []
    for view in views:
        for name, cell in view.cells.items():
            row: list[Value] = [name, _words(view).removeprefix("at ")]
            for place in (0, -1):
                for column in ("eps_median", "eps_max"):
                    found = shares(cell, column, place)
                    row.append(f"{100 * max(found):.2g}%" if found else "-")
            row.append("yes" if max(shares(cell, "eps_max", -1), default=0.0) > _BENDS else "no")
            rows.append(row)
    columns = [f"{which} {when}" for when in ("at first", "at the end") for which in ("median", "worst norm")]
    return Table(
        "shares",
        f"eps / mean(z^2), in percent, over a model's norms; the largest of {seeds_text(outcome.plan.request.seeds)}",
        ["method", "init", *columns, f"above {_BENDS:.0%} at the end"],
        rows,
        "A norm divides by sqrt(mean(z^2) + eps): where the share is not small, its output is smaller than alpha and "
        "knows the scale of V. Each norm's share is a mean over tokens and groups.",
    )


def _name(value: float) -> str:
    return f"eps{value:.0e}".replace("e-0", "e-")


SHAPE = OneAtATime(
    base=Arm("eps1e-6", "sdd-v1"),
    changes=[
        Change(Arm(_name(value), "sdd-v1", variant=_SDD.replace_eps(value)), f"eps of every norm {value:.0e}")
        for value in VALUES
    ],
    own=_own,
)

DEFINITION = define(
    SHAPE,
    "eps",
    "How large may eps be?",
    "how does the loss depend on the eps of the norms, at the usual init and at a tenth of it?",
    (
        "Every norm of sdd-v1 has the same eps, which is changed over ten orders of magnitude.",
        "All are trained at one rate with the same data in the same order, drawn at the usual std and at a tenth "
        "of it, where mean squares are a hundredth.",
        "The probe gives the share of eps in each norm, eps / mean(z^2), at the first step and at the last.",
    ),
    length=1_000_000,
    probed=True,
    conditions=(DEFAULT, Condition("init-x0.1", "init std x0.1", {"model.init_scale": 0.1})),
)
