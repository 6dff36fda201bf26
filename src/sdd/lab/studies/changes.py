"""The shape of studies that change one thing at a time: a base method, and each change measured against it.

A study of this shape is a `OneAtATime`: data, and a function for what it alone has to say. `define` makes its
`Definition`. Conditions are read side by side, or, if they are rates, each method at the best of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Condition, Rates
from sdd.lab.definition import Cell, Definition, Outcome, short_length
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, Value, described, listed, seeds_text
from sdd.lab.statistics import Estimate, paired_difference
from sdd.lab.studies import shared


@dataclass(frozen=True)
class Change:
    """One change of the base method.

    Attributes:
        arm: the method with the change.
        text: what changes, and why that might matter.
        optional: compared only if it is named.
    """

    arm: Arm
    text: str
    optional: bool = False


@dataclass(frozen=True)
class View:
    """What is read side by side: a cell of each method.

    Attributes:
        title: of the condition, without the length; empty where there is one view.
        cells: by name of arm.
    """

    title: str
    cells: Mapping[str, Cell]

    def losses(self, arm: str, tokens: int | None = None) -> dict[int, float]:
        """Held-out losses by seed at a number of tokens, or at the end; nan where a run did not converge."""
        return {run.seed: shared.loss_at(run, tokens) for run in self.cells[arm].results}

    def difference(self, arm: str, other: str, tokens: int | None = None) -> Estimate:
        """The loss of an arm minus that of another, paired by seed."""
        return paired_difference(self.losses(arm, tokens), self.losses(other, tokens))

    def mean(self, arm: str) -> float:
        """Mean loss at the end over the seeds; infinite if one did not converge."""
        losses = list(self.losses(arm).values())
        return float(np.mean(losses)) if losses and all(map(math.isfinite, losses)) else math.inf


@dataclass(frozen=True)
class Own:
    """What a study says beside the common tables.

    Attributes:
        answer: to its question; None for the one that names the best change.
        conclusions, limits: further sentences.
        tables, pictures: further ones.
    """

    answer: str | None = None
    conclusions: Sequence[str] = ()
    limits: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class OneAtATime:
    """The data of such a study.

    Attributes:
        base: the method that the changes are measured against.
        changes: one for each further arm.
        rivals: other methods that are shown beside: arms by the name under which the best of them counts.
        early: tokens at which the curves are read beside their ends.
        rates: whether conditions are rates, of which each method takes its best.
        ranked: whether tables are sorted by loss; else they have the order of `changes`.
        own: what the study alone says, from what was measured and the views.
    """

    base: Arm
    changes: Sequence[Change]
    rivals: Mapping[str, Sequence[Arm]] = field(default_factory=dict)
    early: Sequence[int] = ()
    rates: bool = False
    ranked: bool = False
    own: Callable[[Outcome, Sequence[View]], Own] = lambda outcome, views: Own()


def define(
    shape: OneAtATime,
    name: str,
    title: str,
    question: str,
    method: tuple[str, str, str],
    *,
    length: int,
    conditions: tuple[Condition, ...] = (DEFAULT,),
    probed: bool = False,
) -> Definition:
    """The study of a shape: two seeds at a common rate, whose runs have one length."""
    usual = [change.arm for change in shape.changes if not change.optional]
    rivals = [arm for arms in shape.rivals.values() for arm in arms]
    return Definition(
        name=name,
        title=title,
        question=question,
        method=method,
        arms=(shape.base, *usual, *rivals),
        conditions=conditions,
        rates=Rates("common"),
        sizes={},
        read=lambda outcome: read(shape, outcome),
        seeds=2,
        lengths=(length,),
        probed=probed,
        optional=tuple(change.arm for change in shape.changes if change.optional),
    )


def read(shape: OneAtATime, outcome: Outcome) -> Findings:
    """Every change against the base, at each reading and under each condition."""
    found = views(shape, outcome)
    own = shape.own(outcome, found)
    chosen = [
        "Each method counts at the best of the rates, chosen by the losses that are reported: all alike, and all "
        "come out a little too low.",
    ]
    return Findings(
        answer=own.answer or _answer(shape, outcome, found[0]),
        conclusions=[*own.conclusions, *_conclusions(shape, outcome, found)],
        limits=[
            *own.limits,
            *(chosen if shape.rates and len(outcome.plan.own_conditions) > 1 else []),
            *(
                []
                if shape.rates
                else ["The rate is the same for all: a change that wants another is judged at this one."]
            ),
            "The best of many changes looks better than it is, since the seeds that it is reported on chose it: "
            "confirm it on more seeds.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _table(shape, outcome, found),
            *own.tables,
            *([_loss_table(shape, outcome)] if shape.rates or shape.early else []),
            shared.cost_table(list(found[0].cells.values()), outcome),
        ],
        pictures=[_picture(shape, outcome, found), *own.pictures],
    )


def views(shape: OneAtATime, outcome: Outcome) -> list[View]:
    """One view for each condition at the longest length, or one with every method at its best rate."""
    conditions = outcome.plan.conditions[-len(outcome.plan.own_conditions) :]
    by_condition = [{cell.arm.name: cell for cell in outcome.under(condition)} for condition in conditions]
    if not shape.rates:
        own = outcome.plan.own_conditions
        titles = [condition.title for condition in own] if len(own) > 1 else [""]
        return [View(title, cells) for title, cells in zip(titles, by_condition, strict=True)]
    singles = [View("", cells) for cells in by_condition]
    best = {arm: min(singles, key=lambda view: view.mean(arm)).cells[arm] for arm in by_condition[0]}
    return [View("", best)]


def order(shape: OneAtATime, view: View) -> list[str]:
    """The names of the arms in the order of tables."""
    return sorted(view.cells, key=view.mean) if shape.ranked else list(view.cells)


def end_words(outcome: Outcome) -> str:
    """The tokens of a run, such as `3M`."""
    return short_length(outcome.plan.lengths[-1])


def spread_words(shape: OneAtATime, view: View, arms: Iterable[str] | None = None) -> str:
    """From which change to which the loss moves, such as `from -0.030 ± 0.010 (a) to +0.200 (b)`; empty for none."""
    names = [
        name
        for name in (arms or view.cells)
        if name in view.cells and name != shape.base.name and name in _texts(shape)
    ]
    moved = {name: view.difference(name, shape.base.name) for name in names} if shape.base.name in view.cells else {}
    moved = {name: one for name, one in moved.items() if math.isfinite(one.value)}
    if not moved:
        return ""
    ends = [min(moved, key=lambda name: moved[name].value), max(moved, key=lambda name: moved[name].value)]
    parts = [f"{Interval(moved[name], signed=True)} ({name})" for name in dict.fromkeys(ends)]
    return f"by {parts[0]}" if len(parts) == 1 else f"from {parts[0]} to {parts[1]}"


def lost_words(view: View) -> str:
    """Names the methods of which a run did not converge, as a sentence; empty if all did."""
    lost = [name for name in view.cells if math.isinf(view.mean(name))]
    where = f" under “{view.title}”" if view.title else ""
    return f"Did not converge in every seed{where}: {listed(lost)}." if lost else ""


def _texts(shape: OneAtATime) -> dict[str, str]:
    """What each arm is, by name."""
    rivals = {arm.name: "rival" for arms in shape.rivals.values() for arm in arms}
    return {shape.base.name: "the base", **rivals, **{change.arm.name: change.text for change in shape.changes}}


def _rival(shape: OneAtATime, view: View, name: str) -> str | None:
    """The arm that counts for a rival: its best."""
    there = [arm.name for arm in shape.rivals[name] if arm.name in view.cells]
    return min(there, key=view.mean) if there else None


def _readings(shape: OneAtATime, outcome: Outcome) -> dict[str, int | None]:
    """Where losses are read, by their titles."""
    end = outcome.plan.lengths[-1]
    return {**{short_length(at): at for at in shape.early if at < end}, short_length(end): None}


def _table(shape: OneAtATime, outcome: Outcome, found: Sequence[View]) -> Table:
    end = end_words(outcome)
    texts, base, readings = _texts(shape), shape.base.name, _readings(shape, outcome)
    rivals = {name: arm for name in shape.rivals if (arm := _rival(shape, found[0], name))}
    seconds = outcome.seconds_per_token
    rows: list[list[Value]] = []
    for arm in order(shape, found[0]):
        row: list[Value] = [arm, texts[arm]]
        for view in found:
            others = [(base, at) for at in readings.values()] + [(other, None) for other in rivals.values()]
            row += [f"{view.cells[arm].rate:g}"] if shape.rates else []
            row += [Measured(view.losses(arm))]
            row += [_minus(view, arm, other, at) for other, at in others]
        parameters = max((run.parameters for run in found[0].cells[arm].results), default=0)
        ratio = seconds[arm] / seconds[base] if base in seconds else math.nan
        rows.append([*row, round(ratio, 2), parameters])
    columns = ["method", "what changes"]
    for view in found:
        behind = f", {view.title}" if view.title else ""
        columns += ["rate"] if shape.rates else []
        columns += [f"loss{behind}", *(f"minus {base} at {at}{behind}" for at in readings)]
        columns += [f"minus {name}{behind}" for name in rivals]
    counted = [f"{name} is {arm}" for name, arm in rivals.items() if arm != name]
    return Table(
        "changes",
        f"Held-out loss at {end} tokens and differences, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        [*columns, "seconds, ratio", "parameters"],
        rows,
        f"Negative: ahead. Paired by seed; ± is half of Student's 95% interval. The ratio of seconds is that of a "
        f"token's to {base}'s.{' Rivals count at their best: ' + listed(counted) + '.' if counted else ''} "
        f"{shared.not_converged_text()}",
    )


def _minus(view: View, arm: str, other: str, tokens: int | None) -> Value:
    return "" if arm == other or other not in view.cells else Interval(view.difference(arm, other, tokens), signed=True)


def _loss_table(shape: OneAtATime, outcome: Outcome) -> Table:
    """The losses at each reading and rate."""
    conditions = outcome.plan.conditions[-len(outcome.plan.own_conditions) :]
    readings = _readings(shape, outcome)
    one = View("", {cell.arm.name: cell for cell in outcome.under(conditions[0])})
    rows: list[list[Value]] = [[arm] for arm in one.cells]
    for condition in conditions:
        view = View("", {cell.arm.name: cell for cell in outcome.under(condition)})
        for row in rows:
            row += [Measured(view.losses(str(row[0]), at)) for at in readings.values()]
    titles = {each.name: f"rate {outcome.under(each)[0].rate:g}" if shape.rates else each.title for each in conditions}
    columns = [f"at {at}, {titles[each.name]}" for each in conditions for at in readings]
    return Table(
        "loss",
        f"Held-out loss, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        ["method", *columns],
        rows,
        "Early losses are read off runs whose schedule is that of the whole length.",
    )


def _answer(shape: OneAtATime, outcome: Outcome, view: View) -> str:
    """Which change is best, and by how much against the base and the rivals."""
    base, end = shape.base.name, end_words(outcome)
    names = [change.arm.name for change in shape.changes if math.isfinite(_mean(view, change.arm.name))]
    if base not in view.cells or not names:
        return f"Nothing to compare: that needs {base} and a change of it."
    best = min(names, key=view.mean)
    against = [base, *(arm for name in shape.rivals if (arm := _rival(shape, view, name)))]
    words = [f"{shared.difference_words(view.difference(best, other))} {other}" for other in against]
    best_words, alone = f"{best} ({_texts(shape)[best]})", len(names) == 1
    lead = f"{best_words} ends" if alone else f"Of {len(names)} changes to {base}, {best_words} ends lowest"
    if view.difference(best, base).value >= 0 and not alone:
        lead = f"None of {len(names)} changes to {base} lowers its loss; {best_words} comes nearest"
    return f"{lead} at {end} tokens: {listed(words)}."


def _mean(view: View, arm: str) -> float:
    return view.mean(arm) if arm in view.cells else math.inf


def _conclusions(shape: OneAtATime, outcome: Outcome, found: Sequence[View]) -> list[str]:
    """Which changes move the loss by more than seeds explain, under each condition."""
    texts, base, end = [], shape.base.name, end_words(outcome)
    for view in found:
        names = [change.arm.name for change in shape.changes if change.arm.name in view.cells and base in view.cells]
        moved = {name: view.difference(name, base) for name in names}
        lower = [name for name, one in moved.items() if one.high < 0]
        higher = [name for name, one in moved.items() if one.low > 0]
        where = f", {view.title}" if view.title else f" at {end} tokens"
        chance = f" ({len(names)} were tried: at 95% about {len(names) / 20:.1f} would differ by chance)"
        chance = chance if len(names) > 1 else ""
        for what, which in (("below", lower), ("above", higher)):
            if which:
                texts.append(f"By more than seeds explain these end {what} {base}{where}: {listed(which)}{chance}.")
        texts += filter(None, [lost_words(view)])
    return texts


def _picture(shape: OneAtATime, outcome: Outcome, found: Sequence[View]) -> Picture:
    base, readings = shape.base.name, _readings(shape, outcome)
    rows = [name for name in order(shape, found[0]) if name != base]
    series = {
        view.title or f"at {title} tokens": [_by_seed(view, name, base, at) for name in rows]
        for view in found
        for title, at in (readings.items() if len(found) == 1 else [(end_words(outcome), None)])
    }
    words = {
        name: [f"{title} {Measured(cells[place])}" for title, cells in series.items()]
        for place, name in enumerate(rows)
    }

    def draw():
        from sdd.lab.figures import Axis, draw_dots

        return draw_dots(rows, series, Axis(f"loss minus that of {base}, nats a token"), "did not converge", zero=True)

    caption = (
        f"Held-out loss minus that of {base}, mean and range of {seeds_text(outcome.plan.request.seeds)}. Left of zero "
        "a change helps."
    )
    return Picture("changes", caption, f"Differences in nats a token. {described(words)}", draw)


def _by_seed(view: View, arm: str, base: str, tokens: int | None) -> dict[int, float]:
    ours = view.losses(arm, tokens)
    theirs = view.losses(base, tokens) if base in view.cells else {}
    return {seed: loss - theirs.get(seed, math.nan) for seed, loss in ours.items()}
