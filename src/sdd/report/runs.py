"""Run directories read back, whatever state they are in: everything drawn is drawn from these."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdd.errors import UserError
from sdd.files import number
from sdd.files import read_json_lines
from sdd.probing import ProbeHistory, history
from sdd.probing.alarms import Alarm, judge
from sdd.report.routers import RoutingHistory, routing_history
from sdd.train import config_io

#: A run "did not converge" if it became non-finite, or ended by this share above its own lowest held-out loss, or not
#: by this share below the loss of its first step.
CONVERGENCE_SHARE = 0.1

Status = Literal["done", "did not converge", "failed", "interrupted", "unfinished"]
_STEP_FIELDS = ("step", "tokens", "loss", "grad_norm", "lr", "seconds")
_EVAL_FIELDS = ("step", "eval_loss", "eval_bits_per_byte")


@dataclass(frozen=True)
class Run:
    """What the files of a run directory say. Files that are missing leave their part empty.

    Attributes:
        path: the directory.
        name: what tables and figures call it.
        config: config.json with dotted names, the placement left whole.
        environment: environment.json.
        result: result.json, empty if the run has not ended (or went on after it was written).
        steps: columns of metrics.jsonl, one entry a step: step, tokens, loss, grad_norm, lr, seconds.
        evals: the same for evaluations: step, tokens, eval_loss, eval_bits_per_byte.
        samples: rows of samples.jsonl.
        events: the rows of metrics.jsonl that tell what the guard did.
        probe: probe.jsonl, None if there is none.
        routing: of mixtures of experts, None for a dense model.
        alarms: what went wrong, the earliest first.
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
    routing: RoutingHistory | None = None
    alarms: list[Alarm] = field(default_factory=list)

    @property
    def placement(self) -> str:
        """The placement's name."""
        value = self.config.get("model.placement")
        name = value.get("name") if isinstance(value, dict) else value
        return str(name or "own placement")

    @property
    def step(self) -> int:
        """Steps done."""
        return int(_last(self.steps["step"], 0))

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return int(_last(self.steps["tokens"], 0))

    @property
    def seconds(self) -> float:
        """Seconds in training steps."""
        return _last(self.steps["seconds"], math.nan)

    @property
    def eval_loss(self) -> float:
        """The last held-out loss in nats a token, nan if there is none."""
        return _last(self.evals["eval_loss"], math.nan)

    @property
    def bits_per_byte(self) -> float:
        """The last held-out bits per byte, nan if there is none or the tokens' lengths are unknown."""
        return _last(self.evals["eval_bits_per_byte"], math.nan)

    @property
    def status(self) -> Status:
        """How the run ended; see `CONVERGENCE_SHARE` for "did not converge"."""
        match self.result.get("status"):
            case "failed":
                return "did not converge" if self.result.get("cause") == "diverged" else "failed"
            case "interrupted":
                return "interrupted"
            case "done":
                return "did not converge" if self._unconverged() else "done"
            case _:
                return "unfinished"

    @property
    def reason(self) -> str:
        """Why it has that status, empty for "done"."""
        match self.status:
            case "done":
                return ""
            case "interrupted" | "unfinished":
                planned = self.config.get("steps")
                where = f"at step {self.step} of {planned}"
                return where if self.status == "interrupted" else f"running, or killed, {where}"
            case _:
                return str(self.result.get("reason") or self._unconverged())

    def _unconverged(self) -> str:
        """Why a run that reached its end did not converge; empty if it did."""
        last, first = self.eval_loss, self.steps["loss"][:1]
        if not math.isfinite(last):
            return "the last held-out loss is not finite"
        best = np.nanmin(self.evals["eval_loss"])
        if last > (1 + CONVERGENCE_SHARE) * best:
            return f"ended at a held-out loss of {last:.3f}, after {best:.3f}"
        if len(first) and last > (1 - CONVERGENCE_SHARE) * first[0]:
            return f"ended at a held-out loss of {last:.3f}, begun at {first[0]:.3f}"
        return ""


def load_run(path: Path, name: str | None = None) -> Run:
    """Read a run directory.

    Raises:
        UserError: if it is none, i.e. holds no readable config.json.
    """
    if not (path / "config.json").is_file():
        what = "holds no config.json" if path.is_dir() else "is no directory"
        raise UserError(f"{path} is no run: it {what}; runs are made by sdd train PRESET --out RUN")
    config = _read_object(path / "config.json")
    if not config:
        raise UserError(f"{path} is no run: its config.json is not a JSON object")
    rows = _rows(path / "metrics.jsonl")
    probed = _probe_rows(path / "probe.jsonl")
    settings = config_io.flatten(config)
    steps = _columns([row for row in rows if "loss" in row], _STEP_FIELDS)
    evals = _columns([row for row in rows if "eval_loss" in row], _EVAL_FIELDS)
    evals["tokens"] = np.interp(evals["step"], steps["step"], steps["tokens"]) if len(steps["step"]) else evals["step"]
    result = _read_object(path / "result.json")
    if result.get("step") != _last(steps["step"], 0):  # written before the run went on
        result = {}
    return Run(
        path=path,
        name=name or path.resolve().name,
        config=settings,
        environment=_read_object(path / "environment.json"),
        result=result,
        steps=steps,
        evals=evals,
        samples=_rows(path / "samples.jsonl"),
        events=[row for row in rows if "event" in row],
        probe=history(probed) if probed else None,
        routing=routing_history(rows),
        alarms=judge(probed, [row for row in rows if isinstance(row.get("step"), int)], settings),
    )


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """Several runs, each named by as much of the end of its path as tells it from the others.

    Raises:
        UserError: if one is no run, or named twice.
    """
    paths = list(paths)
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"the run {path} is named twice")
    return [load_run(path, _short_name(full, resolved)) for path, full in zip(paths, resolved, strict=True)]


def _short_name(path: Path, others: Sequence[Path]) -> str:
    for count in range(1, len(path.parts) + 1):
        tail = path.parts[-count:]
        if sum(other.parts[-count:] == tail for other in others) == 1:
            return "/".join(tail)
    return str(path)


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, as after a kill."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _rows(file: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(file)) if file.is_file() else []


def _probe_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a probe.jsonl by ascending steps; of a step that stands twice, the last."""
    rows = {
        row["step"]: row
        for row in _rows(file)
        if isinstance(row.get("step"), int) and all(isinstance(row.get(part), dict) for part in ("sites", "layers"))
    }
    return [rows[step] for step in sorted(rows)]


def _columns(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.array([number(row.get(name)) for row in rows]) for name in names}


def _last(column: np.ndarray, default: float) -> float:
    return float(column[-1]) if len(column) and not math.isnan(column[-1]) else default
