"""The first lines of a report: how each run fares, which layer broke first, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from sdd.probing.alarms import Alarm, broke_first
from sdd.probing.checks import layer_of
from sdd.report.runs import RunHistory


@dataclass(frozen=True)
class Verdict:
    """The summary of one run.

    Attributes:
        tone: "bad" if the run failed or an alarm is at least likely; "good" if everything was checked without an alarm;
            else "unknown".
        headline: one sentence.
        details: further sentences: the numbers behind the headline, and other alarms.
        advice: what to try; "" if there is none.
    """

    tone: Literal["bad", "good", "unknown"]
    headline: str
    details: list[str]
    advice: str = ""


def verdict(run: RunHistory) -> Verdict:
    """Sum up a run from how it ended and from its alarms."""
    first = broke_first(run.alarms)
    ended = f"The run {run.status}: {run.reason}." if run.status in ("did not converge", "failed") else ""
    if first is None:
        checked = _checked(run)
        if ended:
            return Verdict("bad", ended, [f"No alarm tells where it began. {checked}"])
        if run.probe is None:
            return Verdict("unknown", "No alarm, but the layers were not probed.", [checked])
        return Verdict("good", "No alarm.", [checked])
    where = f", first in {place(first)}" if first.where else ""
    others = [alarm for alarm in run.alarms if alarm is not first]
    earlier = [f"Before: {_brief(alarm)}." for alarm in others if alarm.since_step < first.since_step]
    later = [f"Then: {_brief(alarm)}." for alarm in others if alarm.since_step >= first.since_step]
    return Verdict(
        tone="unknown" if first.certainty == "possible" and not ended else "bad",
        headline=f"{first.title} since step {first.since_step:,}{where} ({first.certainty}).",
        details=[f"{first.what[:1].upper()}{first.what[1:]}.", *earlier[:3], *later[:3], *filter(None, [ended])],
        advice=first.advice,
    )


def place(alarm: Alarm) -> str:
    """Say where an alarm began, as block and site."""
    if alarm.layer is None:
        return alarm.where
    name, _, rest = alarm.where.partition(f".{alarm.layer}.")
    return f"block {alarm.layer} ({rest})" if rest and name else f"block {alarm.layer}"


def span(alarm: Alarm) -> str:
    """Say in which steps an alarm was seen."""
    since = f"since step {alarm.since_step:,}"
    return f"steps {alarm.since_step:,} to {alarm.last_step:,}" if alarm.ended else since


def places(alarm: Alarm) -> str:
    """Say at how many sites of which blocks an alarm was seen; "" for a single one."""
    layers = sorted({layer for site in alarm.places if (layer := layer_of(site)) is not None})
    if len(alarm.places) < 2 or not layers:
        return ""
    return f"{len(alarm.places)} places, blocks {_ranges(layers)}"


def _brief(alarm: Alarm) -> str:
    where = f" in {place(alarm)}" if alarm.where else ""
    return f"{alarm.title[:1].lower()}{alarm.title[1:]}{where}, step {alarm.since_step:,} ({alarm.certainty})"


def _checked(run: RunHistory) -> str:
    steps = f"Checked: loss and gradient norm of {run.step:,} steps"
    if run.probe is None:
        return f"{steps}. Without a probe.jsonl the layers cannot be checked."
    return f"{steps}; {len(run.probe.sites):,} sites at {len(run.probe.steps):,} probed steps."


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges: 0, 1, 2, 5 become 0–2, 5."""
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])  # constant along a range
    parts = [[value for _, value in group] for _, group in groups]
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
