"""The study `ladder`: from other methods to SDD, one change at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdd.lab.arms import DEFAULT, Arm, Condition, Rates
from sdd.lab.definition import Cell, Definition, Outcome, short_length
from sdd.lab.findings import Findings, Interval, Measured, Picture, Table, described, listed, seeds_text
from sdd.lab.statistics import Estimate, mean_interval
from sdd.lab.studies import shared
from sdd.placement import Norm, Site, placements

#: Where the curves are read besides their ends.
EARLY_TOKENS = 300_000

Losses = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Rung:
    """One change of a ladder.

    Attributes:
        below: the arm before the change.
        arm: the arm after it.
        change: in words.
    """

    below: str
    arm: Arm
    change: str


def _variant(name: str, base: str, norms: Mapping[Site, Norm | None] | None = None) -> Arm:
    """An arm with the norms of a placement, some of them replaced, added or (None) left out, drawn at 1/sqrt(2.5 d)."""
    mixed: dict[Site, Norm | None] = {**placements[base].norms, **(norms or {})}
    kept: dict[Site, Norm] = {site: norm for site, norm in mixed.items() if norm}
    return Arm(name, base, variant=replace(placements[base], norms=kept, init="base", source="a step of this ladder"))


_ONE, _OUT = Norm(), Norm(alpha_init="1/sqrt(2L)")
_EMBED: dict[Site, Norm] = {"embed": _ONE}
_QK: dict[Site, Norm] = {"q": placements["sdd-v1"].norms["q"], "k": placements["sdd-v1"].norms["k"]}
_OUTPUTS: dict[Site, Norm] = {"attn_out": _OUT, "ffn_out": _OUT}
_SDD = Arm("sdd-v1", "sdd-v1")

#: From Pre-Norm with norms on q and k over Peri-LN to SDD as it was when the ladder was built.
TO_SDD = (
    Rung("prenorm-qk", _variant("qk+init", "prenorm-qk"), "init 1/sqrt(2.5 d) at the outputs too"),
    Rung("qk+init", _variant("qk+embed", "prenorm-qk", _EMBED), "norm on the embedding"),
    Rung("qk+embed", _variant("peri+qk", "peri", _QK), "norms on both outputs: Peri-LN with norms on q, k"),
    Rung(
        "peri+qk",
        _variant("peri+qk+alpha", "peri", {**_QK, **_OUTPUTS}),
        "output alphas from 1/sqrt(2L) instead of 1",
    ),
    Rung("peri+qk+alpha", _SDD, "norms after the additions instead of before the sublayers: sdd-v1"),
)
#: From OLMo 2 to SDD.
FROM_OLMO = (
    Rung("olmo2", _variant("olmo2+embed", "olmo2", _EMBED), "norm on the embedding"),
    Rung("olmo2+embed", _variant("olmo2+heads", "olmo2", {**_EMBED, **_QK}), "q, k norms over heads, not full width"),
    Rung(
        "olmo2+heads",
        _variant("olmo2+alpha", "olmo2", {**_EMBED, **_QK, **_OUTPUTS}),
        "output alphas from 1/sqrt(2L) instead of 1",
    ),
    Rung("olmo2+alpha", _SDD, "norms after the additions, none before the head: sdd-v1"),
)
#: Single changes beside the ways.
ASIDE = (
    Rung("sdd-v1", _variant("sdd-v1+final", "sdd-v1", {"final": _ONE}), "a norm before the head as well"),
    Rung("sdd-v1", _variant("sdd-v1-qk", "sdd-v1", {"q": None, "k": None}), "no norms on q and k"),
    Rung("sdd-v1", Arm("sdd-v1-decay", "sdd-v1", {"optim.alpha_weight_decay": 0.1}), "decay on alpha, as on matrices"),
    Rung("sdd-v1", Arm("sdd-v1-init0.25", "sdd-v1", {"model.init_scale": 0.25}), "init x0.25"),
    Rung("peri+qk", Arm("peri", "peri"), "no norms on q and k: Peri-LN"),
    Rung("peri", Arm("peri-init0.25", "peri", {"model.init_scale": 0.25}), "init x0.25"),
    Rung("prenorm-qk", Arm("qk-init0.25", "prenorm-qk", {"model.init_scale": 0.25}), "init x0.25"),
)
RUNGS = (*TO_SDD, *FROM_OLMO, *ASIDE)


@dataclass(frozen=True)
class Step:
    """What a rung changed.

    Attributes:
        rung: of the ladder.
        early: change of the held-out loss at `EARLY_TOKENS`, over seeds and rates.
        late: the same at the end.
    """

    rung: Rung
    early: Estimate
    late: Estimate


def read(outcome: Outcome) -> Findings:
    """The change of the loss with every rung, early and at the end."""
    steps = measured(outcome)
    return Findings(
        answer=_answer(outcome, steps),
        conclusions=_conclusions(outcome, steps),
        limits=[
            _rate_limit(outcome),
            "A change is measured where it stands in this order; in another order it may do more or less.",
            "Early losses are read off runs whose schedule is that of the whole length.",
            *shared.general_limits(outcome),
        ],
        published=None,
        tables=[_step_table(outcome, steps), _loss_table(outcome), shared.cost_table(_first(outcome), outcome)],
        pictures=[_picture(outcome, steps)],
    )


def _rate_limit(outcome: Outcome) -> str:
    if len(outcome.plan.conditions) == 1:
        return "One rate for all, tuned for none: a method that would want another is judged at this one."
    return (
        "The rates are the same for all, not tuned for each: a method that would want another is judged at these, "
        "which count alike."
    )


def measured(outcome: Outcome) -> list[Step]:
    """Every rung of which both arms are there."""
    arms = {arm.name for arm in outcome.plan.arms}
    early, late = _losses(outcome, EARLY_TOKENS), _losses(outcome, None)
    return [
        Step(rung, _change(early, rung), _change(late, rung)) for rung in RUNGS if {rung.below, rung.arm.name} <= arms
    ]


def _losses(outcome: Outcome, tokens: int | None) -> dict[str, dict[tuple[str, int], float]]:
    """Held-out losses of each arm by condition and seed, at a number of tokens or at the end; nan if not converged."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for (arm, condition), cell in outcome.cells.items():
        for run in cell.results:
            found.setdefault(arm, {})[condition, run.seed] = shared.loss_at(run, tokens)
    return found


def _change(losses: Mapping[str, Losses], rung: Rung) -> Estimate:
    """Loss after the rung minus before it: mean over the rates for each seed, then over seeds."""
    above, below = losses[rung.arm.name], losses[rung.below]
    seeds = sorted({seed for _, seed in above})
    conditions = sorted({condition for condition, _ in above})
    means = [float(np.mean([above[name, seed] - below[name, seed] for name in conditions])) for seed in seeds]
    return mean_interval([mean for mean in means if math.isfinite(mean)])


def _first(outcome: Outcome) -> list[Cell]:
    return outcome.under(outcome.plan.conditions[0])


def _step_table(outcome: Outcome, steps: Sequence[Step]) -> Table:
    end = short_length(outcome.plan.lengths[-1])
    several = len(outcome.plan.conditions) > 1
    how = "Each is the mean over the rates, paired by seed and rate" if several else "Paired by seed"
    rows = [
        [
            f"{step.rung.below} to {step.rung.arm.name}",
            step.rung.change,
            Interval(step.early, signed=True),
            Interval(step.late, signed=True),
        ]
        for step in steps
    ]
    return Table(
        "steps",
        f"Change of the held-out loss with each step, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        ["step", "what changes", f"at {short_length(EARLY_TOKENS)} tokens", f"at {end} tokens"],
        rows,
        f"Negative: the step lowers the loss. {how}; ± is half of Student's 95% interval over seeds.",
    )


def _loss_table(outcome: Outcome) -> Table:
    conditions = outcome.plan.conditions
    rates = {condition.name: f"{cell.rate:g}" for condition in conditions for cell in outcome.under(condition)[:1]}
    early = _losses(outcome, EARLY_TOKENS)
    rows = []
    for arm in outcome.plan.arms:
        by_condition = [
            {seed: loss for (name, seed), loss in early[arm.name].items() if name == condition.name}
            for condition in conditions
        ]
        ends = [outcome.cells[arm.name, condition.name].losses for condition in conditions]
        rows.append([arm.name, *(Measured(losses) for losses in (*by_condition, *ends))])
    end = short_length(outcome.plan.lengths[-1])
    columns = [f"at {length}, rate {rates[c.name]}" for length in (short_length(EARLY_TOKENS), end) for c in conditions]
    return Table(
        "loss",
        f"Held-out loss, nats a token, {seeds_text(outcome.plan.request.seeds)}",
        ["method", *columns],
        rows,
        shared.not_converged_text(),
    )


def _answer(outcome: Outcome, steps: Sequence[Step]) -> str:
    """The step on the way from the first arm to SDD that lowers the loss most, early and late."""
    way = [step for step in steps if step.rung in TO_SDD and math.isfinite(step.late.value)]
    if not way:
        return "Nothing to compare: that needs two arms that are one step apart."
    early = min(way, key=lambda step: step.early.value)
    late = min(way, key=lambda step: step.late.value)
    end = short_length(outcome.plan.lengths[-1])
    return (
        f"From prenorm-qk to sdd-v1 the step that lowers the loss most at {short_length(EARLY_TOKENS)} tokens is: "
        f"{early.rung.change} ({Interval(early.early, signed=True)} nats); at {end} tokens: {late.rung.change} "
        f"({Interval(late.late, signed=True)} nats)."
    )


def _conclusions(outcome: Outcome, steps: Sequence[Step]) -> list[str]:
    end = short_length(outcome.plan.lengths[-1])
    lower = [step.rung for step in steps if step.late.excludes(0) and step.late.value < 0]
    higher = [step.rung for step in steps if step.late.excludes(0) and step.late.value > 0]
    texts = []
    for what, rungs in (("lower", lower), ("raise", higher)):
        if rungs:
            names = listed([f"{rung.below} to {rung.arm.name}" for rung in rungs])
            texts.append(f"At {end} tokens these steps {what} the loss by more than seeds explain: {names}.")
    if steps and not texts:
        texts.append(f"At {end} tokens no step is told apart from zero.")
    return texts


def _picture(outcome: Outcome, steps: Sequence[Step]) -> Picture:
    end = short_length(outcome.plan.lengths[-1])
    early, late = _losses(outcome, EARLY_TOKENS), _losses(outcome, None)
    words = {
        f"{step.rung.below} to {step.rung.arm.name}": [
            f"{Interval(step.early, signed=True)} early",
            f"{Interval(step.late, signed=True)} at the end",
        ]
        for step in steps
    }

    def draw():
        from sdd.lab.figures import Axis, draw_dots

        rows = [f"{step.rung.below} to {step.rung.arm.name}" for step in steps]
        series = {
            f"at {short_length(EARLY_TOKENS)} tokens": [_by_seed(early, step.rung) for step in steps],
            f"at {end} tokens": [_by_seed(late, step.rung) for step in steps],
        }
        return draw_dots(rows, series, Axis("change of the held-out loss, nats a token"), "did not converge")

    over = "rates and " if len(outcome.plan.conditions) > 1 else ""
    caption = (
        f"Change of the held-out loss with each step, mean over {over}{seeds_text(outcome.plan.request.seeds)}; "
        "lines are the range of the seeds. Left of zero a step helps."
    )
    return Picture("steps", caption, f"Changes in nats a token. {described(words)}", draw)


def _by_seed(losses: Mapping[str, Losses], rung: Rung) -> dict[int, float]:
    above, below = losses[rung.arm.name], losses[rung.below]
    seeds = sorted({seed for _, seed in above})
    return {
        seed: float(np.mean([above[name, each] - below[name, each] for name, each in above if each == seed]))
        for seed in seeds
    }


DEFINITION = Definition(
    name="ladder",
    title="Which change carries the lead?",
    question="which of the changes that lead from Pre-Norm and from OLMo 2 to SDD lowers the loss, early and late?",
    method=(
        "The methods stand one change apart, from Pre-Norm with norms on q and k over Peri-LN to SDD, and from OLMo 2 "
        "to SDD; a few more vary SDD by one thing.",
        "All are trained at {rates}, with the same data in the same order.",
        "A step is the difference of the held-out losses of two neighbours, read at 0.3M tokens and at the end.",
    ),
    arms=tuple(
        {
            arm.name: arm
            for arm in (Arm("prenorm-qk", "prenorm-qk"), Arm("olmo2", "olmo2"), *(rung.arm for rung in RUNGS))
        }.values()
    ),
    conditions=(DEFAULT, Condition("half", "half the rate", rate_factor=0.5)),
    rates=Rates("common"),
    sizes={},
    read=read,
    seeds=2,
    lengths=(3_000_000,),
)
