"""What a report says first: how each run fares, which layer broke first, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdd.probing.alarms import Alarm, broke_first
from sdd.probing.checks import layer_of
from sdd.report.runs import Run


@dataclass(frozen=True)
class Verdict:
    """The summary of one run.

    Attributes:
        tone: "bad" if something is at least likely to be wrong, or the run failed; "good" if all was looked at and
            nothing was seen.
        headline: one sentence.
        details: what stands behind it, and what else there is, in sentences.
        advice: what to try, "" for nothing.
    """

    tone: Literal["bad", "good", "unknown"]
    headline: str
    details: list[str]
    advice: str = ""


def verdict(run: Run) -> Verdict:
    """The summary of a run from its end and its alarms."""
    first = broke_first(run.alarms)
    ended = f"The run {run.status}: {run.reason}." if run.status in ("did not converge", "failed") else ""
    if first is None:
        watched = _watched(run)
        if ended:
            return Verdict("bad", ended, [f"No alarm says where. {watched}"])
        if run.probe is None:
            return Verdict("unknown", "No alarm, but nothing was probed.", [watched])
        return Verdict("good", "No alarm.", [watched])
    where = f", first in {place(first)}" if first.where else ""
    headline = f"{first.title} since step {first.since_step:,}{where} ({first.certainty})."
    others = [alarm for alarm in run.alarms if alarm is not first]
    earlier = [alarm for alarm in others if alarm.since_step < first.since_step]
    later = [alarm for alarm in others if alarm.since_step >= first.since_step]
    details = [
        f"{first.what[:1].upper()}{first.what[1:]}.",
        *(f"Before: {brief(alarm)}." for alarm in earlier[:3]),
        *(f"Then: {brief(alarm)}." for alarm in later[:3]),
        *([ended] if ended else []),
    ]
    tone = "unknown" if first.certainty == "possible" and not ended else "bad"
    return Verdict(tone, headline, details, first.advice)


def brief(alarm: Alarm) -> str:
    """An alarm in half a sentence."""
    where = f" in {place(alarm)}" if alarm.where else ""
    return f"{alarm.title[:1].lower()}{alarm.title[1:]}{where}, step {alarm.since_step:,} ({alarm.certainty})"


def place(alarm: Alarm) -> str:
    """Where an alarm began, the block in words."""
    if alarm.layer is None:
        return alarm.where
    name, _, rest = alarm.where.partition(f".{alarm.layer}.")
    return f"block {alarm.layer} ({rest})" if rest and name else f"block {alarm.layer}"


def span(alarm: Alarm) -> str:
    """From when to when it was seen."""
    since = f"since step {alarm.since_step:,}"
    return f"steps {alarm.since_step:,} to {alarm.last_step:,}" if alarm.ended else since


def places(alarm: Alarm) -> str:
    """At how many sites, and which blocks."""
    layers = sorted({layer for site in alarm.places if (layer := layer_of(site)) is not None})
    if len(alarm.places) < 2 or not layers:
        return ""
    return f"{len(alarm.places)} places, blocks {_ranges(layers)}"


def _watched(run: Run) -> str:
    steps = f"{run.step:,} steps of loss and gradient norm"
    if run.probe is None:
        return f"Looked at: {steps}; there is no probe.jsonl to look into the layers."
    return f"Looked at: {steps}, {len(run.probe.steps):,} of them at {len(run.probe.sites):,} sites."


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0–2, 5."""
    parts: list[list[int]] = []
    for value in numbers:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
