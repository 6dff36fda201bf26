"""The study `robustness`: table 2 of arXiv 2502.15499, default training and three ways to make it harder."""

from collections.abc import Mapping, Sequence

from sdd.lab.arms import DEFAULT, Arm, Condition, Rates
from sdd.lab.definition import Cell, Definition, Outcome
from sdd.lab.findings import Findings, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.studies import shared, variants

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
    """Losses under each condition, beside table 2."""
    plan = outcome.plan
    common = _common_cells(outcome)
    differ = [(cell, theirs) for cell, theirs in common if not _agrees(cell, theirs)]
    return Findings(
        answer=_answer(outcome, len(common), len(differ)),
        conclusions=[*_where_it_differs(outcome, differ), *_breaking(outcome)],
        limits=_limits(outcome),
        published=_published_table(outcome, common),
        tables=[
            shared.loss_table(outcome),
            _change_table(outcome),
            *shared.rates_table(outcome),
            shared.cost_table(outcome.under(plan.conditions[0]), outcome),
        ],
        pictures=[
            _dots(outcome),
            shared.curves_picture(
                "curves", {condition.title: outcome.under(condition) for condition in plan.conditions}
            ),
        ],
    )


def _change_table(outcome: Outcome) -> Table:
    plan = outcome.plan
    rows = [[arm.name, *(shared.change(outcome, arm.name, each) for each in plan.conditions[1:])] for arm in plan.arms]
    return Table(
        "change",
        "Change from the method's own default run, nats a token",
        ["method", *(condition.title for condition in plan.conditions[1:])],
        rows,
        "Paired by seed, i.e. by initial draws and order of the data, over the seeds that converged under both; "
        "± is half of Student's 95% interval of the mean difference.",
    )


def _published_table(outcome: Outcome, common: Sequence[tuple[Cell, float | None]]) -> Table:
    preset = outcome.plan.request.preset
    rows = [
        [
            cell.arm.name,
            cell.condition.title,
            "-" if theirs is None else f"{theirs:.2f}",
            Measured(cell.losses),
            "agrees" if _agrees(cell, theirs) else "differs",
        ]
        for cell, theirs in common
    ]
    return Table(
        "published",
        f"Table 2 of arXiv 2502.15499 beside ours ({preset}, nats a token)",
        ["method", "setting", "published (581M, 200B tokens)", "ours", "pattern"],
        rows,
        "Losses of different models on different text cannot be compared, whether training converges can: the pattern "
        "agrees where both converge or neither does (of ours, most seeds).",
    )


def _common_cells(outcome: Outcome) -> list[tuple[Cell, float | None]]:
    """The cells that table 2 has too, with the published loss."""
    plan = outcome.plan
    return [
        (outcome.cells[arm.name, condition.name], PUBLISHED[arm.name][condition.name])
        for arm in plan.arms
        if arm.name in PUBLISHED
        for condition in plan.conditions
        if condition.name in PUBLISHED[arm.name]
    ]


def _agrees(cell: Cell, theirs: float | None) -> bool:
    """Whether both converge or neither does."""
    return (theirs is None) == cell.broken


def _answer(outcome: Outcome, total: int, differ: int) -> str:
    if not total:
        return "None of the methods of table 2 is among those that were run."
    size = f"{outcome.plan.request.preset} with {seeds_text(outcome.plan.request.seeds)}"
    if not differ:
        return f"Yes: all {total} cells of table 2 come out as published, at the size of {size}."
    agree = total - differ
    start = "Not at this size" if differ > agree else "In part"
    return f"{start}: {agree} of the {total} cells of table 2 come out as published ({size}), {differ} do not."


def _where_it_differs(outcome: Outcome, differ: Sequence[tuple[Cell, float | None]]) -> list[str]:
    """For each method that holds where it was published to break: where it begins to break here, if anywhere."""
    texts: list[str] = []
    for name in dict.fromkeys(cell.arm.name for cell, _ in differ):
        conditions = {cell.condition.title: cell.broken for cell, _ in differ if cell.arm.name == name}
        holds = [title for title, broken in conditions.items() if not broken]
        breaks = [title for title, broken in conditions.items() if broken]
        if holds:
            begins = _broken_under(outcome, name)
            where = (
                f"here it begins to break at: {'; '.join(begins)}" if begins else "here nothing of the grid breaks it"
            )
            texts.append(f"{name} was published to break under {listed(holds)} and converges: {where}.")
        if breaks:
            texts.append(f"{name} was published to converge under {listed(breaks)} and does not here.")
    return texts


def _broken_under(outcome: Outcome, name: str) -> list[str]:
    """The titles of the conditions that break a method."""
    return [each.title for each in outcome.plan.conditions if outcome.cells[name, each.name].broken]


def _breaking(outcome: Outcome) -> list[str]:
    """Which methods hold everywhere, what breaks the others, and how the former end under the last condition."""
    plan = outcome.plan
    breaks = {arm.name: _broken_under(outcome, arm.name) for arm in plan.arms}
    texts = [
        f"{cell.arm.name} does not converge even by default, so its other cells say nothing: its base rate is too high."
        for cell in outcome.under(plan.conditions[0])
        if cell.broken
    ]
    firm = [name for name, titles in breaks.items() if not titles]
    if firm:
        texts.append(f"No condition breaks {listed(firm)}.")
    texts += [f"{name} breaks under: {'; '.join(titles)}." for name, titles in breaks.items() if titles]
    if len(firm) > 1:
        hardest = plan.conditions[-1]
        losses = {name: Measured(outcome.cells[name, hardest.name].losses) for name in firm}
        ranked = sorted(firm, key=lambda name: losses[name].estimate.value)
        numbers = ", ".join(f"{name} {losses[name]}" for name in ranked)
        texts.append(f"Under “{hardest.title}” those end at {numbers}.")
    return texts


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
    return [rates, *shared.edge_limits(outcome), *shared.general_limits(outcome)]


def _dots(outcome: Outcome) -> Picture:
    plan = outcome.plan
    series = {each.title: [cell.losses for cell in outcome.under(each)] for each in plan.conditions}
    names = [arm.name for arm in plan.arms]
    words = {
        name: [f"{title} {Measured(cells[place])}" for title, cells in series.items()]
        for place, name in enumerate(names)
    }

    def draw():
        from sdd.lab.figures import draw_dots

        return draw_dots(names, series, shared.HELD_OUT.axis(), "a seed did not converge")

    caption = (
        f"Held-out loss at the end under each condition, mean of {seeds_text(plan.request.seeds)}; bars are the "
        "range of the seeds, crosses at the right seeds that did not converge."
    )
    return Picture("table2", caption, f"Held-out loss in nats a token. {described(words)}", draw)


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
    optional=tuple(change.arm for change in variants.CHANGES),
)
