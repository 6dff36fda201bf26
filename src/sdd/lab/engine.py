"""Runs a study's definition in rounds; the results of one round decide the runs of the next.

    OUT/study.json          the study's options, so that the folder alone regenerates its page
    OUT/results/NAME.json   the result of each run, see sdd.lab.results
    OUT/runs/ ...           the runs, see sdd.lab.grid.runner
    OUT/timing.json         the cost of a token for each method, see sdd.lab.grid.timing

A run that has a result file is not run again, whether or not its directory is still there. Rounds are a pure function
of results, so an interrupted study that goes on, and several machines on one folder, come to the same tables.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sdd.errors import RunFailed, UserError
from sdd.files import write_aside
from sdd.lab import results
from sdd.lab.arms import Condition
from sdd.lab.definition import Cell, Outcome, PlannedStudy, best_rate
from sdd.lab.grid.job import FINISHED
from sdd.lab.grid.runner import Grid
from sdd.lab.grid.timing import grid_seconds, seconds_per_token
from sdd.lab.results import HeldOut, RunResult
from sdd.lab.search import Search, Setting, round_rate, search
from sdd.models import count_parameters
from sdd.train import RunConfig

#: A grid is extended beyond each of its first ends by at most so many rates.
MOST_EXTENSIONS = 4

#: Why there may be more runs than were announced.
_MORE = {
    **dict.fromkeys(("tuned", "sweep"), "; more if a best rate lies at the end of its grid"),
    "searched": "; more as long as a search moves on",
}

NamedRun = tuple[str, RunConfig]
#: The names of an arm and of a condition.
Names = tuple[str, str]


class Engine:
    """Finds the result of each run in its result file, or in its run directory, or by running it.

    Args:
        plan: the study.
        console: where it announces its work.
    """

    def __init__(self, plan: PlannedStudy, console: Console) -> None:
        self.plan, self.console = plan, console
        self.out = plan.request.out
        self._held_out = HeldOut(plan.base)
        self._known: dict[str, RunResult] = {}
        self._pairs = {
            (arm.name, condition.name): (arm, condition) for condition in plan.conditions for arm in plan.arms
        }

    def outcome(self) -> Outcome:
        """Run the missing runs and return everything.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, with every run saved.
            RunFailed: if a run ended for another reason than divergence.
            UserError: if the folder holds other runs or results than those asked for.
        """
        self._announce()
        plan = self.plan
        if plan.rates.kind == "searched":
            return self._searched()
        grids = {} if plan.rates.kind == "common" else self._grids()
        cells = {}
        if plan.rates.kind != "sweep":
            rates = {names: best_rate(grids[names]) if names in grids else plan.base.optim.lr for names in self._pairs}
            # Seeds outermost: a study that is interrupted has whole tables of fewer seeds.
            self._ensure(
                [self._run(names, Setting(rate), seed) for seed in plan.seeds for names, rate in rates.items()]
            )
            cells = {names: self._cell(names, Setting(rate), plan.seeds) for names, rate in rates.items()}
        return Outcome(plan, cells, grids, self._clock())

    def _ensure(self, runs: Sequence[NamedRun]) -> None:
        """Run those of the runs that have no result yet."""
        missing = [run for run in runs if not self._is_known(*run)]
        if missing:
            grid = Grid(missing, self.out, self.plan.request.workers, self.plan.request.stack)
            self._harvest(grid)  # what had ended before an interruption: its results need not wait for the rest
            if grid.waiting:
                _ = self._held_out.source  # tokenises the corpus once, before several runs would at the same time
                grid.run()
                self._harvest(grid)

    def _searched(self) -> Outcome:
        """Search and report one condition after the other, all arms of it together.

        Reported seeds of a condition come before the next condition's search: a study by length that is interrupted is
        whole up to some length.
        """
        plan = self.plan
        starts = self._starts()
        cells: dict[Names, Cell] = {}
        searches: dict[Names, tuple[Search, dict[Setting, Cell]]] = {}
        for condition in plan.conditions:
            found = self._search(condition, starts)
            starts = {arm: one.best for arm, one in found.items()}
            best = {(arm, condition.name): setting for arm, setting in starts.items()}
            self._ensure([self._run(names, setting, seed) for seed in plan.seeds for names, setting in best.items()])
            cells |= {names: self._cell(names, setting, plan.seeds) for names, setting in best.items()}
            for arm, one in found.items():
                names = arm, condition.name
                tried = {setting: self._cell(names, setting, plan.grid_seeds) for setting in one.visited}
                searches[names] = one, tried
        return Outcome(plan, cells, {}, self._clock(), searches)

    def _starts(self) -> dict[str, Setting]:
        plan = self.plan
        return dict.fromkeys((arm.name for arm in plan.arms), Setting(plan.lattice.rate, plan.rates.inits[0]))

    def _searches(self, condition: Condition, starts: Mapping[str, Setting]) -> dict[str, Search]:
        """Where the search of every arm under a condition stands, by arm."""
        return {
            arm: search(partial(self._tuning_loss, (arm, condition.name)), start, self.plan.lattice)
            for arm, start in starts.items()
        }

    def _search(self, condition: Condition, starts: Mapping[str, Setting]) -> dict[str, Search]:
        """The ended search of every arm under a condition, by arm."""
        while True:
            found = self._searches(condition, starts)
            missing = [(arm, setting) for arm, one in found.items() for setting in one.missing]
            if not missing:
                return found
            text = "; ".join(f"{arm} at {setting.rate:g}, init x{setting.init:g}" for arm, setting in missing)
            self._say(f"{condition.title}, to compare: {text}.")
            self._ensure(
                [
                    self._run((arm, condition.name), setting, seed)
                    for arm, setting in missing
                    for seed in self.plan.grid_seeds
                ]
            )

    def _tuning_loss(self, names: Names, setting: Setting) -> float | None:
        seeds = self.plan.grid_seeds
        runs = [self._run(names, setting, seed) for seed in seeds]
        if sum(self._is_known(*run) for run in runs) < len(runs):  # looks at every one, to have read them all
            return None
        return self._cell(names, setting, seeds).tuning_loss

    def _clock(self) -> dict[str, float]:
        """Seconds a token of each arm; steps are timed when the runs are over."""
        plan = self.plan
        runs = {arm.name: plan.run(arm, plan.conditions[0], plan.base.optim.lr, 0)[1] for arm in plan.arms}
        threads = Grid(list(runs.items()), self.out, plan.request.workers).threads
        return seconds_per_token(runs, threads, self.out)

    def _grids(self) -> dict[Names, dict[float, Cell]]:
        """Every rate of every arm and condition, extended until no best rate lies at an end.

        A sweep has one grid for all arms, which is extended if any of them needs it.
        """
        first, seeds = self.plan.first_rates, self.plan.grid_seeds
        rates = {names: list(first) for names in self._pairs}
        while True:
            self._ensure(
                [self._run(names, Setting(rate), seed) for names in rates for rate in rates[names] for seed in seeds]
            )
            grids = {names: {rate: self._cell(names, Setting(rate), seeds) for rate in rates[names]} for names in rates}
            wanted = {
                names: extension(rates[names], best_rate(grids[names]), first, self.plan.rates.spacing)
                for names in rates
            }
            added = {names: {rate} for names, rate in wanted.items() if rate is not None}
            if not added:
                return grids
            if self.plan.rates.kind == "sweep":
                added = dict.fromkeys(rates, set[float]().union(*added.values()))
            for names, new in added.items():
                rates[names] = sorted({*rates[names], *new})
            more = ", ".join(f"{rate:g}" for rate in sorted(set[float]().union(*added.values())))
            arms = ", ".join(dict.fromkeys(arm for arm, _ in added))
            self._say(f"A best rate lies at the end of its grid: {more} added ({arms}).")

    def _cell(self, names: Names, setting: Setting, seeds: Iterable[int]) -> Cell:
        arm, condition = self._pairs[names]
        found = tuple(self._known[self._run(names, setting, seed)[0]] for seed in seeds)
        return Cell(arm, condition, round_rate(setting.rate * condition.rate_factor), found, setting.init)

    def _run(self, names: Names, setting: Setting, seed: int) -> NamedRun:
        return self.plan.run(*self._pairs[names], setting.rate, seed, setting.init)

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
                f"the runs {other.name} and {found.name} in {self.out} saw different data: give the data of the "
                "results that are there, or choose another --out"
            )
        self._known[found.name] = found

    def _harvest(self, grid: Grid) -> None:
        """Write the result files of a grid; report crashed runs once everything else is safe."""
        crashed = [job for job in grid.jobs if job.state == "crashed"]
        ended = [job for job in grid.jobs if job.state in FINISHED and job.name not in self._known]
        if ended:
            runs = "1 finished run" if len(ended) == 1 else f"{len(ended)} finished runs"
            self._say(f"Measuring {runs} on the held-out text that rates are chosen on.")
        for job in ended:
            found = results.harvest(grid.path(job.name), self._held_out, self.plan.definition.measure)
            self._take(found)
            results.save(found, self.out / "results")
        if crashed:
            raise RunFailed(
                f"{len(crashed)} of {len(grid.jobs)} runs ended without a result, {crashed[0].name}: "
                f"{crashed[0].detail}; see {self.out / 'logs'}; the same command tries again"
            )

    def _announce(self) -> None:
        """Say which runs there are, and about how long the missing ones take."""
        plan = self.plan
        rounds = self._first_rounds()
        missing = [run for runs in rounds.values() for run in runs if not self._has_result(*run)]
        self._say(f"{plan.definition.name}: {plan.definition.question}")
        self._say(_shape(plan))
        if plan.fitted:
            self._say(plan.fitted)
        for what, runs in rounds.items():
            tokens = sum(config.steps * config.tokens_per_step for _, config in runs)
            self._say(f"  {what}: {len(runs)} runs, {tokens:,} tokens")
        if not missing:
            self._say("All of these runs have a result already.")
            return
        plan.definition.require()  # before hours of work, not after
        grid = Grid(missing, self.out, plan.request.workers, plan.request.stack)
        waiting, stack = [job.config for job in grid.waiting], plan.request.stack
        open_end, threads = (
            _MORE.get(plan.rates.kind, ""),
            f"{grid.threads} CPU thread{'s' if grid.threads > 1 else ''}",
        )
        if stack > 1:  # steps of single runs say nothing about its time
            how = f"in stacks of up to {stack} runs, {grid.workers} at once with {threads} each{open_end}"
        else:
            minutes = math.ceil(grid_seconds(waiting, grid.threads, grid.workers) / 60)
            about = f"about {minutes} minute{'s' if minutes != 1 else ''}"
            how = f"{grid.workers} at once with {threads} each: {about}, from steps timed just now{open_end}"
        self._say(f"{len(waiting)} of them still to do, {how}. Ctrl-C saves; the same command goes on.")

    def _first_rounds(self) -> dict[str, list[NamedRun]]:
        """The runs to announce beforehand. The last round's rates are not tuned yet: any rate stands in for them."""
        plan, rates = self.plan, self.plan.first_rates
        grid = [
            self._run(names, Setting(rate), seed) for names in self._pairs for rate in rates for seed in plan.grid_seeds
        ]
        last = [self._run(names, Setting(rates[len(rates) // 2]), seed) for names in self._pairs for seed in plan.seeds]
        tuned = {"arm x condition x learning rate, tuning seeds": grid, "at the best rates, fresh seeds": last}
        steps = self._next_steps() if plan.rates.kind == "searched" else []
        rounds = {
            "common": {"arm x condition x seed": last},
            "tuned": tuned,
            "searched": {"steps of the searches so far, tuning seeds": steps, "at the best settings": last},
            "sweep": {"arm x learning rate x seed": grid},
        }
        return rounds[plan.rates.kind]

    def _next_steps(self) -> list[NamedRun]:
        """The runs that the searches have compared or compare next; each starts from the best before it so far."""
        starts, runs = self._starts(), list[NamedRun]()
        for condition in self.plan.conditions:
            found = self._searches(condition, starts)
            starts = {arm: one.best for arm, one in found.items()}
            runs += [
                self._run((arm, condition.name), setting, seed)
                for arm, one in found.items()
                for setting in one.visited
                for seed in self.plan.grid_seeds
            ]
        return runs

    def _has_result(self, name: str, config: RunConfig) -> bool:
        if (
            self.plan.rates.kind in ("tuned", "searched") and config.seed in self.plan.seeds
        ):  # its rate is not known yet
            rateless, _, _ = name.rpartition("-lr")
            return any((self.out / "results").glob(f"{rateless}-lr*-seed{config.seed}.json"))
        return self._is_known(name, config)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)


def extension(rates: Sequence[float], best: float, first: Sequence[float], spacing: float) -> float | None:
    """The rate to add if the best one lies at an end of the grid.

    Args:
        rates: the grid so far, ascending.
        best: one of them.
        first: the grid at the start, ascending; beyond its ends at most `MOST_EXTENSIONS` rates are added.
        spacing: the ratio of neighbouring rates.

    Returns:
        None if the best rate does not lie at an end, or the grid has been extended enough on that side.
    """
    if best == rates[0] and sum(rate < first[0] for rate in rates) < MOST_EXTENSIONS:
        return round_rate(best / spacing)
    if best == rates[-1] and sum(rate > first[-1] for rate in rates) < MOST_EXTENSIONS:
        return round_rate(best * spacing)
    return None


def read_request(out: Path) -> dict[str, Any]:
    """The options in OUT/study.json; empty if there is no such file.

    Raises:
        UserError: if it is damaged.
    """
    file = out / "study.json"
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete it and give the study's options again") from None


def write_request(plan: PlannedStudy) -> None:
    """Keep the study's options in OUT/study.json."""
    kept = {name: value for name, value in asdict(plan.request).items() if name not in ("out", "workers", "stack")}
    out = plan.request.out
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / "study.json", json.dumps({"study": plan.definition.name, **kept}, indent=2) + "\n")


def _shape(plan: PlannedStudy) -> str:
    base, model = plan.base, plan.base.model
    parameters = count_parameters(model).total
    chosen = plan.rates.kind in ("tuned", "searched")
    tuned = f"; tuned on {', '.join(map(str, plan.grid_seeds))}" if chosen else ""
    inits = f"Init scales: {', '.join(f'{init:g}' for init in plan.rates.inits)}. " if len(plan.rates.inits) > 1 else ""
    upto = "up to " if len(plan.lengths) > 1 else ""
    deep = "up to " if len(plan.depths) > 1 else ""
    return (
        f"{plan.request.preset}: {deep}{model.n_layers} layers, d_model {model.d_model}, {parameters / 1e6:.2f}M "
        f"parameters; {upto}{base.steps:,} steps of {base.data.batch_size} x {model.context} tokens, base rate "
        f"{base.optim.lr:g}, {base.optim.warmup} warm-up steps.\n"
        f"Arms: {', '.join(arm.name for arm in plan.arms)}.\n"
        f"Conditions: {'; '.join(condition.title for condition in plan.conditions)}.\n"
        f"Rates: {', '.join(f'{rate:g}' for rate in plan.first_rates)}. {inits}"
        f"Seeds: {', '.join(map(str, plan.seeds))}{tuned}."
    )
