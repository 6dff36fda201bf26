"""The log of a run: rows in its files, alarms, lines and a progress bar on the terminal, curves in a tracker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, TextColumn

from sdd.data import Loader
from sdd.models import count_parameters
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.probing.alarms import Alarms
from sdd.terminal import SECONDS_BETWEEN_LINES, Interval, clock, progress_bar, stderr_console
from sdd.train import config_io
from sdd.train.config import RunConfig
from sdd.train.run_dir import RunDir
from sdd.train.schedule import misfit
from sdd.train.trackers import FILE, TensorBoard, Tracker, open_tracker, tracked

_WEIGHT_RULES = {
    "unit": "rows and columns of the matrices are unit vectors after each step; they have no weight decay",
    "rows": "each row of the blocks' matrices keeps its length; they have no weight decay",
    "hyperball": "the blocks' matrices keep their norms, and lr is the share by which they move; no weight decay",
}


def opening(config: RunConfig, loader: Loader, data: str, place: str, step: int) -> Iterator[str]:
    """The first lines of a run: what is trained on what, where and how long.

    Args:
        config: the run.
        loader: its batches.
        data: the name of its data.
        place: precision, device and directory of the run.
        step: steps done.
    """
    model, count = config.model, count_parameters(config.model)
    yield (
        f"{model.placement.name or 'own placement'}: {model.n_layers} layers, d_model {model.d_model}, "
        f"{count.total:,} parameters ({count.scales:,} of them alphas and norms)"
    )
    if model.moe is not None:
        yield f"{model.moe.n_experts} experts, {model.moe.top_k} a token: {count.active:,} parameters active"
    epochs = config.steps * config.data.batch_size / loader.n_windows
    yield (
        f"{config.steps:,} steps of {config.data.batch_size} x {model.context} tokens of {data} ({epochs:.2g} epochs), "
        f"{place}"
    )
    yield from loader.describe(config.steps)
    if line := misfit(config):
        yield line
    if config.weight_rule != "free":
        yield _WEIGHT_RULES[config.weight_rule]
    if step:
        yield f"going on from step {step}"
    if config.chunked_loss and not HAS_CHUNKED_LOSS:
        yield f"torch {torch.__version__} has no chunked loss: the plain one is used"


class RunLog:
    """Writes the rows of a run, and shows step, loss, tokens/s and the time left.

    The numbers are a progress bar on a terminal and plain lines elsewhere, both on stderr, so that a command's answer
    can be piped.

    Args:
        config: the run.
        run_dir: its files; only the process that writes them shows anything.

    Attributes:
        alarms: judge the rows.
        tracker: the tracker that was asked for; None for the one that the run has.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        self._config, self._run_dir = config, run_dir
        self._console = stderr_console(quiet=not run_dir.writes)
        self._tracker: Tracker = TensorBoard()
        self.tracker: str | None = None
        self._begin(0)
        self.reset_alarms()

    def _begin(self, step: int) -> None:
        self._start, self._began, self._line = step, time.monotonic(), Interval(SECONDS_BETWEEN_LINES)
        self._bar = progress_bar(
            self._console, TextColumn("step"), MofNCompleteColumn(), quiet=not self._run_dir.writes
        )
        self._task = self._bar.add_task("train", total=self._config.steps, completed=step, numbers="")

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Show progress from `step` on, and give the rows to the run's tracker."""
        self._begin(step)
        if self._run_dir.writes:
            names = tracked(self._run_dir.path, self.tracker)
            if self.tracker is not None:
                self._run_dir.write_json(FILE, names)
            config = config_io.flatten(config_io.to_dict(self._config))
            self._tracker = open_tracker(self._run_dir.path, names, step, config, self.say)
        with self._bar, self._tracker:
            yield

    def reset_alarms(self) -> None:
        """Forget the rows so far, so that an alarm raised before can be raised again."""
        self.alarms = Alarms(config_io.flatten(config_io.to_dict(self._config)))

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False)

    def record(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl or probe.jsonl, and print the alarms that it raises."""
        self._run_dir.append(name, row)
        if self._run_dir.writes:
            for alarm in self.alarms.update(row):
                self.say(str(alarm))

    def record_numbers(self, row: dict[str, Any]) -> None:
        """Append a row of a step or an evaluation to metrics.jsonl and the tracker, and show that of a step."""
        self.record("metrics.jsonl", row)
        self._tracker.log(row)
        if "loss" in row:
            self._show(row["step"], row["loss"], row["tokens_per_second"])

    def _show(self, step: int, loss: float, tokens_per_second: float) -> None:
        numbers = f"loss {loss:.4f}   {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, numbers=numbers)
        last = self._config.steps
        if not self._console.is_terminal and (self._line.due() or step == last):
            left = (time.monotonic() - self._began) / max(step - self._start, 1) * (last - step)
            self.say(f"step {step}/{last}   {numbers}   {clock(left)} left")
