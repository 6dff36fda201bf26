"""What a study is, as data: arms, conditions, how learning rates are decided, and what was published.

`sdd.lab.engine` runs a definition, and its `read` says what came out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdd.errors import UserError
from sdd.lab.results import RunResult
from sdd.models import ModelConfig, model_presets
from sdd.placement import Placement, placements
from sdd.train import RunConfig, config_io, preset

if TYPE_CHECKING:
    from sdd.lab.findings import Findings

#: What a study sets itself in every run.
OWN_FIELDS = ("seed", "model.placement", "guard.nonfinite", "guard.spikes", "sample_tokens", "keep_checkpoints")
#: Seeds that learning rates are chosen on start here, those that are reported at 0.
TUNING_SEED = 1000
_EVALUATIONS = 20
#: Methods whose authors draw every matrix at std 0.02 do so at widths of 2048 and more. Below this width 0.02 is less
#: than the 1/sqrt(2.5 d) of the others, down to a quarter of it at d = 64, where block 0 then hides below eps.
_WIDE = 1000


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Attributes:
        name: in tables, figures and run names.
        placement: the placement's name.
        changes: what is its own in the recipe, by dotted name.
        dense: the feed-forward networks of a preset with experts are made one, as wide as what a token uses of them.
    """

    name: str
    placement: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dense: bool = False


@dataclass(frozen=True)
class Condition:
    """How training is made harder, or not.

    Attributes:
        name: in run names.
        title: in tables.
        changes: fields that it sets, by dotted name.
        rate_factor: multiplies the learning rate.
    """

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0


DEFAULT = Condition("default", "default")


@dataclass(frozen=True)
class Rates:
    """How learning rates are decided.

    Attributes:
        kind: "common" gives all arms the base rate; "tuned" takes for each arm and condition the rate that is best on
            seeds and held-out windows of their own; "sweep" reports every rate.
        factors: of the base rate, evenly spaced in their logarithm, ascending; where a best one lies at an end, the
            grid is extended by its own spacing.
        tuning_seeds: how many.
    """

    kind: Literal["common", "tuned", "sweep"]
    factors: tuple[float, ...] = (1.0,)
    tuning_seeds: int = 2

    @property
    def spacing(self) -> float:
        """The ratio of neighbouring rates."""
        return (self.factors[-1] / self.factors[0]) ** (1 / (len(self.factors) - 1))


@dataclass(frozen=True)
class Definition:
    """A study.

    Attributes:
        name: of the command.
        title: of its page.
        question: in one line, ends with a question mark.
        method: three sentences.
        arms: what is compared.
        conditions: under what; the first is the default.
        rates: how learning rates are decided.
        sizes: what a preset's run is set to for this study, by dotted name; a preset that is not here runs as it
            stands.
        read: what a finished study says.
        tuned_rates: how rates are decided with `--tuned`; None if there is no such option.
        preset: where none is named.
        seeds: where their number is not given.
    """

    name: str
    title: str
    question: str
    method: tuple[str, str, str]
    arms: tuple[Arm, ...]
    conditions: tuple[Condition, ...]
    rates: Rates
    sizes: Mapping[str, Mapping[str, Any]]
    read: Callable[["Outcome"], "Findings"]
    tuned_rates: Rates | None = None
    preset: str = "nano"
    seeds: int = 3


@dataclass(frozen=True)
class Request:
    """A study as it is asked for.

    Attributes:
        out: folder of its runs, results and page.
        preset: of the model and its run.
        seeds: reported ones, from 0.
        placements: arms to keep; empty for all.
        tuned: tune the rate under every condition anew.
        overrides: fields of the run, by dotted name; `optim.lr` is the base rate.
        workers: runs at once on this machine; None for the default.
    """

    out: Path
    preset: str
    seeds: int
    placements: tuple[str, ...] = ()
    tuned: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None


class Plan:
    """A definition and a request together: which run stands for an arm, a condition, a rate and a seed.

    Raises:
        UserError: for an arm that the study does not have, or a field that it sets itself.
    """

    def __init__(self, definition: Definition, request: Request) -> None:
        self.definition, self.request = definition, request
        self.arms = _chosen_arms(definition, request.placements)
        tuned = definition.tuned_rates if request.tuned else definition.rates
        if tuned is None:
            raise UserError(f"the study {definition.name} has no --tuned: {_how_rates(definition.rates)}")
        self.rates = tuned
        self.conditions = _without_rates(definition.conditions) if request.tuned else definition.conditions
        _check_overrides(definition, request)
        #: The run without arm, condition and seed; its learning rate is the base rate.
        self.base = self._base()
        if self.base.model.moe is None and any(arm.dense for arm in self.arms):
            mixtures = [name for name, shape in model_presets.items() if shape.moe]
            raise UserError(
                f"the study {definition.name} compares mixtures of experts, {request.preset} is none: choose one of "
                f"{', '.join(mixtures)}, or give --model.moe.n_experts and --model.moe.top_k"
            )

    @property
    def seeds(self) -> range:
        """The reported ones."""
        return range(self.request.seeds)

    @property
    def tuning_seeds(self) -> range:
        """Those that rates are chosen on."""
        return range(TUNING_SEED, TUNING_SEED + self.rates.tuning_seeds)

    @property
    def first_rates(self) -> tuple[float, ...]:
        """The rates of the grid before it is extended."""
        return tuple(round_rate(self.base.optim.lr * factor) for factor in self.rates.factors)

    def run(self, arm: Arm, condition: Condition, rate: float, seed: int) -> tuple[str, RunConfig]:
        """Name and config of a run; `rate` is before the condition's factor."""
        rate = round_rate(rate * condition.rate_factor)
        config = replace(self.base, model=_dense(self.base.model)) if arm.dense else self.base
        own = {"model.placement": self.placement(arm), "optim.lr": rate, "seed": seed}
        for name, value in {**arm.changes, **condition.changes, **own}.items():
            config = _replaced(config, name, value)
        return f"{arm.name}-{condition.name}-lr{rate:g}-seed{seed}", config

    def placement(self, arm: Arm) -> Placement:
        """The arm's placement; of a narrow model, with std 1/sqrt(2.5 d) in place of 0.02."""
        found = placements[arm.placement]
        narrow = self.base.model.d_model < _WIDE
        return replace(found, init="base") if narrow and found.init == "normal-0.02" else found

    def _base(self) -> RunConfig:
        run = preset(self.request.preset)
        sized = {**self.definition.sizes.get(self.request.preset, {}), **self.request.overrides}
        run = config_io.with_overrides(run, sized)
        if "eval_every" not in sized:
            run = replace(run, eval_every=max(1, run.steps // _EVALUATIONS))
        guard = replace(run.guard, nonfinite="stop", spikes="observe")  # a study observes
        return replace(run, guard=guard, sample_tokens=0, keep_checkpoints=1)


@dataclass(frozen=True)
class Cell:
    """One arm under one condition at one rate.

    Attributes:
        rate: the learning rate, the condition's factor included.
        results: one a seed.
    """

    arm: Arm
    condition: Condition
    rate: float
    results: tuple[RunResult, ...]

    @property
    def losses(self) -> dict[int, float]:
        """Held-out loss on the reporting segment by seed; nan where the run did not converge."""
        return {result.seed: result.eval_loss if result.converged else math.nan for result in self.results}

    @property
    def failed(self) -> int:
        """How many runs did not converge."""
        return sum(not result.converged for result in self.results)


@dataclass(frozen=True)
class Outcome:
    """A finished study.

    Attributes:
        plan: what was asked for.
        cells: what is reported, by names of arm and condition; empty for a sweep.
        grids: where rates were tuned or swept, the cells of every rate (before the condition's factor), ascending.
        seconds_per_token: of each arm, from steps of all of them timed in turn, see `sdd.lab.timing`.
    """

    plan: Plan
    cells: Mapping[tuple[str, str], Cell]
    grids: Mapping[tuple[str, str], Mapping[float, Cell]]
    seconds_per_token: Mapping[str, float] = field(default_factory=dict)

    @property
    def results(self) -> list[RunResult]:
        """Every run, once."""
        cells = [*self.cells.values(), *(cell for grid in self.grids.values() for cell in grid.values())]
        return list({result.name: result for cell in cells for result in cell.results}.values())


def _dense(model: ModelConfig) -> ModelConfig:
    """A dense model with as many active parameters, but for routers."""
    assert model.moe is not None
    return replace(model, moe=None, d_ff=model.moe.top_k * model.d_ff + model.moe.d_shared)


def _replaced(config: Any, name: str, value: Any) -> Any:
    """The config with the field of that dotted name replaced."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def round_rate(rate: float) -> float:
    """A rate to three digits, so that it is written as it is computed."""
    return float(f"{rate:.3g}")


def _chosen_arms(definition: Definition, names: tuple[str, ...]) -> tuple[Arm, ...]:
    known = {arm.name: arm for arm in definition.arms}
    if definition.arms and all(arm.name == arm.placement for arm in definition.arms):
        known |= {name: Arm(name, name) for name in placements if name not in known}
    for name in names:
        if name not in known:
            near = config_io.nearest(name, list(known))
            raise UserError(f"the study {definition.name} has no {name!r}{near}; choose from {', '.join(known)}")
    return tuple(known[name] for name in names) or definition.arms


def _check_overrides(definition: Definition, request: Request) -> None:
    if request.preset not in model_presets:
        near = config_io.nearest(request.preset, list(model_presets))
        raise UserError(f"no preset {request.preset!r}{near}; choose one of {', '.join(model_presets)}")
    for name in request.overrides:
        if name in OWN_FIELDS:
            instead = "name methods with --placements" if name == "model.placement" else "leave it out"
            raise UserError(f"{name} is what the study {definition.name} sets itself: {instead}")


def _without_rates(conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """The same conditions where rates are tuned under each: a factor of the rate says nothing any more."""
    plain: list[Condition] = []
    for condition in conditions:
        if condition.rate_factor != 1:
            title = ", ".join(part for part in condition.title.split(", ") if not part.startswith("lr "))
            condition = replace(condition, name=f"{condition.name}-tuned", title=title, rate_factor=1.0)
        if all(condition.changes != other.changes for other in plain):
            plain.append(condition)
    return tuple(plain)


def _how_rates(rates: Rates) -> str:
    return {"tuned": "it tunes every rate anyway", "sweep": "it reports every rate", "common": ""}[rates.kind]
