"""Heat maps of runs: probed statistics by block or site over steps, and the routers of mixtures of experts.

Numbers only; `sdd.draw.maps` draws them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdd.draw.panel import HeatMap, share_scale
from sdd.probing.alarms import Kind
from sdd.probing.checks import EPS_SHARE, LOGIT_MAX, UPDATE_RATIO, layer_of
from sdd.report.runs import RunHistory

_MOST_COLUMNS = 240
#: Evaluations before the last whose loads are shown.
_EARLIER_LOADS = 5

#: The steps `[S]`, the names of R rows, and their values `[R, S]`; no names where a run lacks the statistic.
_Values = tuple[np.ndarray, Sequence[str], np.ndarray]
_NONE: _Values = (np.empty(0), (), np.empty((0, 0)))


def _stream(run: RunHistory, stat: str) -> _Values:
    """A statistic of the residual stream: at the input, and after each block."""
    if run.probe is None or stat not in run.probe.layers:
        return _NONE
    values = run.probe.layers[stat].T
    n_blocks = run.probe.layers.get("rms", values.T).shape[1] - 1
    names = ["in", *map(str, range(n_blocks))]
    return run.probe.steps, names[len(names) - len(values) :], values


def _blocks(run: RunHistory, stat: str, reduce: Callable[..., np.ndarray] = np.max) -> _Values:
    """A statistic reduced over the sites in each block; a nan of one site makes the block's value nan, to show it."""
    if run.probe is None:
        return _NONE
    blocks: dict[int, list[np.ndarray]] = {}
    for site in run.probe.has(stat):
        if (layer := layer_of(site)) is not None:
            blocks.setdefault(layer, []).append(run.probe.series(site, stat))
    with np.errstate(invalid="ignore"):
        values = [reduce(blocks[layer], axis=0) for layer in sorted(blocks)]
    return run.probe.steps, [*map(str, sorted(blocks))], np.array(values)


def _sites(run: RunHistory, stat: str) -> _Values:
    if run.probe is None:
        return _NONE
    sites = run.probe.has(stat)
    return run.probe.steps, sites, np.array([run.probe.series(site, stat) for site in sites])


def _routers(run: RunHistory, column: str) -> _Values:
    if run.routers is None:
        return _NONE
    values = run.routers.layers[column].T
    return run.routers.steps, [*map(str, range(len(values)))], values


@dataclass(frozen=True)
class _Map:
    """A kind of map: `read(run, stat)` gives its values, `alarms` are the kinds of alarms that it marks."""

    name: str
    title: str
    unit: str
    read: Callable[[RunHistory, str], _Values]
    stat: str
    alarms: tuple[Kind, ...] = ()
    log: bool = True
    threshold: float | None = None
    across: str = "probed step"

    def of(self, run: RunHistory) -> HeatMap | None:
        """The map of a run; None if the run lacks the statistic."""
        steps, names, values = self.read(run, self.stat)
        if not len(names):
            return None
        steps, values = thinned(steps, values)
        marks = tuple(
            (names.index(str(alarm.layer)), int(np.abs(steps - alarm.since_step).argmin()))
            for alarm in run.alarms
            if alarm.kind in self.alarms and str(alarm.layer) in names
        )
        about = self.name, self.title, self.unit, run.name
        return HeatMap(*about, steps, tuple(names), values, self.log, self.threshold, marks, across=self.across)


_FLOW: tuple[Kind, ...] = ("fading gradients", "exploding gradients")
_TURN: tuple[Kind, ...] = ("large updates", "stuck weights")
_ATTENTION: tuple[Kind, ...] = ("attention logits",)
_MEDIAN, _SMALLEST = partial(_blocks, reduce=np.median), partial(_blocks, reduce=np.min)
_BLOCK_MAPS = (
    _Map("stream", "Residual stream", "rms", _stream, "rms"),
    _Map("stream-grad", "Gradient of the residual stream", "rms", _stream, "grad_rms", _FLOW),
    _Map("outputs", "Outputs", "largest rms in the block", _blocks, "rms", ("non-finite",)),
    _Map("weight-grads", "Gradients of the matrices", "median rms in the block", _MEDIAN, "weight_grad_rms"),
    _Map("updates", "Updates", "largest ||dW|| / ||W||", _blocks, "update_ratio", _TURN, threshold=UPDATE_RATIO),
    _Map("logits", "Attention logits", "largest logit", _blocks, "logit_max", _ATTENTION, threshold=LOGIT_MAX),
    _Map("entropy", "Attention entropy", "mean, nats", _SMALLEST, "entropy", _ATTENTION, log=False),
    _Map("eps", "Share of eps", "largest eps / mean square", _blocks, "eps_ratio", ("eps",), threshold=EPS_SHARE),
)
_SITE_MAPS = (
    _Map("site-outputs", "Outputs, site by site", "rms", _sites, "rms"),
    _Map("site-grads", "Gradients of outputs, site by site", "rms", _sites, "grad_rms"),
    _Map("site-updates", "Updates, site by site", "||dW|| / ||W||", _sites, "update_ratio"),
)
_of_routers = partial(_Map, read=_routers, log=False, across="step")
_ROUTER_MAPS = (
    _of_routers("router-entropy", "Router entropy", "nats", stat="entropy", alarms=("saturated router",)),
    _of_routers("worst-load", "Busiest expert", "tokens / mean", stat="worst_load"),
    _of_routers("dead-experts", "Experts without tokens", "experts", stat="dead_experts", alarms=("dead experts",)),
)


def block_maps(runs: Sequence[RunHistory]) -> list[list[HeatMap]]:
    """For each statistic by block, return the maps of the runs that have it, with one scale of colour."""
    return _maps(_BLOCK_MAPS, runs)


def site_maps(runs: Sequence[RunHistory]) -> list[list[HeatMap]]:
    """Return the same with a row for each site, in the model's order."""
    return _maps(_SITE_MAPS, runs)


def router_maps(runs: Sequence[RunHistory]) -> list[list[HeatMap]]:
    """Return entropy, worst load and dead experts by block and step, of the runs that have experts."""
    return _maps(_ROUTER_MAPS, runs)


def latest_loads(runs: Sequence[RunHistory]) -> list[HeatMap]:
    """Return the load by expert and block at the last evaluation of each run that has experts, with one scale."""
    last = [(run, max(run.routers.loads)) for run in runs if run.routers and run.routers.loads]
    steps = {step for _, step in last}
    title = f"Load at step {steps.pop():,}" if len(steps) == 1 else "Load at the last evaluation"
    return share_scale([_load_map(run, step, "expert-load", title) for run, step in last])


def earlier_loads(runs: Sequence[RunHistory]) -> list[list[HeatMap]]:
    """Return the loads at up to five earlier evaluations, in order and evenly spread over all of them."""
    loads = [(run, run.routers.loads) for run in runs if run.routers]
    steps = sorted({step for _, by_step in loads for step in sorted(by_step)[:-1]})
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _EARLIER_LOADS)).round().astype(int))
    found: list[list[HeatMap]] = []
    for step in (steps[place] for place in chosen):
        there = [run for run, by_step in loads if step in by_step]
        found.append(
            share_scale([_load_map(run, step, f"expert-load-{step}", f"Load at step {step:,}") for run in there])
        )
    return found


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most 240 columns: the first, the last, and of each stretch between the one farthest from the median."""
    if len(steps) <= _MOST_COLUMNS:
        return steps, values
    with np.errstate(all="ignore"):
        logs = np.nan_to_num(np.log(np.abs(values)), nan=1e3, posinf=1e3, neginf=-1e3)
    away = np.abs(logs - np.median(logs, axis=1, keepdims=True)).max(0)
    stretches = np.array_split(np.arange(1, len(steps) - 1), _MOST_COLUMNS - 2)
    kept = [0, *(stretch[away[stretch].argmax()] for stretch in stretches), len(steps) - 1]
    return steps[kept], values[:, kept]


def _maps(kinds: Sequence[_Map], runs: Sequence[RunHistory]) -> list[list[HeatMap]]:
    groups = [[drawn for run in runs if (drawn := kind.of(run))] for kind in kinds]
    return [share_scale(group) for group in groups if group]


def _load_map(run: RunHistory, step: int, name: str, title: str) -> HeatMap:
    """The load by expert and block; experts without a token get the colour of missing values."""
    assert run.routers is not None
    load = run.routers.loads[step]
    values, rows = np.where(load > 0, load, math.nan), tuple(map(str, range(len(load))))
    about = name, title, "tokens / mean", run.name
    experts = np.arange(load.shape[1])
    return HeatMap(*about, experts, rows, values, log=False, across="expert", missing="without tokens")
