"""The study `robustness`: table 2 of arXiv 2502.15499, default training and three ways to make it harder."""

import math
from collections.abc import Mapping, Sequence

from sdd.lab.definition import DEFAULT, Arm, Cell, Condition, Definition, Outcome, Rates
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, Value, listed, seeds_text
from sdd.lab.statistics import paired_difference
from sdd.lab.studies.shared import (
    cost_table,
    curves_picture,
    general_limits,
    loss_axis,
    not_converged_text,
    rates_table,
)
from sdd.lab.tuning import at_edge

CONDITIONS = (
    DEFAULT,
    Condition("lr-x5", "lr x5", rate_factor=5.0),
    Condition("init-x0.1", "init std x0.1", {"model.init_scale": 0.1}),
    Condition("no-warmup", "no warm-up", {"optim.warmup": 0}),
    Condition(
        "joined", "lr x5, init std x0.1, no warm-up", {"model.init_scale": 0.1, "optim.warmup": 0}, rate_factor=5.0
    ),
)

#: Table 2: 581M parameters, 200B tokens, final loss; None did not converge. The published Pre-Norm has per-head
#: QK-norm.
PUBLISHED: Mapping[str, Mapping[str, float | None]] = {
    "prenorm-qk": {"default": 2.85, "lr-x5": 2.84, "init-x0.1": 2.86, "no-warmup": 2.85},
    "postnorm": {"default": 2.84, "lr-x5": None, "init-x0.1": None, "no-warmup": None},
    "deepnorm": {"default": 2.84, "lr-x5": None, "init-x0.1": None, "no-warmup": 2.87},
    "sdd-released": {"default": 2.83, "lr-x5": 2.81, "init-x0.1": 2.82, "no-warmup": 2.83},
}


def read(outcome: Outcome) -> Findings:
    """What the grid says, beside table 2."""
    cells = outcome.cells
    agree, differ = _compare(outcome)
    return Findings(
        answer=_answer(outcome, agree, differ),
        conclusions=[*_where_it_differs(outcome, differ), *_others(outcome), *_tuned_text(outcome)],
        limits=_limits(outcome),
        published=_published_table(outcome),
        tables=[
            _loss_table(outcome),
            _change_table(outcome),
            *rates_table(outcome),
            cost_table(_defaults(outcome), outcome),
        ],
        pictures=[
            _dots(outcome),
            curves_picture(
                "curves",
                {
                    condition.title: [cells[arm.name, condition.name] for arm in outcome.plan.arms]
                    for condition in outcome.plan.conditions
                },
            ),
        ],
    )


def broken(cell: Cell) -> bool:
    """Whether an arm counts as broken under a condition: most of its seeds did not converge."""
    return 2 * cell.failed > len(cell.results)


def _loss_table(outcome: Outcome) -> Table:
    plan = outcome.plan
    rows = [
        [arm.name, *(Measured(outcome.cells[arm.name, condition.name].losses) for condition in plan.conditions)]
        for arm in plan.arms
    ]
    return Table(
        "loss",
        f"Held-out loss at the end, nats a token, {seeds_text(plan.request.seeds)}",
        ["method", *(condition.title for condition in plan.conditions)],
        rows,
        not_converged_text(),
    )


def _change_table(outcome: Outcome) -> Table:
    plan = outcome.plan
    rows = []
    for arm in plan.arms:
        default = outcome.cells[arm.name, plan.conditions[0].name].losses
        changes = [
            paired_difference(outcome.cells[arm.name, condition.name].losses, default)
            for condition in plan.conditions[1:]
        ]
        rows.append([arm.name, *(Interval(change, signed=True) for change in changes)])
    return Table(
        "change",
        "Change from the method's own default run, nats a token",
        ["method", *(condition.title for condition in plan.conditions[1:])],
        rows,
        "Paired by seed, i.e. by initial draws and order of the data, over the seeds that converged under both; "
        "± is half of Student's 95% interval of the mean difference.",
    )


def _published_table(outcome: Outcome) -> Table:
    plan = outcome.plan
    columns = ["method", "setting", "published (581M, 200B tokens)", "ours", "pattern"]
    rows: list[list[Value]] = []
    for arm, condition, cell, theirs in _common_cells(outcome):
        same = "agrees" if (theirs is None) == broken(cell) else "differs"
        rows.append([arm.name, condition.title, _loss(theirs), Measured(cell.losses), same])
    return Table(
        "published",
        f"Table 2 of arXiv 2502.15499 beside ours ({plan.request.preset}, nats a token)",
        columns,
        rows,
        "Losses of different models on different text cannot be compared, whether training converges can: the pattern "
        "agrees where both converge or neither does (of ours, most seeds).",
    )


def _common_cells(outcome: Outcome) -> list[tuple[Arm, Condition, Cell, float | None]]:
    plan = outcome.plan
    return [
        (arm, condition, outcome.cells[arm.name, condition.name], PUBLISHED[arm.name][condition.name])
        for arm in plan.arms
        if arm.name in PUBLISHED
        for condition in plan.conditions
        if condition.name in PUBLISHED[arm.name]
    ]


def _compare(outcome: Outcome) -> tuple[list[tuple[Arm, Condition]], list[tuple[Arm, Condition]]]:
    """The cells that table 2 has too: where the pattern agrees, where it differs."""
    agree: list[tuple[Arm, Condition]] = []
    differ: list[tuple[Arm, Condition]] = []
    for arm, condition, cell, theirs in _common_cells(outcome):
        (agree if (theirs is None) == broken(cell) else differ).append((arm, condition))
    return agree, differ


def _answer(outcome: Outcome, agree: Sequence[tuple[Arm, Condition]], differ: Sequence[tuple[Arm, Condition]]) -> str:
    total = len(agree) + len(differ)
    if not total:
        return "None of the methods of table 2 is among those that were run."
    size = f"{outcome.plan.request.preset} with {seeds_text(outcome.plan.request.seeds)}"
    if not differ:
        return f"Yes: all {total} cells of table 2 come out as published, at the size of {size}."
    start = "Not at this size" if len(differ) > len(agree) else "In part"
    return (
        f"{start}: {len(agree)} of the {total} cells of table 2 come out as published ({size}), {len(differ)} do not."
    )


def _where_it_differs(outcome: Outcome, differ: Sequence[tuple[Arm, Condition]]) -> list[str]:
    """For each method that holds where it was published to break: at what it begins to break here, if at anything."""
    texts: list[str] = []
    by_arm: dict[str, list[Condition]] = {}
    for arm, condition in differ:
        by_arm.setdefault(arm.name, []).append(condition)
    for name, conditions in by_arm.items():
        holds = [c.title for c in conditions if not broken(outcome.cells[name, c.name])]
        breaks = [c.title for c in conditions if broken(outcome.cells[name, c.name])]
        if holds:
            begins = [c.title for c in outcome.plan.conditions if broken(outcome.cells[name, c.name])]
            where = (
                f"here it begins to break at: {'; '.join(begins)}" if begins else "here nothing of the grid breaks it"
            )
            texts.append(f"{name} was published to break under {listed(holds)} and converges: {where}.")
        if breaks:
            texts.append(f"{name} was published to converge under {listed(breaks)} and does not here.")
    return texts


def _others(outcome: Outcome) -> list[str]:
    """Which methods hold everywhere, which break where, and what each pays under everything joined."""
    plan = outcome.plan
    breaks = {
        arm.name: [c.title for c in plan.conditions if broken(outcome.cells[arm.name, c.name])] for arm in plan.arms
    }
    first = plan.conditions[0]
    texts = [
        f"{arm.name} does not converge even by default, so its other cells say nothing: its base rate is too high."
        for arm in plan.arms
        if broken(outcome.cells[arm.name, first.name])
    ]
    firm = [name for name, where in breaks.items() if not where]
    if firm:
        texts.append(f"No condition breaks {listed(firm)}.")
    texts += [f"{name} breaks under: {'; '.join(where)}." for name, where in breaks.items() if where]
    hardest = plan.conditions[-1]
    losses = {name: outcome.cells[name, hardest.name] for name in firm}
    if len(firm) > 1:
        ranked = sorted(firm, key=lambda name: Measured(losses[name].losses).estimate.value)
        numbers = ", ".join(f"{name} {Measured(losses[name].losses)}" for name in ranked)
        texts.append(f"Under “{hardest.title}” those end at {numbers}.")
    return texts


def _tuned_text(outcome: Outcome) -> list[str]:
    edges = [f"{arm}, {condition}" for (arm, condition), grid in outcome.grids.items() if at_edge(grid)]
    return [f"Still at an end of its extended grid, so not tuned out: {'; '.join(edges)}."] if edges else []


def _limits(outcome: Outcome) -> list[str]:
    plan = outcome.plan
    if plan.rates.kind == "common":
        rates = (
            f"All methods share one base rate, {plan.base.optim.lr:g}; “x5” is {5 * plan.base.optim.lr:g} for all. "
            "Which method is best at its own best rate is not answered by this table: the same command with --tuned "
            "tunes the rate of every cell."
        )
    else:
        rates = (
            "Each cell has the rate that is best for it on seeds and held-out windows which are not reported; “lr x5” "
            "then means nothing and is left out."
        )
    return [rates, *general_limits(outcome)]


def _dots(outcome: Outcome) -> Picture:
    plan = outcome.plan
    series = {
        condition.title: [outcome.cells[arm.name, condition.name].losses for arm in plan.arms]
        for condition in plan.conditions
    }
    names = [arm.name for arm in plan.arms]
    words = [
        f"{name}: " + ", ".join(f"{title} {Measured(cells[place])}" for title, cells in series.items()) + "."
        for place, name in enumerate(names)
    ]

    def draw():
        from sdd.lab.figures import draw_dots

        return draw_dots(names, series, loss_axis(), "a seed did not converge")

    caption = (
        f"Held-out loss at the end under each condition, mean of {seeds_text(plan.request.seeds)}; bars are the "
        "range of the seeds, crosses at the right seeds that did not converge."
    )
    return Picture("table2", caption, f"Held-out loss in nats a token. {' '.join(words)}", draw)


def _defaults(outcome: Outcome) -> list[Cell]:
    return [outcome.cells[arm.name, outcome.plan.conditions[0].name] for arm in outcome.plan.arms]


def _loss(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


DEFINITION = Definition(
    name="robustness",
    title="Does training survive a high rate, a small init, no warm-up?",
    question="does table 2 hold at this size: SDD trains at five times the rate, a tenth of the init and without "
    "warm-up, where Post-Norm and DeepNorm do not?",
    method=(
        "Models that differ only in where their norms stand are trained on the same data in the same order, once as "
        "recommended and once under each of three perturbations and all of them joined.",
        "One base learning rate is common to all methods and low enough for each to converge by default; lr x5 "
        "multiplies it.",
        "The loss is that of held-out text at the end of the schedule; a run that diverged or learned nothing is a "
        "dash.",
    ),
    arms=tuple(
        Arm(name, name) for name in ("sdd", "sdd-released", "prenorm-qk", "olmo2", "postnorm", "deepnorm", "peri")
    ),
    conditions=CONDITIONS,
    rates=Rates("common"),
    sizes={"nano": {"optim.lr": 1e-3}, "micro": {"optim.lr": 5e-4}},
    read=read,
    tuned_rates=Rates("tuned", factors=(0.5, 1.0, 2.0, 4.0, 8.0), tuning_seeds=1),
)
