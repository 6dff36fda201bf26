"""Runs a study's definition: rounds of runs, each decided by the results of those before.

    OUT/study.json          what was asked for, so that the folder alone regenerates its page
    OUT/results/NAME.json   the result of each run, see sdd.lab.results
    OUT/runs/ ...           the runs, see sdd.lab.grid.runner
    OUT/timing.json         what a token costs each method, see sdd.lab.timing

A run that has a result file is not run again, whether or not its directory is still there. Rounds are a pure function
of results, so an interrupted study that goes on, and several machines on one folder, come to the same tables.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sdd.errors import RunFailed, UserError
from sdd.lab import results
from sdd.lab.definition import Arm, Cell, Condition, Outcome, Plan, round_rate
from sdd.lab.grid.runner import Grid
from sdd.lab.grid.timing import grid_seconds
from sdd.lab.results import HeldOut, RunResult
from sdd.lab.timing import seconds_per_token
from sdd.lab.tuning import best_rate, extension
from sdd.models import count_parameters
from sdd.train import RunConfig

Run = tuple[str, RunConfig]


class Engine:
    """Answers what a run came to, by its result file, or its run directory, or by running it.

    Args:
        plan: the study.
        console: where it says what it is about to do.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.out = plan.request.out
        self._held_out = HeldOut(plan.base)
        self._known: dict[str, RunResult] = {}
        self._pairs = [_Pair(arm, condition) for condition in plan.conditions for arm in plan.arms]

    def outcome(self) -> Outcome:
        """Run what is missing and return everything.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, with every run saved.
            RunFailed: if a run ended for another reason than divergence.
            UserError: if the folder holds other runs or results than are asked for.
        """
        self._announce()
        return replace(self._outcome(), seconds_per_token=self._clock())

    def _outcome(self) -> Outcome:
        match self.plan.rates.kind:
            case "common":
                return Outcome(self.plan, self._common(), {})
            case "tuned":
                grids = self._grids(self.plan.tuning_seeds, together=False)
                return Outcome(self.plan, self._at_best(grids), grids)
            case "sweep":
                return Outcome(self.plan, {}, self._grids(self.plan.seeds, together=True))

    def results(self, runs: Sequence[Run]) -> dict[str, RunResult]:
        """The result of each run, by name."""
        missing = [run for run in runs if not self._is_known(*run)]
        if missing:
            grid = Grid(missing, self.out, self.plan.request.workers)
            if grid.waiting:
                _ = self._held_out.source  # tokenises the corpus once, before several runs would at the same time
            grid.run()
            self._harvest(grid)
        return {name: self._known[name] for name, _ in runs}

    def _clock(self) -> dict[str, float]:
        """Seconds a token of each arm; steps are timed when the runs are over."""
        plan = self.plan
        runs = {arm.name: plan.run(arm, plan.conditions[0], plan.base.optim.lr, 0)[1] for arm in plan.arms}
        threads = Grid(list(runs.items()), self.out, plan.request.workers).threads
        return seconds_per_token(runs, threads, self.out)

    def _common(self) -> dict[tuple[str, str], Cell]:
        rates = dict.fromkeys(self._pairs, self.plan.base.optim.lr)
        return self._cells(rates, self.plan.seeds)

    def _at_best(self, grids: Mapping[tuple[str, str], Mapping[float, Cell]]) -> dict[tuple[str, str], Cell]:
        rates = {pair: best_rate(grids[pair.names]) for pair in self._pairs}
        return self._cells(rates, self.plan.seeds)

    def _grids(self, seeds: Sequence[int], *, together: bool) -> dict[tuple[str, str], dict[float, Cell]]:
        """Every rate of every arm and condition, extended until no best rate lies at an end.

        Args:
            seeds: of each rate.
            together: all arms share one grid, which is extended if any needs it.
        """
        first = self.plan.first_rates
        rates = {pair: list(first) for pair in self._pairs}
        while True:
            runs = [self._run(pair, rate, seed) for pair in rates for rate in rates[pair] for seed in seeds]
            self.results(runs)
            grids = {pair.names: {rate: self._cell(pair, rate, seeds) for rate in rates[pair]} for pair in self._pairs}
            wanted = {
                pair: extension(rates[pair], best_rate(grids[pair.names]), first, self.plan.rates.spacing)
                for pair in rates
            }
            added = {pair: {rate} for pair, rate in wanted.items() if rate is not None}
            if not added:
                return grids
            if together:
                union = set[float]().union(*added.values())
                added = dict.fromkeys(rates, union)
            for pair, more in added.items():
                rates[pair] = sorted({*rates[pair], *more})
            self._say_extension(added)

    def _cells(self, rates: Mapping["_Pair", float], seeds: Sequence[int]) -> dict[tuple[str, str], Cell]:
        # Seeds outermost: if it is interrupted, whole tables of fewer seeds are there.
        self.results([self._run(pair, rate, seed) for seed in seeds for pair, rate in rates.items()])
        return {pair.names: self._cell(pair, rate, seeds) for pair, rate in rates.items()}

    def _cell(self, pair: "_Pair", rate: float, seeds: Sequence[int]) -> Cell:
        names = [self._run(pair, rate, seed)[0] for seed in seeds]
        factor = pair.condition.rate_factor
        return Cell(pair.arm, pair.condition, round_rate(rate * factor), tuple(self._known[name] for name in names))

    def _run(self, pair: "_Pair", rate: float, seed: int) -> Run:
        return self.plan.run(pair.arm, pair.condition, rate, seed)

    def _is_known(self, name: str, config: RunConfig) -> bool:
        if name in self._known:
            return True
        file = self.out / "results" / f"{name}.json"
        if not file.exists():
            return False
        found = results.load(file)
        if not results.answers(found, config):
            raise UserError(f"{file} is the result of a run with other settings: choose another --out, or delete it")
        self._take(found)
        return True

    def _take(self, found: RunResult) -> None:
        other = next((known for known in self._known.values() if known.data != found.data), None)
        if other is not None:
            raise UserError(
                f"the runs {other.name} and {found.name} in {self.out} saw different data: bring back those of the "
                "results that are there, or choose another --out"
            )
        self._known[found.name] = found

    def _harvest(self, grid: Grid) -> None:
        """Write the result files of a grid; other ends than results are told once everything else is safe."""
        crashed = [job for job in grid.jobs if job.state == "crashed"]
        ended = [job for job in grid.jobs if job.state in ("done", "failed")]
        if ended:
            self._say(f"Measuring {len(ended)} finished runs on the held-out text that rates are chosen on.")
        for job in ended:
            found = results.harvest(grid.path(job.name), self._held_out)
            self._take(found)
            results.save(found, self.out / "results")
        if crashed:
            raise RunFailed(
                f"{len(crashed)} of {len(grid.jobs)} runs ended without a result, {crashed[0].name}: "
                f"{crashed[0].detail}; see {self.out / 'logs'}; the same command tries again"
            )

    def _announce(self) -> None:
        """What will be run, and about how long that takes."""
        plan = self.plan
        rounds = self._first_rounds()
        missing = [run for runs in rounds.values() for run in runs if not self._has_result(*run)]
        self._say(f"{plan.definition.name}: {plan.definition.question}")
        self._say(_shape(plan))
        for what, runs in rounds.items():
            self._say(f"  {what}: {len(runs)} runs, {sum(map(_tokens, runs)):,} tokens")
        if not missing:
            self._say("All of these runs have a result already.")
            return
        grid = Grid(missing, self.out, plan.request.workers)
        waiting = [job.config for job in grid.waiting]
        minutes = math.ceil(grid_seconds(waiting, grid.threads, grid.workers) / 60)
        self._say(
            f"{len(waiting)} of them still to do, {grid.workers} at once with {grid.threads} CPU "
            f"thread{'s' if grid.threads > 1 else ''} each: about {minutes} minute{'s' if minutes != 1 else ''}, from "
            f"steps timed just now{_open_end(plan)}. Ctrl-C saves; the same command goes on."
        )

    def _first_rounds(self) -> dict[str, list[Run]]:
        """The runs that are known beforehand; which rates the last round takes is not, how many runs it has is."""
        plan, pairs = self.plan, self._pairs
        middle = plan.first_rates[len(plan.first_rates) // 2]
        swept = {"tuned": plan.tuning_seeds, "sweep": plan.seeds, "common": ()}[plan.rates.kind]
        grid = [self._run(pair, rate, seed) for pair in pairs for rate in plan.first_rates for seed in swept]
        last = [self._run(pair, middle, seed) for pair in pairs for seed in plan.seeds]
        match plan.rates.kind:
            case "common":
                return {"arm x condition x seed": last}
            case "tuned":
                return {"arm x condition x learning rate, tuning seeds": grid, "at the best rates, fresh seeds": last}
            case "sweep":
                return {"arm x learning rate x seed": grid}

    def _has_result(self, name: str, config: RunConfig) -> bool:
        if self.plan.rates.kind == "tuned" and config.seed in self.plan.seeds:  # its rate is not known yet
            rateless, _, _ = name.rpartition("-lr")
            return any((self.out / "results").glob(f"{rateless}-lr*-seed{config.seed}.json"))
        return self._is_known(name, config)

    def _say_extension(self, added: Mapping["_Pair", set[float]]) -> None:
        rates = sorted(set[float]().union(*added.values()))
        arms = ", ".join(dict.fromkeys(pair.arm.name for pair in added))
        self._say(
            f"A best rate lies at the end of its grid: {', '.join(f'{rate:g}' for rate in rates)} added ({arms})."
        )

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)


@dataclass(frozen=True, eq=False)
class _Pair:
    """An arm under a condition."""

    arm: Arm
    condition: Condition

    @property
    def names(self) -> tuple[str, str]:
        return self.arm.name, self.condition.name


def read_request(out: Path) -> dict[str, Any]:
    """What OUT/study.json says was asked for; empty if there is none.

    Raises:
        UserError: if it is damaged.
    """
    file = out / "study.json"
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return dict(values)
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete it and give the study's options again") from None


def write_request(plan: Plan) -> None:
    """Keep what was asked for in OUT/study.json."""
    request = plan.request
    values = {
        "study": plan.definition.name,
        "preset": request.preset,
        "seeds": request.seeds,
        "placements": list(request.placements),
        "tuned": request.tuned,
        "overrides": dict(request.overrides),
    }
    request.out.mkdir(parents=True, exist_ok=True)
    aside = request.out / f".study.json.{uuid.uuid4().hex}"  # other machines write theirs
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    aside.replace(request.out / "study.json")


def _shape(plan: Plan) -> str:
    base = plan.base
    model = base.model
    parameters = count_parameters(model).total
    return (
        f"{plan.request.preset}: {model.n_layers} layers, d_model {model.d_model}, {parameters / 1e6:.2f}M parameters; "
        f"{base.steps:,} steps of {base.data.batch_size} x {model.context} tokens, base rate {base.optim.lr:g}, "
        f"{base.optim.warmup} warm-up steps.\n"
        f"Arms: {', '.join(arm.name for arm in plan.arms)}.\n"
        f"Conditions: {'; '.join(condition.title for condition in plan.conditions)}.\n"
        f"Rates: {', '.join(f'{rate:g}' for rate in plan.first_rates)}. "
        f"Seeds: {', '.join(map(str, plan.seeds))}"
        + (f"; tuned on {', '.join(map(str, plan.tuning_seeds))}." if plan.rates.kind == "tuned" else ".")
    )


def _tokens(run: Run) -> int:
    return run[1].steps * run[1].tokens_per_step


def _open_end(plan: Plan) -> str:
    return "" if plan.rates.kind == "common" else "; more if a best rate lies at the end of its grid"
