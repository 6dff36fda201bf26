"""The study `optimizers`: whether the gaps between placements depend on the optimiser, every pair tuned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome, short_length
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.statistics import Estimate, paired_difference
from sdd.lab.studies import shared

#: Name of each optimiser in a config, with its title.
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon", "stable-adamw": "StableAdamW"}
PLACEMENTS = ("sdd", "peri", "prenorm-qk")
#: Placements that may be named beside them.
OTHERS = ("sdd-v1",)


@dataclass(frozen=True)
class Gap:
    """How far our placement lies below another one, both under one optimiser.

    Attributes:
        optimizer: its name in a config.
        ours: our placement, see `shared.ours`.
        other: the other placement.
        cells: of ours and of the other.
    """

    optimizer: str
    ours: str
    other: str
    cells: tuple[Cell, Cell]

    @property
    def estimate(self) -> Estimate:
        """Held-out loss of ours minus the other's at the end, paired by seed."""
        ours, theirs = self.cells
        return paired_difference(ours.losses, theirs.losses)

    @property
    def by_seed(self) -> dict[int, float]:
        """The same for each seed; nan where one of the two did not converge."""
        ours, theirs = (cell.losses for cell in self.cells)
        return {seed: loss - theirs.get(seed, math.nan) for seed, loss in ours.items()}


def read(outcome: Outcome) -> Findings:
    """Losses by optimiser, gaps between placements under each, and what a token costs."""
    found = gaps(outcome)
    return Findings(
        answer=_answer(outcome, found),
        conclusions=[*_moves(outcome, found), *_gains(outcome)],
        limits=[
            *shared.search_limits(outcome),
            "Rate and init scale are searched for every pair, all other numbers of an optimiser are its defaults: "
            "decay, betas and Muon's momentum are the same for every placement.",
            "A search compares settings on one tuning seed: gaps of the size of a seed's noise may be those of a "
            "setting.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _loss_table(outcome),
            _gap_table(outcome, found),
            _gain_table(outcome),
            shared.settings_table(outcome),
            shared.cost_table(_last(outcome), outcome),
        ],
        pictures=[
            _picture(outcome, found),
            shared.curves_picture("curves", _by_optimizer(outcome)),
        ],
    )


def gaps(outcome: Outcome) -> list[Gap]:
    """Every placement beside ours under every optimiser, at the longest length."""
    there = {(optimizer_of(cell.arm), cell.arm.placement): cell for cell in _last(outcome)}
    ours = shared.ours(outcome)
    return [
        Gap(optimizer, ours, other, (there[optimizer, ours], there[optimizer, other]))
        for optimizer in OPTIMIZERS
        for other in _placements(outcome)
        if other != ours and {(optimizer, ours), (optimizer, other)} <= there.keys()
    ]


def _placements(outcome: Outcome) -> list[str]:
    """Those that the study has, in the order of tables."""
    trained = {arm.placement for arm in outcome.plan.arms}
    return [name for name in (*PLACEMENTS, *OTHERS) if name in trained]


def optimizer_of(arm: Arm) -> str:
    """The optimiser's name in an arm's config."""
    return str(arm.changes["optim.name"])


def _last(outcome: Outcome) -> list[Cell]:
    return outcome.under(outcome.plan.conditions[-1])


def _by_optimizer(outcome: Outcome) -> dict[str, list[Cell]]:
    """The cells under each optimiser that the study has, by its title."""
    cells = _last(outcome)
    found = {title: [c for c in cells if optimizer_of(c.arm) == name] for name, title in OPTIMIZERS.items()}
    return {title: group for title, group in found.items() if group}


def _loss_table(outcome: Outcome) -> Table:
    groups = _by_optimizer(outcome)
    rows = []
    for placement in _placements(outcome):
        losses = [[cell.losses for cell in cells if cell.arm.placement == placement] for cells in groups.values()]
        if any(losses):
            rows.append([placement, *(Measured(found[0]) if found else "" for found in losses)])
    return Table(
        "loss",
        f"Held-out loss at the end of {_length(outcome)} tokens, nats a token, "
        f"{seeds_text(outcome.plan.request.seeds)}, rate and init scale searched for every pair",
        ["method", *groups],
        rows,
        shared.not_converged_text(),
    )


def _gap_table(outcome: Outcome, found: Sequence[Gap]) -> Table:
    names = [name for name in OPTIMIZERS if any(gap.optimizer == name for gap in found)]
    by = {(gap.optimizer, gap.other): gap for gap in found}
    rows = []
    for other in dict.fromkeys(gap.other for gap in found):
        here = [by.get((name, other)) for name in names]
        rows.append(
            [
                f"{shared.ours(outcome)} against {other}",
                *(Interval(gap.estimate, signed=True) if gap else "" for gap in here),
                *(Interval(_change(here[0], gap), signed=True) if gap and here[0] else "" for gap in here[1:]),
            ]
        )
    titles = [OPTIMIZERS[name] for name in names]
    return Table(
        "gap",
        "Held-out loss at the end minus the other method's, nats a token",
        ["comparison", *titles, *(f"{title} minus {titles[0]}" for title in titles[1:])],
        rows,
        f"Negative: {shared.ours(outcome)} is ahead. Paired by seed; ± is half of Student's 95% interval. The last "
        "columns say how far a gap moves with the optimiser: the difference of two gaps, paired by seed too.",
    )


def _gain_table(outcome: Outcome) -> Table:
    gains = _gain_estimates(outcome)
    names = list(dict.fromkeys(name for name, _ in gains))
    rows = [
        [
            placement,
            *(Interval(gains[name, placement], signed=True) if (name, placement) in gains else "" for name in names),
        ]
        for placement in dict.fromkeys(placement for _, placement in gains)
    ]
    return Table(
        "gain",
        "Held-out loss at the end minus that of the same method under AdamW, nats a token",
        ["method", *(OPTIMIZERS[name] for name in names)],
        rows,
        "Negative: the optimiser is ahead of AdamW. Paired by seed; ± is half of Student's 95% interval.",
    )


def _gain_estimates(outcome: Outcome) -> dict[tuple[str, str], Estimate]:
    """By optimiser and placement: the loss minus that under AdamW."""
    there = {(optimizer_of(cell.arm), cell.arm.placement): cell for cell in _last(outcome)}
    return {
        (name, placement): paired_difference(cell.losses, there["adamw", placement].losses)
        for (name, placement), cell in there.items()
        if name != "adamw" and ("adamw", placement) in there
    }


def _change(first: Gap, second: Gap) -> Estimate:
    """The gap under the second's optimiser minus that under the first's."""
    return paired_difference(second.by_seed, first.by_seed)


def _answer(outcome: Outcome, found: Sequence[Gap]) -> str:
    if not found:
        return f"Nothing to compare: that needs {shared.ours(outcome)} and another method under one optimiser."
    parts = []
    for optimizer, title in OPTIMIZERS.items():
        words = [f"{shared.difference_words(gap.estimate)} {gap.other}" for gap in found if gap.optimizer == optimizer]
        if words:
            parts.append(f"under {title} it ends {listed(words)}")
    ours = shared.ours(outcome)
    return f"At {_length(outcome)} tokens, {ours} beside the others, every pair tuned: {'; '.join(parts)}."


def _moves(outcome: Outcome, found: Sequence[Gap]) -> list[str]:
    """Whether each gap depends on the optimiser."""
    by = {(gap.optimizer, gap.other): gap for gap in found}
    texts = []
    for (optimizer, other), gap in by.items():
        first = by.get(("adamw", other))
        if optimizer == "adamw" or first is None:
            continue
        change = _change(first, gap)
        told = "" if change.excludes(0) else ", not told apart from zero"
        texts.append(
            f"From AdamW to {OPTIMIZERS[optimizer]} the gap of {gap.ours} to {other} moves by "
            f"{Interval(change, signed=True)} nats{told}."
        )
    return texts


def _gains(outcome: Outcome) -> list[str]:
    """What each optimiser does for every placement."""
    gains = _gain_estimates(outcome)
    texts = []
    for name in dict.fromkeys(name for name, _ in gains):
        words = [f"{Interval(gain, signed=True)} for {at}" for (each, at), gain in gains.items() if each == name]
        texts.append(f"{OPTIMIZERS[name]} moves the loss from AdamW's by {listed(words)}, in nats a token.")
    return texts


def _length(outcome: Outcome) -> str:
    return short_length(outcome.plan.lengths[-1])


def _picture(outcome: Outcome, found: Sequence[Gap]) -> Picture:
    ours = shared.ours(outcome)
    words = {
        OPTIMIZERS[name]: [
            f"{Interval(gap.estimate, signed=True)} to {gap.other}" for gap in found if gap.optimizer == name
        ]
        for name in dict.fromkeys(gap.optimizer for gap in found)
    }

    def draw():
        from sdd.lab.figures import Axis, draw_dots

        others = list(dict.fromkeys(gap.other for gap in found))
        by = {(gap.optimizer, gap.other): gap.by_seed for gap in found}
        series = {
            OPTIMIZERS[name]: [by.get((name, other), {}) for other in others]
            for name in dict.fromkeys(gap.optimizer for gap in found)
        }
        rows = [f"{ours} against {other}" for other in others]
        return draw_dots(rows, series, Axis("loss minus the other's, nats a token"), "did not converge")

    caption = (
        f"Held-out loss of {ours} minus that of the others under each optimiser at {_length(outcome)} tokens, mean and "
        f"range of {seeds_text(outcome.plan.request.seeds)}. Left of zero {ours} is ahead."
    )
    return Picture("gap", caption, f"Gaps in nats a token. {described(words)}", draw)


def _arms(placements: Sequence[str], *names: str) -> tuple[Arm, ...]:
    """Every placement under the optimisers of these names."""
    return tuple(Arm(f"{at}-{name}", at, {"optim.name": name}) for name in names for at in placements)


DEFINITION = Definition(
    name="optimizers",
    title="Do the gaps depend on the optimiser?",
    question="do the gaps between placements depend on the optimiser, when every pair of the two is tuned?",
    method=(
        "Placements are trained under each optimiser; learning rate and init scale of every pair are "
        "searched on a seed and held-out windows of their own, by the same steps for all.",
        "With what was found each pair is trained on fresh seeds, the same data in the same order for all.",
        "A gap is the difference of two placements' losses under one optimiser; whether it depends on the optimiser is "
        "the difference of two gaps.",
    ),
    arms=_arms(PLACEMENTS, "adamw", "muon"),
    conditions=(DEFAULT,),
    rates=Rates("searched", (1.0, 2.0, 4.0), tuning_seeds=1, inits=(1.0, 0.5, 0.25, 0.1)),
    sizes={},
    read=read,
    lengths=(1_000_000,),
    optional=(*_arms(PLACEMENTS, "stable-adamw"), *_arms(OTHERS, *OPTIMIZERS)),
)
