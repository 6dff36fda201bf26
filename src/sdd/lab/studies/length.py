"""The study `length`: how the lead of SDD changes with the number of tokens, every method tuned at each length."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Rates
from sdd.lab.definition import Cell, Definition, Outcome, short_length
from sdd.lab.findings import Findings, Interval, Measured, Picture, Range, Table, described, listed, seeds_text
from sdd.lab.statistics import Estimate, first_reach, mean_factor, mean_interval, paired_difference
from sdd.lab.studies import shared, variants
from sdd.lab.studies.convergence import factor

#: The methods that the others are compared with.
BASELINES = ("prenorm-qk", "peri")
#: Variants of SDD that are placements by now.
CHANGED = ("sdd", "sdd-depth")


@dataclass(frozen=True)
class Lead:
    """A method beside a baseline over lengths.

    Attributes:
        method: name of its arm.
        baseline: name of its arm.
        cells: (method, baseline) by number of tokens, ascending.
    """

    method: str
    baseline: str
    cells: Mapping[int, tuple[Cell, Cell]]

    @property
    def name(self) -> str:
        """Of the comparison, in tables."""
        return f"{self.method} against {self.baseline}"

    def by_seed(self, tokens: int) -> dict[int, float]:
        """Held-out loss of the method minus the baseline's, for each seed; nan where one did not converge."""
        ours, theirs = (cell.losses for cell in self.cells[tokens])
        return {seed: loss - theirs.get(seed, math.nan) for seed, loss in ours.items()}

    def difference(self, tokens: int) -> Estimate:
        """Held-out loss of the method minus the baseline's at the end of runs of that length, paired by seed."""
        ours, theirs = self.cells[tokens]
        return paired_difference(ours.losses, theirs.losses)

    def by_curve(self, tokens: int) -> Estimate:
        """Factor of tokens between the curves of two runs of that length, see `convergence.factor`."""
        ours, theirs = ({run.seed: run for run in cell.results if run.converged} for cell in self.cells[tokens])
        return mean_factor([factor(run, theirs[seed], "tokens") for seed, run in ours.items() if seed in theirs])

    def by_length(self, tokens: int) -> Estimate:
        """How many times fewer tokens the method needs, both tuned for the length they are read at.

        The better method of the two has as its line the final losses of its runs against the logarithm of their
        tokens. The factor is the tokens of that length over those at which this line comes down to the final loss of
        the worse one; below one if the method is the worse. No number where the line begins lower than that.
        """
        found = []
        for seed in self._seeds:
            ours, theirs = self._losses(seed, 0), self._losses(seed, 1)
            better, worse, sign = (ours, theirs, 1) if ours[tokens] <= theirs[tokens] else (theirs, ours, -1)
            line = {at: loss for at, loss in better.items() if at <= tokens and math.isfinite(loss)}
            logs = [math.log(at) for at in line]
            reached = first_reach(logs, list(line.values()), worse[tokens])
            if math.isfinite(reached) and (reached > logs[0] or worse[tokens] == line[min(line)]):
                found.append(math.exp(sign * (math.log(tokens) - reached)))
        return mean_factor(found if len(found) == len(self._seeds) else [])

    @property
    def trend(self) -> Estimate:
        """Change of the difference for ten times as many tokens: least squares for each seed, then over seeds."""
        slopes = []
        for seed in self._seeds:
            ours, theirs = self._losses(seed, 0), self._losses(seed, 1)
            points = [(math.log10(at), ours[at] - theirs[at]) for at in self.cells]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if len(points) > 1:
                slopes.append(float(np.polyfit([x for x, _ in points], [y for _, y in points], 1)[0]))
        return mean_interval(slopes)

    @property
    def _seeds(self) -> list[int]:
        return sorted(set.intersection(*(set(cell.losses) for pair in self.cells.values() for cell in pair)))

    def _losses(self, seed: int, side: int) -> dict[int, float]:
        return {tokens: pair[side].losses[seed] for tokens, pair in self.cells.items()}


def read(outcome: Outcome) -> Findings:
    """Losses, leads and factors by length, the trend of the lead, and the settings that were found."""
    found = leads(outcome)
    longest = outcome.plan.conditions[-1]
    return Findings(
        answer=_answer(outcome, found),
        conclusions=[_conclusion(lead) for lead in found],
        limits=[
            *shared.search_limits(outcome),
            *_variant_limits(outcome),
            "A search compares settings on one tuning seed: gaps between methods of the size of a seed's noise may be "
            "those of a setting.",
            "Lengths are not extrapolated: nothing here says what holds beyond the longest.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[
            _loss_table(outcome),
            _lead_table(outcome, found),
            _factor_table(outcome, found),
            shared.settings_table(outcome),
            shared.cost_table(outcome.under(longest), outcome),
        ],
        pictures=[
            _picture(outcome, found),
            shared.curves_picture("curves", {longest.title: outcome.under(longest)}, ceiling=_ceiling(outcome)),
        ],
    )


def leads(outcome: Outcome) -> list[Lead]:
    """Every method beside every baseline that the study has, and a changed SDD beside the one that it changes."""
    arms = [arm.name for arm in outcome.plan.arms]
    pairs = [(arm, baseline) for baseline in BASELINES for arm in arms]
    changed = {*(arm.name for arm in _variants(outcome)), *CHANGED}
    pairs += [(arm, variants.SHAPE.base.name) for arm in arms if arm in changed]
    lengths = dict(zip(outcome.plan.lengths, outcome.plan.conditions, strict=True))
    return [
        Lead(
            arm,
            baseline,
            {at: (outcome.cells[arm, each.name], outcome.cells[baseline, each.name]) for at, each in lengths.items()},
        )
        for arm, baseline in pairs
        if baseline in arms and arm != baseline
    ]


def _variants(outcome: Outcome) -> list[Arm]:
    return [arm for arm in outcome.plan.arms if arm in outcome.plan.definition.optional]


def _variant_limits(outcome: Outcome) -> list[str]:
    names = [arm.name for arm in _variants(outcome)]
    if not names:
        return []
    which = "is a variant" if len(names) == 1 else "are variants"
    return [
        f"{listed(names)} {which} of the study variants: if seeds that are reported here chose among variants there, "
        "the lead looks larger than it is."
    ]


def _loss_table(outcome: Outcome) -> Table:
    plan = outcome.plan
    rows = [
        [arm.name, *(Measured(outcome.cells[arm.name, condition.name].losses) for condition in plan.conditions)]
        for arm in plan.arms
    ]
    return Table(
        "loss",
        f"Held-out loss at the end, nats a token, {seeds_text(plan.request.seeds)}, every method tuned at each length",
        ["method", *(condition.title for condition in plan.conditions)],
        rows,
        shared.not_converged_text(),
    )


def _lead_table(outcome: Outcome, found: Sequence[Lead]) -> Table:
    rows = [
        [
            lead.name,
            *(Interval(lead.difference(at), signed=True) for at in lead.cells),
            Interval(lead.trend, signed=True),
        ]
        for lead in found
    ]
    return Table(
        "lead",
        "Held-out loss at the end minus the baseline's, nats a token",
        ["comparison", *(condition.title for condition in outcome.plan.conditions), "for ten times the tokens"],
        rows,
        "Negative: the method is ahead. Paired by seed; ± is half of Student's 95% interval. The last column is the "
        "slope of the difference against the logarithm of the tokens, by least squares for each seed: above zero a "
        "lead shrinks.",
    )


def _factor_table(outcome: Outcome, found: Sequence[Lead]) -> Table:
    titles = [condition.title for condition in outcome.plan.conditions]
    rows = [
        [lead.name, *(Range(lead.by_length(at)) for at in lead.cells), *(Range(lead.by_curve(at)) for at in lead.cells)]
        for lead in found
    ]
    return Table(
        "factor",
        "How many times fewer tokens to the same loss",
        ["comparison", *titles, *(f"{title}, by curves" for title in titles)],
        rows,
        "Above 1 the method needs fewer. First the fair reading: the losses of runs that were each tuned for their "
        "length, against the logarithm of tokens; a dash where that needs a run shorter than the shortest. By curves, "
        "as in the study convergence: the curve of the better run, read before its schedule has ended, against the "
        "end of the other's. Geometric mean over seeds with the t interval of the logarithms.",
    )


def _answer(outcome: Outcome, found: Sequence[Lead]) -> str:
    if not found:
        return f"Nothing to compare: that needs {listed(BASELINES)} or one of them, or sdd and a variant of it."
    method = found[0].method
    at = outcome.plan.lengths[-1]
    parts = []
    for lead in found:
        if lead.method == method:
            parts.append(f"{shared.difference_words(lead.difference(at))} {lead.baseline}")
    return f"At {short_length(at)} tokens, each tuned for that length, {method} ends {listed(parts)}."


def _conclusion(lead: Lead) -> str:
    parts = [f"{shared.difference_words(lead.difference(at))} at {short_length(at)}" for at in lead.cells]
    trend = lead.trend
    if len(lead.cells) < 2 or math.isnan(trend.value):
        return f"{lead.name}: {listed(parts)} tokens."
    moves = "no trend told apart from zero"
    if trend.n < 2 or trend.excludes(0):
        way = "worse" if trend.value > 0 else "better"
        moves = f"{abs(trend.value):.3f} nats {way} for ten times the tokens"
    return f"{lead.name}: {listed(parts)} tokens; {moves}."


def _ceiling(outcome: Outcome) -> float | None:
    """The greatest loss a quarter of the way through the longest runs: earlier ones would press the rest together."""
    cells = outcome.under(outcome.plan.conditions[-1])
    runs = [run for cell in cells for run in cell.results if run.converged]
    return max(
        (float(np.interp(run.tokens / 4, run.curve["tokens"], run.curve["eval_loss"])) for run in runs), default=None
    )


def _picture(outcome: Outcome, found: Sequence[Lead]) -> Picture:
    lengths = outcome.plan.lengths
    words = {
        lead.name: [f"{Interval(lead.difference(at), signed=True)} at {short_length(at)}" for at in lead.cells]
        for lead in found
    }

    def draw():
        from sdd.lab.figures import Axis, Curve, CurvePanel, draw_curves, draw_dots, styles_of

        if len(lengths) == 1:  # no curve, but points
            series = {short_length(lengths[0]): [lead.by_seed(lengths[0]) for lead in found]}
            axis = Axis("loss minus the baseline's, nats a token")
            return draw_dots([lead.name for lead in found], series, axis, "did not converge", zero=True)
        styles = styles_of([(arm.name, arm.placement) for arm in outcome.plan.arms])
        panels = []
        for baseline in dict.fromkeys(lead.baseline for lead in found):
            curves = []
            for lead in found:
                if lead.baseline == baseline:
                    apart = [[lead.by_seed(at)[seed] for at in lengths] for seed in range(outcome.plan.request.seeds)]
                    curves.append(Curve(lead.method, styles[lead.method], [[float(at) for at in lead.cells]], apart))
            axes = Axis("tokens", log=True, counts=True), Axis("loss minus the baseline's, nats a token")
            panels.append(CurvePanel(f"against {baseline}", *axes, curves, levels={baseline: 0.0}))
        return draw_curves(panels)

    seeds = seeds_text(outcome.plan.request.seeds)
    what, ahead = "Held-out loss at the end minus that of the baseline", "a method is ahead"
    caption = f"{what} against tokens, mean of {seeds}, the band their range. Below the line {ahead}."
    if len(lengths) == 1:
        caption = f"{what} at {short_length(lengths[0])} tokens, mean and range of {seeds}. Left of zero {ahead}."
    return Picture("lead", caption, f"Differences in nats a token. {described(words)}", draw)


DEFINITION = Definition(
    name="length",
    title="Does the lead last?",
    question="how does the lead of SDD change with the number of tokens, when every method is tuned at each length?",
    method=(
        "Learning rate and init scale of every method are searched at each length, on a seed and held-out windows of "
        "their own, by the same steps for all.",
        "With what was found each method is trained on other seeds, the same data in the same order for all; warm-up "
        "is 5% of a run and the schedule scales with it.",
        "The lead is the difference of the losses at the end of runs of one length, and the factor says how "
        "many times fewer tokens one needs to reach the other's loss.",
    ),
    arms=tuple(Arm(name, name) for name in ("sdd", "sdd-released", "prenorm-qk", "olmo2", "peri")),
    conditions=(DEFAULT,),
    rates=Rates("searched", (1.0, 2.0, 4.0), tuning_seeds=1, inits=(1.0, 0.5, 0.25, 0.1)),
    sizes={},
    read=read,
    lengths=(300_000, 1_000_000, 3_000_000),
    optional=tuple(change.arm for change in variants.CHANGES),
)
