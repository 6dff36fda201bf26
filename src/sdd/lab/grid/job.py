"""One run of a grid, and when a grid will be done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdd.files import read_json_object
from sdd.train import RunConfig

State = Literal["waiting", "running", "elsewhere", "done", "failed", "crashed", "interrupted"]
#: States of runs that have a result.
FINISHED: tuple[State, ...] = ("done", "failed")


@dataclass
class Job:
    """One run of a grid and its progress.

    Attributes:
        name: the run directory's name, unique in the grid.
        config: of the run.
        state: "done" and "failed" (diverged) are results; "crashed" is any other end, and the run is tried again;
            "elsewhere" means that another machine has the run.
        detail: why it failed or crashed.
        step: steps done.
        loss: the last training loss.
        eval_loss: the last held-out loss.
        bits_per_byte: the last held-out bits per byte.
        seconds: since the process started; of an ended run, the duration of the run.
    """

    name: str
    config: RunConfig
    state: State = "waiting"
    detail: str = ""
    step: int = 0
    loss: float | str | None = None
    eval_loss: float | str | None = None
    bits_per_byte: float | str | None = None
    seconds: float = 0.0
    _first_step: int = field(default=0, repr=False)

    @property
    def steps_per_second(self) -> float | None:
        """Steps of this session over its wall-clock time; None while most of that time is start-up."""
        done = self.step - self._first_step
        return done / self.seconds if 20 * done > self.config.steps and self.seconds > 0 else None


def diverged(run: Path) -> bool:
    """Whether a run ended because a loss, gradient or weight became non-finite or absurdly large; that is a result."""
    result = read_json_object(run / "result.json")
    return result.get("status") == "failed" and result.get("cause") == "diverged"


def time_left(jobs: Sequence[Job], workers: int) -> float | None:
    """Estimate the seconds until all jobs are done from the rates of those so far; None before there is a rate."""
    rates = [rate for job in jobs if (rate := job.steps_per_second)]
    if not rates:
        return None
    usual = sorted(rates)[len(rates) // 2]
    lanes = [0.0] * workers
    # Running jobs first, then each waiting one on the worker that is free first.
    for job in sorted(jobs, key=lambda job: job.state != "running"):
        if job.state in ("running", "waiting"):
            rate = job.steps_per_second or usual
            lanes[lanes.index(min(lanes))] += (job.config.steps - job.step) / rate
    elsewhere = [(job.config.steps - job.step) / usual for job in jobs if job.state == "elsewhere"]
    return max([*lanes, *elsewhere])
