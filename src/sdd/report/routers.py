"""How routers of runs spread tokens over experts: what metrics.jsonl says, and the maps of it; numbers only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sdd.files import number
from sdd.probing.alarms import Kind
from sdd.report.heat import HeatMap, share_limits, thinned

if TYPE_CHECKING:
    from sdd.report.runs import Run

#: Columns of metrics.jsonl, one number a step.
COLUMNS = ("router_entropy", "worst_load", "dead_experts", "balance_loss", "router_z_loss")
_BY_LAYER = ("entropy", "worst_load", "dead_experts")
#: Evaluations whose loads are shown: the last and so many before it.
_EARLIER_LOADS = 5


@dataclass(frozen=True)
class RoutingHistory:
    """The routing of a run of mixtures of experts.

    Attributes:
        steps: int `[S]`.
        columns: by name, float64 `[S]`; see `COLUMNS`.
        layers: entropy, worst_load and dead_experts, float64 `[S, L]` each.
        load_steps: the steps of the evaluations that have loads.
        loads: for each of them tokens of each expert over the mean, float64 `[L, E]`.
    """

    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    layers: Mapping[str, np.ndarray]
    load_steps: tuple[int, ...]
    loads: tuple[np.ndarray, ...]


def routing_history(rows: Sequence[Mapping[str, Any]]) -> RoutingHistory | None:
    """The routing in the rows of a metrics.jsonl; None if no step has any.

    Rows that do not fit the first one's number of layers are passed over.
    """
    routed = [(row, layers) for row in rows if (layers := _layers(row)) is not None]
    routed = [(row, layers) for row, layers in routed if layers.shape == routed[0][1].shape]
    if not routed:
        return None
    loads = [(int(row["step"]), load) for row in rows if (load := _load(row)) is not None]
    loads = [(step, load) for step, load in loads if load.shape == loads[-1][1].shape]
    by_layer = np.stack([layers for _, layers in routed])
    return RoutingHistory(
        steps=np.array([int(row["step"]) for row, _ in routed]),
        columns={name: np.array([number(row.get(name)) for row, _ in routed]) for name in COLUMNS},
        layers={name: by_layer[:, index] for index, name in enumerate(_BY_LAYER)},
        load_steps=tuple(step for step, _ in loads),
        loads=tuple(load for _, load in loads),
    )


def _layers(row: Mapping[str, Any]) -> np.ndarray | None:
    """float64 `[3, L]`."""
    routing = row.get("routing")
    return _matrix([routing.get(name) for name in _BY_LAYER]) if isinstance(routing, dict) and _counts(row) else None


def _load(row: Mapping[str, Any]) -> np.ndarray | None:
    """float64 `[L, E]`."""
    return _matrix(row.get("expert_load")) if _counts(row) else None


def _counts(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("step"), int)


def _matrix(rows: Any) -> np.ndarray | None:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        return None
    if len({len(row) for row in rows}) > 1:
        return None
    return np.array([[number(value) for value in row] for row in rows])


@dataclass(frozen=True)
class _Kind:
    """A map of layers over steps."""

    name: str
    column: str
    title: str
    unit: str
    kinds: tuple[Kind, ...] = ()


_OVER_STEPS = (
    _Kind("router-entropy", "entropy", "Router entropy", "nats", ("saturated router",)),
    _Kind("worst-load", "worst_load", "Busiest expert", "tokens / mean"),
    _Kind("dead-experts", "dead_experts", "Experts without tokens", "experts", ("dead experts",)),
)


def routing_maps(runs: Sequence["Run"]) -> list[list[HeatMap]]:
    """Entropy, worst load and dead experts by block and step, of the runs that have experts, with one scale each."""
    found = [run for run in runs if run.routing]
    return [share_limits([_over_steps(run, kind) for run in found]) for kind in _OVER_STEPS if found]


def latest_loads(runs: Sequence["Run"]) -> list[HeatMap]:
    """The load by expert and block at the last evaluation of each run that has experts, with one scale."""
    last = [(run.name, run.routing) for run in runs if run.routing and run.routing.loads]
    steps = {routing.load_steps[-1] for _, routing in last}
    title = f"Load at step {steps.pop():,}" if len(steps) == 1 else "Load at the last evaluation"
    return share_limits([_load_map(name, routing, -1, "expert-load", title) for name, routing in last])


def earlier_loads(runs: Sequence["Run"]) -> list[list[HeatMap]]:
    """The same at up to five earlier evaluations, the first of them first; evenly spread, where there are more."""
    found = [(run.name, run.routing) for run in runs if run.routing]
    steps = sorted({step for _, routing in found for step in routing.load_steps[:-1]})
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _EARLIER_LOADS)).round().astype(int))
    groups: list[list[HeatMap]] = []
    for step in (steps[place] for place in chosen):
        there = [each for each in found if step in each[1].load_steps]
        name, title = f"expert-load-{step}", f"Load at step {step:,}"
        maps = [_load_map(run, routing, routing.load_steps.index(step), name, title) for run, routing in there]
        groups.append(share_limits(maps))
    return groups


def _over_steps(run: "Run", kind: _Kind) -> HeatMap:
    assert run.routing is not None
    steps, values = thinned(run.routing.steps, run.routing.layers[kind.column].T)
    rows = tuple(map(str, range(len(values))))
    whole = HeatMap(kind.name, kind.title, kind.unit, run.name, steps, rows, values, log=False, across="step")
    return replace(whole, marks=whole.marks_of(run.alarms, kind.kinds))


def _load_map(run: str, routing: RoutingHistory, place: int, name: str, title: str) -> HeatMap:
    """Experts without a token get a colour of their own."""
    load = routing.loads[place]
    values, rows = np.where(load > 0, load, math.nan), tuple(map(str, range(len(load))))
    columns = np.arange(load.shape[1])
    return HeatMap(
        name, title, "tokens / mean", run, columns, rows, values, log=False, across="expert", missing="without tokens"
    )
