"""Alarms: what goes wrong in a run, where first and since which step; from probe.jsonl and metrics.jsonl, row by row.

    alarms = Alarms()
    for row in rows:                 # of either file, in the order of their steps
        for alarm in alarms.update(row):
            print(alarm)

Points say how sure an alarm is. Each look (a probed step; of the loss, any step) at which a number is beyond its
threshold gives one point, far beyond it (`sdd.probing.checks.KINDS`) two, a number that is not finite three:

    1 point: possible      2 points: likely      3 or more: certain

An alarm ends after three looks, or 16 steps, at which nothing is wrong; later trouble is a new alarm. Routers are
looked at every 16 steps, for trouble that has lasted.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from sdd.probing.advice import advice
from sdd.probing.checks import (
    CHECKS,
    KINDS,
    CheckResult,
    Kind,
    ProbeKind,
    Reading,
    RouterKind,
    StepKind,
    layer_of,
    origin,
)
from sdd.probing.metric_checks import LossChecks, RouterChecks
from sdd.probing.probe_file import Row

Certainty = Literal["possible", "likely", "certain"]

_LOOKS_TO_END: Mapping[Kind, int] = dict.fromkeys(KINDS, 3) | dict.fromkeys(get_args(StepKind), 16)
#: Conditions under which a model may break; the break itself is another alarm.
_CONDITIONS: tuple[Kind, ...] = ("large updates", "eps", *get_args(RouterKind))
#: One step with a large gradient is clipped and does no harm; it takes two such steps, or one far beyond the threshold.
_FEWEST_POINTS: Mapping[Kind, int] = {"gradient spike": 2}
_KEPT = 9  # readings: the first, and eight that trends look back


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong.

    Attributes:
        kind: the kind of trouble.
        where: the name in probe.jsonl, or the block, at which it was seen first; "" if that is not known.
        since_step: the first step at which it was seen.
        last_step: the last one so far.
        certainty: "possible", "likely" or "certain".
        what: the numbers at that first step.
        worst: the numbers where they were worst.
        worst_step: the step of these numbers.
        advice: what to try.
        places: all names or blocks at which it was seen, each with its first step.
        ended: whether it has not been seen for a while.
    """

    kind: Kind
    where: str
    since_step: int
    last_step: int
    certainty: Certainty
    what: str
    worst: str
    worst_step: int
    advice: str
    places: Mapping[str, int]
    ended: bool

    @property
    def layer(self) -> int | None:
        """The block it was seen in first, from 0; None if in none."""
        return layer_of(self.where)

    @property
    def title(self) -> str:
        """The kind of trouble, in words."""
        return KINDS[self.kind].title

    def __str__(self) -> str:
        where = f", first in {self.where}" if self.where else ""
        return f"{self.title} since step {self.since_step}{where} ({self.certainty}): {self.what}. Try: {self.advice}"


@dataclass
class _Episode:
    """An alarm in the making."""

    alarm: Alarm
    worst: float
    points: int = 0
    looks_without: int = 0
    searched: set[int] = field(default_factory=set)  # the probed steps in which its origin was looked for

    @property
    def is_raised(self) -> bool:
        return self.points >= _FEWEST_POINTS.get(self.alarm.kind, 1)


class Alarms:
    """Watches a run.

    Args:
        settings: config.json with dotted names, for advice that fits the run.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings = settings or {}
        self._losses, self._routers = LossChecks(), RouterChecks()
        self._readings: list[Reading] = []
        self._open: dict[Kind, _Episode] = {}
        self._all: list[_Episode] = []

    @property
    def found(self) -> list[Alarm]:
        """All alarms so far, the earliest first."""
        return sorted((each.alarm for each in self._all if each.is_raised), key=lambda alarm: alarm.since_step)

    def update(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take a row of probe.jsonl or metrics.jsonl; rows come in the order of their steps.

        Returns:
            The alarms that are new, or surer than before.
        """
        before = {id(each): each.alarm.certainty for each in self._all if each.is_raised}
        if "sites" in row:
            self._take_probe_row(Reading(row))
        elif "event" in row or "loss" in row:
            self._take_metrics_row(row)
        raised = [each for each in self._open.values() if each.is_raised]
        return [each.alarm for each in raised if before.get(id(each)) != each.alarm.certainty]

    def catch_up(self, probe: Iterable[Row], metrics: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of both files, each of ascending steps, at the start of a resumed run."""
        for row in heapq.merge(metrics, probe, key=lambda row: row["step"]):
            self.update(row)

    def _take_probe_row(self, reading: Reading) -> None:
        results = [result for check in CHECKS for result in check(reading, self._readings)]
        self._readings.append(reading)
        if len(self._readings) > _KEPT:
            del self._readings[1]
        self._take(reading.step, results, get_args(ProbeKind))

    def _take_metrics_row(self, row: Mapping[str, Any]) -> None:
        results = [*self._losses.update(row), *self._routers.update(row)]
        looked_at: list[Kind] = []
        if "event" not in row:
            looked_at += get_args(StepKind)
            looked_at += ("rising loss",) if self._losses.looks_at_rises else ()
        if "routing" in row:
            looked_at += get_args(RouterKind) if self._routers.looks else ()
        self._take(int(row["step"]), results, looked_at)

    def _take(self, step: int, results: Sequence[CheckResult], looked_at: Sequence[Kind]) -> None:
        """Open or continue the alarms of the results, and end those that were looked at and not seen for a while."""
        kinds = dict.fromkeys(result.kind for result in results)
        for kind in kinds:
            self._see(step, [result for result in results if result.kind == kind])
        for kind in looked_at:
            episode = self._open.get(kind)
            if episode and kind not in kinds:
                episode.looks_without += 1
                if episode.looks_without >= _LOOKS_TO_END[kind]:
                    episode.alarm = replace(episode.alarm, ended=True)
                    del self._open[kind]
        self._locate()

    def _see(self, step: int, results: Sequence[CheckResult]) -> None:
        """Open or continue one alarm."""
        worst = max(results, key=lambda result: result.factor)
        episode = self._open.get(worst.kind)
        if episode is None:
            since = min(result.since or step for result in results)
            advised = advice(worst.kind, self._settings)
            new = Alarm(worst.kind, "", since, step, "possible", worst.what, worst.what, step, advised, {}, False)
            episode = self._open[worst.kind] = _Episode(new, worst.factor)
            self._all.append(episode)
        alarm, places = episode.alarm, dict(episode.alarm.places)
        if worst.factor > episode.worst:
            episode.worst, alarm = worst.factor, replace(alarm, worst=worst.what, worst_step=step)
        for result in results:
            if result.where:
                places.setdefault(result.where, result.since or step)
        episode.points += worst.points
        episode.looks_without = 0
        sure: Certainty = "possible" if episode.points < 2 else "likely" if episode.points == 2 else "certain"
        where = alarm.where or worst.where
        episode.alarm = replace(alarm, last_step=step, certainty=sure, where=where, places=places)

    def _locate(self) -> None:
        """Find the place where those alarms began that loss and gradient norm raised."""
        reach = self._readings[-1].step - self._readings[-2].step if len(self._readings) > 1 else 0
        for episode in self._open.values():
            for index, reading in enumerate(self._readings):
                near = abs(reading.step - episode.alarm.since_step) <= reach and reading.step not in episode.searched
                if episode.alarm.where or not near:
                    continue
                episode.searched.add(reading.step)
                if found := origin(reading, self._readings[:index]):
                    where, what = found[0], f"{episode.alarm.what}; {found[1]}"
                    episode.alarm = replace(episode.alarm, where=where, places={where: reading.step}, what=what)


def judge(
    probe: Iterable[Row], metrics: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> list[Alarm]:
    """Find the alarms of a whole run.

    Args:
        probe: the rows of probe.jsonl, of ascending steps.
        metrics: the rows of metrics.jsonl, likewise.
        settings: config.json with dotted names, for advice that fits the run.
    """
    alarms = Alarms(settings)
    alarms.catch_up(probe, metrics)
    return alarms.found


def broke_first(alarms: Iterable[Alarm]) -> Alarm | None:
    """The alarm that says best what broke first: the earliest of those that are at least likely.

    Mere conditions (large updates, eps, routers) count only if there is nothing else.
    """
    sure = [alarm for alarm in alarms if alarm.certainty != "possible"] or list(alarms)
    broken = [alarm for alarm in sure if alarm.kind not in _CONDITIONS] or sure
    return min(broken, key=lambda alarm: alarm.since_step, default=None)
