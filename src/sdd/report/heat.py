"""Maps of blocks over steps, and what a probe saw as such; numbers only, `sdd.draw.maps` draws them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sdd.probing import ProbeHistory
from sdd.probing.alarms import Alarm, Kind
from sdd.probing.checks import EPS_SHARE, LOGIT_MAX, UPDATE_RATIO, layer_of

if TYPE_CHECKING:
    from sdd.report.runs import Run

_MOST_COLUMNS = 240
#: A scale of more than this many decades shows nothing any more: what lies below takes the darkest colour.
_DECADES = 9


@dataclass(frozen=True)
class HeatMap:
    """One statistic of one run, over blocks and steps.

    Attributes:
        name: of the statistic, fit for a file name.
        title: what is shown.
        unit: of the colour.
        run: whose it is.
        steps: int `[S]`, what each column is.
        rows: what each row is, from the input on.
        values: float64 `[R, S]`; what is not finite has a colour of its own.
        log: whether the colour is logarithmic.
        threshold: where an alarm is raised, None if it is not by the value itself.
        marks: (row, column) of the cells in which an alarm of its kind began.
        limits: of the colour; None fits it to the values.
        across: what a column is.
        missing: what a cell is that is not finite.
    """

    name: str
    title: str
    unit: str
    run: str
    steps: np.ndarray
    rows: tuple[str, ...]
    values: np.ndarray
    log: bool = True
    threshold: float | None = None
    marks: tuple[tuple[int, int], ...] = ()
    limits: tuple[float, float] | None = None
    across: str = "probed step"
    missing: str = "not finite"

    def extent(self) -> tuple[float, float] | None:
        """The lowest and highest value that the colours tell apart; None if there is none."""
        shown = self.values[np.isfinite(self.values) & ((self.values > 0) | (not self.log))]
        if not len(shown):
            return None
        low, high = float(shown.min()), float(shown.max())
        if not self.log:
            return low, high if high > low else low + 1
        low = max(low, high * 10.0**-_DECADES)
        return (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)

    def describe(self) -> str:
        """The map in words, for those who cannot see it."""
        over = f"by block over {self.across}s {self.steps[0]} to {self.steps[-1]}"
        begin = f"{self.title}, {self.unit}, of {self.run}, {over}."
        found = self.extent()
        if found is None:
            return f"{begin} Nothing finite."
        last, lacking = self.values[:, -1], int((~np.isfinite(self.values)).sum())
        parts = [begin, f"Between {found[0]:.3g} and {found[1]:.3g}."]
        if self.across.endswith("step") and np.isfinite(last).any():
            parts.append(f"At the last one from {np.nanmin(last):.3g} to {np.nanmax(last):.3g}.")
        if lacking:
            parts.append(f"{lacking} of {self.values.size} are {self.missing}.")
        return " ".join(parts)

    def marks_of(self, alarms: Sequence[Alarm], kinds: Sequence[Kind]) -> tuple[tuple[int, int], ...]:
        """The cells in which alarms of those kinds began."""
        return tuple(
            (self.rows.index(str(alarm.layer)), int(np.abs(self.steps - alarm.since_step).argmin()))
            for alarm in alarms
            if alarm.kind in kinds and str(alarm.layer) in self.rows
        )


@dataclass(frozen=True)
class _Map:
    """How a map is made of the sites in a block; of the residual stream if there is no way to."""

    name: str
    title: str
    unit: str
    stat: str
    over_sites: Callable[..., np.ndarray] | None
    kinds: tuple[Kind, ...] = ()
    log: bool = True
    threshold: float | None = None


_MAPS = (
    _Map("stream", "Residual stream", "rms", "rms", None),
    _Map(
        "stream-grad",
        "Gradient of the residual stream",
        "rms",
        "grad_rms",
        None,
        ("fading gradients", "exploding gradients"),
    ),
    _Map("outputs", "Outputs", "largest rms in the block", "rms", np.nanmax, ("non-finite",)),
    _Map("weight-grads", "Gradients of the matrices", "median rms in the block", "weight_grad_rms", np.nanmedian),
    _Map(
        "updates",
        "Updates",
        "largest ||dW|| / ||W||",
        "update_ratio",
        np.nanmax,
        ("large updates", "stuck weights"),
        threshold=UPDATE_RATIO,
    ),
    _Map(
        "logits",
        "Attention logits",
        "largest logit",
        "logit_max",
        np.nanmax,
        ("attention logits",),
        threshold=LOGIT_MAX,
    ),
    _Map("entropy", "Attention entropy", "mean, nats", "entropy", np.nanmin, ("attention logits",), log=False),
    _Map("eps", "Share of eps", "largest eps / mean square", "eps_ratio", np.nanmax, ("eps",), threshold=EPS_SHARE),
)
_SITE_MAPS = (
    _Map("site-outputs", "Outputs, site by site", "rms", "rms", None),
    _Map("site-grads", "Gradients of outputs, site by site", "rms", "grad_rms", None),
    _Map("site-updates", "Updates, site by site", "||dW|| / ||W||", "update_ratio", None),
)


def block_maps(runs: Sequence["Run"]) -> list[list[HeatMap]]:
    """For each statistic that a run has, the maps of those runs that have it, with one scale of colour."""
    return [share_limits(found) for kind in _MAPS if (found := [m for run in runs if (m := _block_map(run, kind))])]


def site_maps(runs: Sequence["Run"]) -> list[list[HeatMap]]:
    """The same with a row for each site, in the model's order."""
    return [share_limits(found) for kind in _SITE_MAPS if (found := [m for run in runs if (m := _site_map(run, kind))])]


def _block_map(run: "Run", kind: _Map) -> HeatMap | None:
    probe = run.probe
    if probe is None:
        return None
    if kind.over_sites is None:
        values = probe.layers.get(kind.stat, np.empty((len(probe.steps), 0))).T
        n_blocks = probe.layers.get("rms", values.T).shape[1] - 1
        rows = ["in", *map(str, range(n_blocks))][-len(values) :] if len(values) else []
    else:
        rows, values = _by_block(probe, kind)
    if not len(values):
        return None
    return _finished(run, kind, tuple(rows), values)


def _by_block(probe: ProbeHistory, kind: _Map) -> tuple[list[str], np.ndarray]:
    blocks: dict[int, list[np.ndarray]] = {}
    for site in probe.has(kind.stat):
        layer = layer_of(site)
        if layer is not None:
            blocks.setdefault(layer, []).append(probe.series(site, kind.stat))
    assert kind.over_sites is not None
    values = [_reduced(kind.over_sites, np.array(blocks[layer])) for layer in sorted(blocks)]
    return [str(layer) for layer in sorted(blocks)], np.array(values)


def _reduced(how: Callable[..., np.ndarray], values: np.ndarray) -> np.ndarray:
    """Over the first axis; nan where any is not a number, so that it is seen."""
    return np.where(np.isnan(values).any(0), math.nan, how(np.nan_to_num(values, nan=0.0, posinf=math.inf), axis=0))


def _site_map(run: "Run", kind: _Map) -> HeatMap | None:
    if run.probe is None or not run.probe.has(kind.stat):
        return None
    sites = run.probe.has(kind.stat)
    return _finished(run, kind, sites, np.array([run.probe.series(site, kind.stat) for site in sites]))


def _finished(run: "Run", kind: _Map, rows: tuple[str, ...], values: np.ndarray) -> HeatMap:
    assert run.probe is not None
    steps, values = thinned(run.probe.steps, values)
    whole = HeatMap(kind.name, kind.title, kind.unit, run.name, steps, rows, values, kind.log, kind.threshold)
    return replace(whole, marks=whole.marks_of(run.alarms, kind.kinds))


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 240 columns: the first, the last, and of each stretch the one that is farthest from the usual values."""
    if len(steps) <= _MOST_COLUMNS:
        return steps, values
    with np.errstate(all="ignore"):
        logs = np.nan_to_num(np.log(np.abs(values)), nan=1e3, posinf=1e3, neginf=-1e3)
    away = np.abs(logs - np.median(logs, axis=1, keepdims=True)).max(0)
    stretches = np.array_split(np.arange(1, len(steps) - 1), _MOST_COLUMNS - 2)
    kept = [0, *(stretch[away[stretch].argmax()] for stretch in stretches), len(steps) - 1]
    return steps[kept], values[:, kept]


def share_limits(maps: list[HeatMap]) -> list[HeatMap]:
    """The same maps, all with one scale of colour."""
    extents = [found for each in maps if (found := each.extent())]
    if not extents:
        return maps
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    if maps[0].log:
        low = max(low, high * 10.0**-_DECADES)
    return [replace(each, limits=(low, high)) for each in maps]
