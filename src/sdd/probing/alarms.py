"""What goes wrong in a run, where first and since which step; from probe.jsonl and metrics.jsonl, row by row.

    alarms = Alarms()
    for row in rows:                 # of either file, in the order of their steps
        for alarm in alarms.update(row):
            print(alarm)

How sure an alarm is follows from points. Each look (a probed step; of the loss, a step) at which a number is beyond its
threshold gives one, far beyond it (`sdd.probing.checks.FAR`) two, a number that is not finite three:

    1 point: possible      2 points: likely      3 or more: certain

An alarm ends after three looks without, or 16 steps; what comes later is a new one. Routers are looked at every 16
steps, for what has lasted.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdd.probing.advice import advice
from sdd.probing.checks import CHECKS, FAR, Finding, Kind, Reading, layer_of
from sdd.probing.losses import Losses
from sdd.probing.origin import origin
from sdd.probing.routers import Routers
from sdd.probing.rows import Row

Certainty = Literal["possible", "likely", "certain"]

TITLES: Mapping[Kind, str] = {
    "non-finite": "Numbers are not finite",
    "damaged weights": "Weights are damaged",
    "exploding gradients": "Gradients explode on their way down",
    "fading gradients": "Gradients fade on their way down",
    "rising loss": "The loss rises",
    "loss spike": "The loss spikes",
    "gradient spike": "The gradient norm spikes",
    "attention logits": "Attention saturates",
    "dead alpha": "An alpha is dead",
    "eps": "eps bends a norm",
    "large updates": "Updates are very large",
    "stuck weights": "Matrices are stuck",
    "dead experts": "Experts get no tokens",
    "saturated router": "A router saturates",
}

_LOOKS_TO_CLEAR, _STEPS_TO_CLEAR = 3, 16
_OF_STEPS: tuple[Kind, ...] = ("non-finite", "damaged weights", "loss spike", "gradient spike")
_OF_ROUTERS: tuple[Kind, ...] = ("dead experts", "saturated router")
_OF_PROBES: tuple[Kind, ...] = tuple(kind for kind in FAR if kind not in (*_OF_STEPS, *_OF_ROUTERS, "rising loss"))
#: Conditions in which a model breaks, not yet what breaks.
_CONDITIONS: tuple[Kind, ...] = ("large updates", "eps", *_OF_ROUTERS)
#: A single step's gradient is clipped and forgotten; it takes two, or one far beyond the threshold.
_FEWEST_POINTS: Mapping[Kind, int] = {"gradient spike": 2}
_KEPT = 9  # readings: the first, and eight that trends look back


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong.

    Attributes:
        kind: what.
        where: the site or block at which it was seen first, "" if that is not known.
        since_step: the first step at which it was seen.
        last_step: the last one so far.
        certainty: "possible", "likely" or "certain".
        what: the numbers at that first step.
        worst: the numbers where they were worst.
        worst_step: when that was.
        advice: what to try.
        places: all sites or blocks at which it was seen, each with its first step.
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
        """What goes wrong, in words."""
        return TITLES[self.kind]

    def __str__(self) -> str:
        where = f", first in {self.where}" if self.where else ""
        return f"{self.title} since step {self.since_step}{where} ({self.certainty}): {self.what}. Try: {self.advice}"


@dataclass
class _Episode:
    """An alarm in the making."""

    kind: Kind
    where: str
    since: int
    last: int
    what: str
    worst: tuple[float, str, int]
    points: int = 0
    clear: int = 0
    ended: bool = False
    places: dict[str, int] = field(default_factory=dict)
    looked_at: set[int] = field(default_factory=set)  # the probed steps in which its origin was looked for

    @property
    def certainty(self) -> Certainty:
        return "possible" if self.points < 2 else "likely" if self.points == 2 else "certain"

    @property
    def is_raised(self) -> bool:
        return self.points >= _FEWEST_POINTS.get(self.kind, 1)


class Alarms:
    """Watches a run.

    Args:
        settings: config.json with dotted names, for advice that fits the run.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings = settings or {}
        self._losses, self._routers = Losses(), Routers()
        self._readings: list[Reading] = []
        self._open: dict[Kind, _Episode] = {}
        self._all: list[_Episode] = []

    @property
    def found(self) -> list[Alarm]:
        """All alarms so far, the earliest first."""
        raised = [episode for episode in self._all if episode.is_raised]
        return [self._alarm(episode) for episode in sorted(raised, key=lambda episode: episode.since)]

    def update(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take a row of probe.jsonl or metrics.jsonl; rows come in the order of their steps.

        Returns:
            The alarms that are new, or surer than before.
        """
        before = {id(episode): episode.certainty for episode in self._all if episode.is_raised}
        if "sites" in row:
            self._probed(Reading(row))
        elif "event" in row or "loss" in row:
            self._trained(row)
        raised = [episode for episode in self._open.values() if episode.is_raised]
        return [self._alarm(episode) for episode in raised if before.get(id(episode)) != episode.certainty]

    def catch_up(self, probe: Iterable[Row], metrics: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of both files, each of ascending steps, as a run that goes on finds them."""
        for row in heapq.merge(metrics, probe, key=lambda row: row["step"]):
            self.update(row)

    def _probed(self, reading: Reading) -> None:
        findings = [finding for check in CHECKS for finding in check(reading, self._readings)]
        self._readings.append(reading)
        if len(self._readings) > _KEPT:
            del self._readings[1]
        self._take(reading.step, findings, _OF_PROBES, _LOOKS_TO_CLEAR)
        self._locate()

    def _trained(self, row: Mapping[str, Any]) -> None:
        findings = list(self._losses.update(row))
        rises = [finding for finding in findings if finding.kind == "rising loss"]
        others = [finding for finding in findings if finding.kind != "rising loss"]
        step, routed = int(row["step"]), list(self._routers.update(row))
        self._take(step, others, () if "event" in row else _OF_STEPS, _STEPS_TO_CLEAR)
        if "event" not in row and self._losses.looks_at_rises:
            self._take(step, rises, ("rising loss",), _LOOKS_TO_CLEAR)
        if self._routers.looks and "routing" in row:
            self._take(step, routed, _OF_ROUTERS, _LOOKS_TO_CLEAR)
        if findings:
            self._locate()

    def _take(self, step: int, findings: list[Finding], looked_at: tuple[Kind, ...], looks_to_clear: int) -> None:
        """Open, go on with, or end the alarms of the kinds that were looked at."""
        kinds = dict.fromkeys(finding.kind for finding in findings)
        for kind in kinds:
            self._extend(step, [finding for finding in findings if finding.kind == kind])
        for kind in looked_at:
            episode = self._open.get(kind)
            if episode and kind not in kinds:
                episode.clear += 1
                if episode.clear >= looks_to_clear:
                    episode.ended = True
                    del self._open[kind]

    def _extend(self, step: int, findings: list[Finding]) -> None:
        worst = max(findings, key=lambda finding: finding.factor)
        episode = self._open.get(worst.kind)
        if episode is None:
            first = min(finding.since or step for finding in findings)
            episode = _Episode(worst.kind, worst.site, first, step, worst.what, (worst.factor, worst.what, step))
            self._open[worst.kind] = episode
            self._all.append(episode)
        episode.points += worst.points
        episode.clear, episode.last = 0, step
        episode.where = episode.where or worst.site
        if worst.factor > episode.worst[0]:
            episode.worst = (worst.factor, worst.what, step)
        for finding in findings:
            if finding.site:
                episode.places.setdefault(finding.site, finding.since or step)

    def _locate(self) -> None:
        """Find where those alarms began that loss and gradient norm raised."""
        reach = self._readings[-1].step - self._readings[-2].step if len(self._readings) > 1 else 0
        for episode in self._open.values():
            for index, reading in enumerate(self._readings):
                near = abs(reading.step - episode.since) <= reach and reading.step not in episode.looked_at
                if episode.where or not near:
                    continue
                episode.looked_at.add(reading.step)
                if found := origin(reading, self._readings[:index]):
                    episode.where, episode.places = found.site, {found.site: found.step}
                    episode.what = f"{episode.what}; {found.what}"

    def _alarm(self, episode: _Episode) -> Alarm:
        return Alarm(
            kind=episode.kind,
            where=episode.where,
            since_step=episode.since,
            last_step=episode.last,
            certainty=episode.certainty,
            what=episode.what,
            worst=episode.worst[1],
            worst_step=episode.worst[2],
            advice=advice(episode.kind, episode.where, self._settings),
            places=dict(episode.places),
            ended=episode.ended,
        )


def judge(
    probe: Iterable[Row], metrics: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> list[Alarm]:
    """The alarms of a whole run.

    Args:
        probe: the rows of probe.jsonl, of ascending steps.
        metrics: the rows of metrics.jsonl, likewise.
        settings: config.json with dotted names, for advice that fits the run.
    """
    alarms = Alarms(settings)
    alarms.catch_up(probe, metrics)
    return alarms.found


def broke_first(alarms: Iterable[Alarm]) -> Alarm | None:
    """The alarm that says best what broke first: of what is at least likely, the earliest.

    What only prepares the ground (large updates, eps, routers) counts if there is nothing else.
    """
    sure = [alarm for alarm in alarms if alarm.certainty != "possible"] or list(alarms)
    broken = [alarm for alarm in sure if alarm.kind not in _CONDITIONS] or sure
    return min(broken, key=lambda alarm: alarm.since_step, default=None)
