"""Made-up results of studies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sdd.errors import Interrupted
from sdd.lab import engine, results
from sdd.lab.grid import timing
from sdd.lab.grid.job import Job, State
from sdd.lab.results import RunResult, config_hash, portable
from sdd.train import RunConfig, config_io

INITIAL, FREQUENCIES = 8.3, 6.7
SECONDS_A_STEP = 0.5
#: The final held-out loss of a run; nan diverges.
LossOf = Callable[[RunConfig], float]


def made_result(name: str, config: RunConfig, loss: float, data: str = "text") -> RunResult:
    """The result of a run whose loss falls as 1 / tokens."""
    ended = not math.isnan(loss)
    tokens = [float(config.tokens_per_step * config.steps * part / 10) for part in range(1, 11)]
    losses = [INITIAL - (INITIAL - loss) * (11 - 10 / (10 * at / tokens[-1])) / 10 for at in tokens] if ended else []
    return RunResult(
        name=name,
        config_hash=config_hash(config),
        config=config_io.to_dict(portable(config)),
        data=data,
        status="done" if ended else "did not converge",
        reason="" if ended else "step 9: loss nan",
        step=config.steps,
        tokens=int(tokens[-1]),
        seconds=60.0 + config.seed,
        parameters=1_000_000,
        initial_loss=INITIAL,
        eval_loss=loss,
        bits_per_byte=0.3657 * loss,
        tuning_loss=loss + 0.01,
        token_frequencies=FREQUENCIES,
        curve={
            "tokens": tokens[: len(losses)],
            "seconds": [at / 1e3 for at in tokens[: len(losses)]],
            "eval_loss": losses,
        },
        training={"tokens": tokens[: len(losses)], "loss": losses, "grad_norm": [1.0] * len(losses)},
        environment={"sdd": "0", "torch": "2", "device": "cpu"},
    )


@dataclass
class FakeLab:
    """Takes the place of training: remembers what was run, and says what came out.

    Attributes:
        loss_of: the final loss of a run.
        finished: run directories, as it were; they outlive an interruption.
        started: every run, in order, each as often as it was run.
        interrupt_after: so many more runs; None for never.
        crash: names of runs that end without a result.
        measured_of: what a study measures of a run beside its losses.
    """

    loss_of: LossOf
    finished: dict[str, RunConfig] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    interrupt_after: int | None = None
    crash: set[str] = field(default_factory=set)
    measured_of: Callable[[RunConfig], dict[str, Any]] = lambda _: {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeLab":
        """Let studies run here."""
        lab = self

        class Grid:
            threads = workers = 1

            def __init__(
                self, runs: Sequence[tuple[str, RunConfig]], out: Path, workers: int | None = None, stack: int = 1
            ) -> None:
                self.jobs = [Job(name, config, lab.ended(name, config)) for name, config in runs]

            @property
            def waiting(self) -> list[Job]:
                return [job for job in self.jobs if job.name not in lab.finished]

            def path(self, name: str) -> Path:
                return Path(name)

            def run(self) -> None:
                for job in self.jobs:
                    job.state = lab.train(job)

        def harvest(run: Path, _held_out: Any, measure: Any) -> RunResult:
            config = lab.finished[run.name]
            found = made_result(run.name, config, lab.loss_of(config))
            return replace(found, measured=lab.measured_of(config) if measure else {})

        class HeldOut:
            source = None

            def __init__(self, config: RunConfig) -> None:
                pass

        monkeypatch.setattr(engine, "Grid", Grid)
        monkeypatch.setattr(engine, "HeldOut", HeldOut)
        monkeypatch.setattr(timing, "step_seconds", lambda config, _: SECONDS_A_STEP)
        monkeypatch.setattr(engine, "grid_seconds", lambda configs, *_: 60.0 * len(configs))
        monkeypatch.setattr(results, "harvest", harvest)
        return self

    def ended(self, name: str, config: RunConfig) -> State:
        """Where a run stands before anything is run."""
        if name not in self.finished:
            return "waiting"
        return "failed" if math.isnan(self.loss_of(config)) else "done"

    def train(self, job: Job) -> State:
        """Where a run ends."""
        if job.name not in self.finished:
            if self.interrupt_after == 0:
                raise Interrupted("interrupted")
            if self.interrupt_after is not None:
                self.interrupt_after -= 1
            self.started.append(job.name)
            if job.name in self.crash:
                job.detail = "no space left"
                return "crashed"
            self.finished[job.name] = job.config
        return self.ended(job.name, job.config)


def wobble(config: RunConfig) -> float:
    """The effect of a seed on the loss, the same for every method."""
    return 0.05 * math.sin(1 + config.seed)
