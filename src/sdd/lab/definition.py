"""Studies as data: arms, conditions, and how learning rates are decided.

`sdd.lab.engine` runs a definition; the definition's `read` turns the outcome into tables and sentences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdd.errors import UserError
from sdd.lab.arms import Arm, Condition, Rates, at_depth, crossed, without_rates
from sdd.lab.findings import Findings, listed
from sdd.lab.results import Measure, RunResult
from sdd.lab.search import Lattice, Search, Setting, round_rate
from sdd.models import ModelConfig, model_presets
from sdd.placement import Placement, placements
from sdd.train import RunConfig, config_io, preset
from sdd.train.schedule import fit

#: Fields that a study sets itself in every run.
OWN_FIELDS = ("seed", "model.placement", "guard.nonfinite", "guard.spikes", "sample_tokens", "keep_checkpoints")
#: The first of the seeds on which learning rates are chosen; reported seeds start at 0.
TUNING_SEED = 1000
_EVALUATIONS = 20
#: The most evaluations of a run in a study by length, whose curves are read at shorter lengths too, and the most steps
#: between two of them in short runs, where so many would cost more than the training.
_MOST_EVALUATIONS, _STEPS_BETWEEN = 40, 50
#: Of a run of a study by length.
_WARMUP_SHARE = 0.05
#: Methods whose authors draw every matrix at std 0.02 do so at widths of 2048 and more. Below this width 0.02 is less
#: than the 1/sqrt(2.5 d) of the others, down to a quarter of it at d = 64, where block 0 then hides below eps.
_WIDE = 1000


@dataclass(frozen=True)
class Definition:
    """A study.

    Attributes:
        name: of the command.
        title: of its page.
        question: in one line, ends with a question mark.
        method: three sentences; `{rates}` stands for the rates of the conditions that a page has.
        arms: the methods to compare.
        conditions: the settings under which they are compared; the first is the default.
        rates: how learning rates are decided.
        sizes: by preset, the fields that this study sets in the preset's run, by dotted name; other presets run as
            they stand.
        read: turns a finished study into findings.
        tuned_rates: how rates are decided with `--tuned`; None if the study has no such option.
        preset: the default one.
        seeds: the default number.
        lengths: the default lengths of its runs in tokens; each is a condition. Empty if the preset has the length.
        optional: arms that are compared only if they are named.
        depths: the default numbers of blocks; each is a condition. Empty if the preset has the depth.
        measure: takes what a result keeps as `measured` from the directory of a run that has ended, see
            `sdd.lab.measures`; None if the study reads losses only.
        probed: whether it reads what the runs' probes recorded.
        divisible: whether it can be read of a part of its conditions, the first among them.
        require: raises UserError if something is missing that the study needs beside the data; called before runs.
    """

    name: str
    title: str
    question: str
    method: tuple[str, str, str]
    arms: tuple[Arm, ...]
    conditions: tuple[Condition, ...]
    rates: Rates
    sizes: Mapping[str, Mapping[str, Any]]
    read: Callable[["Outcome"], Findings]
    tuned_rates: Rates | None = None
    preset: str = "nano"
    seeds: int = 3
    lengths: tuple[int, ...] = ()
    optional: tuple[Arm, ...] = ()
    depths: tuple[int, ...] = ()
    measure: Measure | None = None
    probed: bool = False
    divisible: bool = True
    require: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Request:
    """The options of a study.

    Attributes:
        out: folder of its runs, results and page.
        preset: of the model and its run.
        seeds: number of reported seeds, which start at 0.
        placements: arms to keep; empty for all.
        conditions: conditions to keep, the first among them; empty for all.
        tuned: tune the rate under every condition anew.
        overrides: fields of the run, by dotted name; `optim.lr` is the base rate.
        workers: runs at once on this machine; None for the default.
        lengths: of the runs in tokens, for studies by length; empty for the study's own.
        depths: numbers of blocks, for studies by depth; empty for the study's own.
        stack: the most runs that one process trains together; they are not probed.
    """

    out: Path
    preset: str
    seeds: int
    placements: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    tuned: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None
    lengths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    stack: int = 1


class PlannedStudy:
    """A definition with its request: names the run of an arm, a condition, a rate and a seed.

    Raises:
        UserError: for an arm or a condition that the study does not have, or a field that it sets itself.
    """

    def __init__(self, definition: Definition, request: Request) -> None:
        self.definition, self.request = definition, request
        self.arms = _chosen_arms(definition, request.placements)
        #: The study's conditions that were asked for, before they are crossed with lengths and depths.
        self.own_conditions = _chosen_conditions(definition, request.conditions)
        rates = definition.tuned_rates if request.tuned else definition.rates
        if rates is None:
            why = {
                "tuned": "it tunes every rate anyway",
                "searched": "it tunes every rate anyway",
                "sweep": "it reports every rate",
                "common": "its methods share one rate",
            }
            raise UserError(f"the study {definition.name} has no --tuned: {why[definition.rates.kind]}")
        self.rates = rates
        _check_overrides(definition, request)
        if request.stack > 1 and definition.probed:
            raise UserError(
                f"the study {definition.name} probes its runs, and runs of a stack are not probed: leave out --stack"
            )
        #: One line about the schedule, if it was fitted to a short run.
        self.fitted: str | None = None
        #: The run without arm, condition and seed; its learning rate is the base rate.
        self.base = self._base()
        self.conditions = self._conditions()
        if self.base.model.moe is None and any(arm.dense for arm in self.arms):
            mixtures = [name for name, shape in model_presets.items() if shape.moe]
            raise UserError(
                f"the study {definition.name} compares mixtures of experts, {request.preset} is none: choose one of "
                f"{', '.join(mixtures)}, or give --model.moe.n_experts and --model.moe.top_k"
            )

    @property
    def seeds(self) -> range:
        """The reported seeds."""
        return range(self.request.seeds)

    @property
    def grid_seeds(self) -> range:
        """The seeds of the runs at every rate of the grid; none if all arms share the base rate."""
        tuning = range(TUNING_SEED, TUNING_SEED + self.rates.tuning_seeds)
        return {"tuned": tuning, "searched": tuning, "sweep": self.seeds, "common": range(0)}[self.rates.kind]

    @property
    def first_rates(self) -> tuple[float, ...]:
        """The rates of the grid before it is extended."""
        return tuple(round_rate(self.base.optim.lr * factor) for factor in self.rates.factors)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the runs, ascending; empty if the study is not one by length."""
        return tuple(sorted(self.request.lengths or self.definition.lengths))

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of blocks, ascending; empty if the study is not one by depth."""
        return tuple(sorted(self.request.depths or self.definition.depths))

    @property
    def method(self) -> tuple[str, ...]:
        """The study's sentences on its method, and one on the conditions that were not asked for."""
        rates = _rates_words([each.rate_factor for each in self.own_conditions])
        method = tuple(sentence.replace("{rates}", rates) for sentence in self.definition.method)
        missing = [each.name for each in self.definition.conditions if each not in self.own_conditions]
        if not missing:
            return method
        what = "condition was" if len(missing) == 1 else "conditions were"
        part = f"This page is a part of its study, of which {len(missing)} {what} left out: {listed(missing)}."
        return (*method, part)

    @property
    def lattice(self) -> Lattice:
        """The settings that a search may come to."""
        return Lattice(self.first_rates[len(self.first_rates) // 2], self.rates.spacing, self.rates.inits)

    def run(self, arm: Arm, condition: Condition, rate: float, seed: int, init: float = 1.0) -> tuple[str, RunConfig]:
        """Name and config of a run; `rate` is before the condition's factor, `init` multiplies the initial draw."""
        rate = round_rate(rate * condition.rate_factor)
        config = replace(self.base, model=_dense(self.base.model)) if arm.dense else self.base
        own = {"model.placement": self.placement(arm), "optim.lr": rate, "seed": seed}
        for name, value in {**arm.changes, **condition.changes, **own}.items():
            try:
                config = _replaced(config, name, value)
            except ValueError as error:
                raise UserError(f"{arm.name} in this study: {error}") from None
        drawn = ""
        if self.rates.kind == "searched":
            config = _replaced(config, "model.init_scale", round_rate(init * config.model.init_scale))
            drawn = f"-init{init:g}"
        return f"{arm.name}-{condition.name}-lr{rate:g}{drawn}-seed{seed}", config

    def placement(self, arm: Arm) -> Placement:
        """The arm's placement; in a narrow model one by name has init std 1/sqrt(2.5 d) in place of 0.02."""
        if arm.variant:
            return replace(arm.variant, name=arm.name)
        found = placements[arm.placement]
        narrow = self.base.model.d_model < _WIDE
        return replace(found, init="base") if narrow and found.init == "normal-0.02" else found

    def _base(self) -> RunConfig:
        sized = {**self.definition.sizes.get(self.request.preset, {}), **self.request.overrides}
        if self.depths:
            sized["model.n_layers"] = self.depths[-1]
        if self.lengths:
            plain = config_io.with_overrides(preset(self.request.preset), sized)
            sized |= by_length(plain, self.lengths[-1])
        run, self.fitted = fit(config_io.with_overrides(preset(self.request.preset), sized), self.request.overrides)
        if "eval_every" not in sized:
            run = replace(run, eval_every=max(1, run.steps // _EVALUATIONS))
        guard = replace(run.guard, nonfinite="stop", spikes="observe")  # a study observes
        compiled = run.compile is True  # "auto" would compile on one machine what is eager on the next
        run = replace(run, guard=guard, sample_tokens=0, keep_checkpoints=1, compile=compiled)
        return replace(run, probe_every=0) if self.request.stack > 1 else run

    def _conditions(self) -> tuple[Condition, ...]:
        own: Sequence[Condition] = self.own_conditions
        if self.request.tuned:
            own = without_rates(own)
        own = crossed([at_depth(blocks) for blocks in self.depths], own)
        levels = [
            Condition(short_length(tokens), f"{short_length(tokens)} tokens", by_length(self.base, tokens))
            for tokens in self.lengths
        ]
        return crossed(levels, own)


@dataclass(frozen=True)
class Cell:
    """One arm under one condition at one rate.

    Attributes:
        rate: the learning rate, the condition's factor included.
        results: one for each seed.
        init: multiplies the std of the initial draw.
    """

    arm: Arm
    condition: Condition
    rate: float
    results: tuple[RunResult, ...]
    init: float = 1.0

    @property
    def losses(self) -> dict[int, float]:
        """Held-out loss on the reporting segment by seed; nan where the run did not converge."""
        return {result.seed: result.eval_loss if result.converged else math.nan for result in self.results}

    @property
    def failed(self) -> int:
        """The number of runs that did not converge."""
        return sum(not result.converged for result in self.results)

    @property
    def broken(self) -> bool:
        """Whether most of the runs did not converge: the arm then counts as broken under the condition."""
        return 2 * self.failed > len(self.results)

    @property
    def tuning_loss(self) -> float:
        """Mean loss on the tuning segment over the seeds; infinite if one did not converge."""
        if not self.results or self.failed:
            return math.inf
        return float(np.mean([result.tuning_loss for result in self.results]))


@dataclass(frozen=True)
class Outcome:
    """A finished study.

    Attributes:
        plan: the study as it was asked for.
        cells: the reported runs, by names of arm and condition; empty for a sweep.
        grids: where rates were tuned or swept, the cells of every rate (before the condition's factor), ascending.
        seconds_per_token: of each arm, from steps of all of them timed in turn, see `sdd.lab.grid.timing`.
        searches: where settings were searched, the path of the search and the cells of every setting on it.
    """

    plan: PlannedStudy
    cells: Mapping[tuple[str, str], Cell]
    grids: Mapping[tuple[str, str], Mapping[float, Cell]]
    seconds_per_token: Mapping[str, float] = field(default_factory=dict)
    searches: Mapping[tuple[str, str], tuple[Search, Mapping[Setting, Cell]]] = field(default_factory=dict)

    @property
    def results(self) -> list[RunResult]:
        """Every run, once."""
        cells = [*self.cells.values(), *(cell for grid in self.grids.values() for cell in grid.values())]
        cells += [cell for _, tried in self.searches.values() for cell in tried.values()]
        return list({result.name: result for cell in cells for result in cell.results}.values())

    def under(self, condition: Condition) -> list[Cell]:
        """The reported cells of all arms under a condition."""
        return [self.cells[arm.name, condition.name] for arm in self.plan.arms]


def best_rate(grid: Mapping[float, Cell]) -> float:
    """The rate with the lowest tuning loss; the lowest rate if nothing converged at any."""
    return min(sorted(grid), key=lambda rate: grid[rate].tuning_loss)


def at_edge(grid: Mapping[float, Cell]) -> bool:
    """Whether the best rate lies at an end of the grid."""
    return best_rate(grid) in (min(grid), max(grid))


def by_length(base: RunConfig, tokens: int) -> dict[str, Any]:
    """The fields of a run of so many tokens: warm-up is a fixed share of its steps, and so is all else."""
    steps = max(1, round(tokens / base.tokens_per_step))
    every = max(1, steps // _MOST_EVALUATIONS, min(_STEPS_BETWEEN, steps // 10))
    return {"steps": steps, "optim.warmup": round(_WARMUP_SHARE * steps), "eval_every": every}


def short_length(tokens: int) -> str:
    """Write a number of tokens as `0.3M`."""
    return f"{tokens / 1e6:g}M"


def _dense(model: ModelConfig) -> ModelConfig:
    """A dense model with as many active parameters, apart from the routers."""
    assert model.moe is not None
    return replace(model, moe=None, d_ff=model.moe.top_k * model.d_ff + model.moe.d_shared)


def _replaced(config: Any, name: str, value: Any) -> Any:
    """Replace the field of that dotted name."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def _chosen_arms(definition: Definition, names: tuple[str, ...]) -> tuple[Arm, ...]:
    known = {arm.name: arm for arm in (*definition.arms, *definition.optional)}
    if all(arm.name == arm.placement for arm in definition.arms):
        known |= {name: Arm(name, name) for name in placements if name not in known}
    for name in names:
        if name not in known:
            near = config_io.nearest(name, list(known))
            raise UserError(f"the study {definition.name} has no {name!r}{near}; choose from {', '.join(known)}")
    return tuple(known[name] for name in names) or definition.arms


def _rates_words(factors: Sequence[float]) -> str:
    """Rates by their factors of the base rate, as `one rate` or `the base rate and x0.5 the base rate`."""
    distinct = list(dict.fromkeys(factors))
    if distinct == [1]:
        return "one rate"
    return listed(["the base rate" if factor == 1 else f"x{factor:g} the base rate" for factor in distinct])


def _chosen_conditions(definition: Definition, names: tuple[str, ...]) -> tuple[Condition, ...]:
    known = {condition.name: condition for condition in definition.conditions}
    if names and (len(known) == 1 or not definition.divisible):
        why = "it has one setting" if len(known) == 1 else f"it is the comparison of {listed(list(known))}"
        raise UserError(f"the study {definition.name} has no --conditions: {why}")
    for name in names:
        if name not in known:
            near = config_io.nearest(name, list(known))
            raise UserError(
                f"the study {definition.name} has no condition {name!r}{near}; choose from {', '.join(known)}"
            )
    first = definition.conditions[0].name
    if names and first not in names:
        raise UserError(f"the study {definition.name} measures against its condition {first}: name it too")
    return tuple(condition for name, condition in known.items() if not names or name in names)


def _check_overrides(definition: Definition, request: Request) -> None:
    if request.preset not in model_presets:
        near = config_io.nearest(request.preset, list(model_presets))
        raise UserError(f"no preset {request.preset!r}{near}; choose one of {', '.join(model_presets)}")
    if request.lengths and not definition.lengths:
        raise UserError(f"the study {definition.name} has no --lengths: give --steps")
    if request.depths and not definition.depths:
        raise UserError(f"the study {definition.name} has no --depths: give --model.n_layers")
    for name in request.overrides:
        if name in own_fields(definition):
            instead = {"model.placement": "name methods with --placements", "steps": "leave it out"}
            instead["model.n_layers"] = "give --depths"
            if definition.lengths:
                instead["steps"] = "give --lengths"
            raise UserError(f"the study {definition.name} sets {name} itself: {instead.get(name, 'leave it out')}")


def own_fields(definition: Definition) -> tuple[str, ...]:
    """The fields that a study sets itself in every run, by dotted name."""
    own = (*OWN_FIELDS, *(("steps", "optim.warmup", "eval_every") if definition.lengths else ()))
    own += ("model.n_layers",) if definition.depths else ()
    own += ("model.init_scale",) if definition.rates.kind == "searched" else ()
    first = definition.arms[0].changes
    return own + tuple(name for name in first if all(name in arm.changes for arm in definition.arms))
