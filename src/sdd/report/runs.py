"""Read run directories back, in whatever state they are. Everything on a page comes from these objects."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdd.errors import UserError
from sdd.files import number, read_json_lines, read_json_object
from sdd.probing import ProbeHistory, history
from sdd.probing.alarms import Alarm, judge
from sdd.train import config_io

#: A run "did not converge" if it became non-finite, or if its last held-out loss is more than this share above its own
#: lowest, or less than this share below the loss of its first step.
CONVERGENCE_SHARE = 0.1
#: Columns of metrics.jsonl about the routers of mixtures of experts, one number a step.
ROUTER_COLUMNS = ("router_entropy", "worst_load", "dead_experts", "balance_loss", "router_z_loss")

Status = Literal["done", "did not converge", "failed", "interrupted", "unfinished"]
_STEP_COLUMNS = ("step", "tokens", "loss", "grad_norm", "lr", "seconds")
_EVAL_COLUMNS = ("step", "eval_loss", "eval_bits_per_byte")
_BY_LAYER = ("entropy", "worst_load", "dead_experts")


@dataclass(frozen=True)
class RouterHistory:
    """The routers of a run of mixtures of experts.

    Attributes:
        steps: int `[S]`.
        columns: by name, float64 `[S]`; see `ROUTER_COLUMNS`.
        layers: entropy, worst_load and dead_experts, float64 `[S, L]` each.
        loads: by the step of the evaluation, ascending: tokens of each expert over the mean, float64 `[L, E]`.
    """

    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    layers: Mapping[str, np.ndarray]
    loads: Mapping[int, np.ndarray]


@dataclass(frozen=True)
class RunHistory:
    """The files of a run directory. A missing file leaves its attribute empty.

    Attributes:
        path: the directory.
        name: the run's name in tables and figures.
        config: config.json with dotted names, the placement left whole.
        environment: environment.json.
        result: result.json; empty if the run has not ended, or went on after the file was written.
        steps: columns of metrics.jsonl, one entry a step: step, tokens, loss, grad_norm, lr, seconds.
        evals: columns of the evaluations: step, tokens, eval_loss, eval_bits_per_byte.
        samples: rows of samples.jsonl.
        events: the rows of metrics.jsonl about actions of the guard.
        probe: probe.jsonl; None if there is none.
        routers: of mixtures of experts; None for a dense model.
        alarms: of the probe, the losses and the routers, the earliest first.
    """

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    steps: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    samples: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    probe: ProbeHistory | None = None
    routers: RouterHistory | None = None
    alarms: list[Alarm] = field(default_factory=list)

    @property
    def placement(self) -> str:
        """The placement's name."""
        value = self.config.get("model.placement")
        name = value.get("name") if isinstance(value, dict) else value
        return str(name or "own placement")

    @property
    def step(self) -> int:
        """The number of steps done."""
        return int(_last(self.steps["step"], 0))

    @property
    def tokens(self) -> int:
        """The number of tokens trained on."""
        return int(_last(self.steps["tokens"], 0))

    @property
    def seconds(self) -> float:
        """The time spent in training steps."""
        return _last(self.steps["seconds"])

    @property
    def eval_loss(self) -> float:
        """The last held-out loss in nats a token; nan without evaluations."""
        return _last(self.evals["eval_loss"])

    @property
    def bits_per_byte(self) -> float:
        """The last held-out bits per byte; nan without evaluations, or if the tokens' lengths are unknown."""
        return _last(self.evals["eval_bits_per_byte"])

    @property
    def status(self) -> Status:
        """How the run ended; see `CONVERGENCE_SHARE` for "did not converge"."""
        return self._outcome()[0]

    @property
    def reason(self) -> str:
        """Why the run has its status; empty for "done"."""
        return self._outcome()[1]

    def _outcome(self) -> tuple[Status, str]:
        where = f"at step {self.step} of {self.config.get('steps')}"
        match self.result.get("status"):
            case "failed":
                diverged = self.result.get("cause") == "diverged"
                reason = str(self.result.get("reason") or self._not_converged())
                return "did not converge" if diverged else "failed", reason
            case "done":
                reason = self._not_converged()
                return "did not converge" if reason else "done", reason
            case "interrupted":
                return "interrupted", where
            case _:
                return "unfinished", f"running, or killed, {where}"

    def _not_converged(self) -> str:
        """Why a run that reached its end did not converge; empty if it did."""
        last, first = self.eval_loss, self.steps["loss"][:1]
        if not math.isfinite(last):
            return "the last held-out loss is not finite"
        best = np.nanmin(self.evals["eval_loss"])
        if last > (1 + CONVERGENCE_SHARE) * best:
            return f"the held-out loss ended at {last:.3f}, after a lowest of {best:.3f}"
        if len(first) and last > (1 - CONVERGENCE_SHARE) * first[0]:
            return f"the held-out loss ended at {last:.3f}, the training loss began at {first[0]:.3f}"
        return ""


def load_run(path: Path, name: str | None = None) -> RunHistory:
    """Read a run directory.

    Raises:
        UserError: if it holds no readable config.json.
    """
    if not (path / "config.json").is_file():
        what = "holds no config.json" if path.is_dir() else "is no directory"
        raise UserError(f"{path} is no run: it {what}; runs are made by sdd train PRESET --out RUN")
    config = read_json_object(path / "config.json")
    if not config:
        raise UserError(f"{path} is no run: its config.json is not a JSON object")
    try:
        config_io.check_of_run(config)
    except UserError as error:
        raise UserError(f"{path}/config.json: {error}") from None
    rows, probed, settings = _rows(path / "metrics.jsonl"), _probed(path), config_io.flatten(config)
    steps = _columns([row for row in rows if "loss" in row], _STEP_COLUMNS)
    evals = _columns([row for row in rows if "eval_loss" in row], _EVAL_COLUMNS)
    evals["tokens"] = np.interp(evals["step"], steps["step"], steps["tokens"]) if len(steps["step"]) else evals["step"]
    result = read_json_object(path / "result.json")
    if result.get("step") != _last(steps["step"], 0):  # written before the run went on
        result = {}
    return RunHistory(
        path=path,
        name=name or path.resolve().name,
        config=settings,
        environment=read_json_object(path / "environment.json"),
        result=result,
        steps=steps,
        evals=evals,
        samples=_rows(path / "samples.jsonl"),
        events=[row for row in rows if "event" in row],
        probe=history(probed) if probed else None,
        routers=router_history(rows),
        alarms=judge(probed, [row for row in rows if isinstance(row.get("step"), int)], settings),
    )


def load_runs(paths: Iterable[Path]) -> list[RunHistory]:
    """Read several runs; each is named by the shortest end of its path that no other one has.

    Raises:
        UserError: if a path is no run, or is given twice.
    """
    paths = list(paths)
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"the run {path} is named twice")
    return [load_run(path, _short_name(full, resolved)) for path, full in zip(paths, resolved, strict=True)]


def router_history(rows: Sequence[Mapping[str, Any]]) -> RouterHistory | None:
    """Collect what the rows of a metrics.jsonl hold about routers; None if no step has any.

    Rows whose number of layers differs from the first one's are passed over; so are loads of another shape than the
    last ones.
    """
    steps = [row for row in rows if isinstance(row.get("step"), int)]
    found = [(row, routing) for row in steps if isinstance(routing := row.get("routing"), dict)]
    routed = [(row, _matrix([routing.get(name) for name in _BY_LAYER])) for row, routing in found]
    routed = [(row, layers) for row, layers in routed if layers is not None]
    routed = [(row, layers) for row, layers in routed if layers.shape == routed[0][1].shape]
    if not routed:
        return None
    loads = {row["step"]: load for row in steps if (load := _matrix(row.get("expert_load"))) is not None}
    by_layer = np.stack([layers for _, layers in routed])
    return RouterHistory(
        steps=np.array([row["step"] for row, _ in routed]),
        columns=_columns([row for row, _ in routed], ROUTER_COLUMNS),
        layers={name: by_layer[:, index] for index, name in enumerate(_BY_LAYER)},
        loads={step: load for step, load in loads.items() if load.shape == [*loads.values()][-1].shape},
    )


def _matrix(rows: Any) -> np.ndarray | None:
    """Turn a list of lists of numbers into an array; None unless all of them have the same length, one at least."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        return None
    return np.array([[number(value) for value in row] for row in rows]) if len({*map(len, rows)}) == 1 else None


def _short_name(path: Path, others: Sequence[Path]) -> str:
    for count in range(1, len(path.parts) + 1):
        tail = path.parts[-count:]
        if sum(other.parts[-count:] == tail for other in others) == 1:
            return "/".join(tail)
    return str(path)


def _rows(file: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(file)) if file.is_file() else []


def _probed(path: Path) -> list[dict[str, Any]]:
    """The rows of probe.jsonl by ascending steps; of a step that stands twice, the last."""
    rows = {
        row["step"]: row
        for row in _rows(path / "probe.jsonl")
        if isinstance(row.get("step"), int) and all(isinstance(row.get(part), dict) for part in ("sites", "layers"))
    }
    return [rows[step] for step in sorted(rows)]


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.array([number(row.get(name)) for row in rows]) for name in names}


def _last(column: np.ndarray, default: float = math.nan) -> float:
    return float(column[-1]) if len(column) and not math.isnan(column[-1]) else default
