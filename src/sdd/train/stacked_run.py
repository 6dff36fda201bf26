"""The training loop of a stack: each run keeps its directory, its guard and its end, as if it had trained alone."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdd.errors import Interrupted, UserError
from sdd.terminal import SECONDS_BETWEEN_LINES, Interval, clock, stderr_console
from sdd.train import config_io, starting
from sdd.train.config import RunConfig, resolve
from sdd.train.evaluate import Evaluation
from sdd.train.parallel import StopSignals
from sdd.train.recovery import LARGEST_WEIGHT, Problem
from sdd.train.run_dir import RunDir
from sdd.train.schedule import learning_rate
from sdd.train.stacked import Stack, shape_of, why_alone
from sdd.train.trainer import CHECK_EVERY, Trainer, due

#: A stack saves when so many seconds of training could be lost, not by steps: it is a minute's work on a GPU.
_SECONDS_BETWEEN_SAVES = 300.0


def open_run(config: RunConfig, out: Path) -> Trainer:
    """The trainer of a new run in `out`, or of the run that was interrupted there, to be trained in a stack.

    Raises:
        UserError: if the run cannot be part of a stack, or as `sdd.train.trainer.start` and `reopen` do.
    """
    if reason := why_alone(config):
        raise UserError(f"{out} cannot be trained in a stack, because it {reason}: train it by itself")
    run_dir = RunDir(out)
    if run_dir.config.exists() and (run_dir.path / "metrics.jsonl").exists():
        starting.lock_existing(run_dir)
        trainer = Trainer(config_io.load(run_dir.config), run_dir)
        trainer.resume_newest()
        return trainer
    config = starting.fit_vocabulary(config, resolve(config))
    trainer = Trainer(config, run_dir)
    starting.claim(run_dir, trainer.config)
    return trainer


@dataclass
class Member:
    """One run of a stack.

    Attributes:
        trainer: its parts; its weights are those of the stack's row only after `Stack.give_back`.
        rows: of metrics.jsonl, not yet written.
        ended: whether it has diverged.
        loss: of the last step.
    """

    trainer: Trainer
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    loss: float = math.nan

    def take(self, loss: float, norm: float, seconds: float) -> None:
        """Judge the next step and record it; `seconds` is this run's share of the time."""
        trainer, self.loss = self.trainer, loss
        problem = trainer.guard.judge(loss, norm)
        decision = trainer.guard.decide(problem)
        if problem is not None:
            self.write()
            trainer.note_or_skip(decision, problem)
        trainer.seconds += seconds
        trainer.step += 1
        config = trainer.config
        row = {
            "step": trainer.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": learning_rate(config.optim, trainer.step, config.steps),
            "tokens": trainer.step * config.tokens_per_step,
            "seconds": trainer.seconds,
            "time": time.time(),
            "tokens_per_second": config.tokens_per_step / seconds,
        }
        self.rows.append(row)
        if decision.action == "take":
            trainer.guard.taken(trainer.step - 1, loss, norm)
        else:
            self.diverged(decision.reason)

    def check(self, largest: float) -> None:
        """End the run if a weight is damaged."""
        if not largest <= LARGEST_WEIGHT:
            what = f"a weight of {largest:.3g} (sound ones are below {LARGEST_WEIGHT:g})"
            decision = self.trainer.guard.decide(None, Problem("damaged weights", what))
            self.diverged(decision.reason)

    def diverged(self, reason: str) -> None:
        """Write the result of a run that has diverged; the stack goes on without reading its row."""
        self.ended = True
        self.write()
        self.trainer.save_result("failed", cause="diverged", reason=f"step {self.trainer.step}: {reason}")

    def write(self) -> None:
        """Append the rows to metrics.jsonl."""
        self.trainer.run_dir.append_all("metrics.jsonl", self.rows)
        self.rows.clear()


@dataclass(frozen=True)
class Chunk:
    """Steps that were launched; their numbers come to the host while the next ones run.

    Attributes:
        found: `[K, 2, R]`, loss and gradient norm, on the host once `arrived`.
        largest: `[R]`, each run's largest weight after the last of the steps.
        arrived: waits for them.
    """

    found: Tensor
    largest: Tensor
    arrived: Callable[[], Any]


class StackedRun:
    """Trains runs of one shape together, from the step at which all of them stand.

    Args:
        trainers: of runs that `open_run` opened.

    Raises:
        UserError: if the runs differ in more than a stack allows.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.members = [Member(trainer) for trainer in trainers]
        first = trainers[0]
        self.step, self.steps, self._every = first.step, first.config.steps, first.config.eval_every
        for trainer in trainers[1:]:
            if shape_of(trainer.config) != shape_of(first.config) or trainer.step != first.step:
                self._unlock()
                raise UserError(
                    f"{trainer.run_dir.path} and {first.run_dir.path} cannot be one stack: they differ in more than "
                    "seed, initial draw, schedule and decays, or stand at different steps"
                )
        self.stack = Stack(trainers)
        self._signals = StopSignals()
        self._console = stderr_console()
        self._clock = time.perf_counter()

    def run(self, extra: dict[str, Tensor] | None = None) -> None:
        """Train to the last step. Every run then has its files and a result.json.

        Args:
            extra: windows of held-out text by name, int64 `[n, T + 1]`; the loss of each run on them at the end stands
                under that name in its result.json.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, with every run saved.
        """
        try:
            with self._signals:
                for member in self.members:
                    member.trainer.run_dir.write_json("environment.json", self._environment(member.trainer))
                self._train()
                self._conclude(extra or {})
        finally:
            self._unlock()

    def _unlock(self) -> None:
        for member in self.members:
            member.trainer.run_dir.unlock()

    def _environment(self, trainer: Trainer) -> dict[str, Any]:
        return {**trainer.environment(), "stack": len(self.members)}

    def _train(self) -> None:
        pending: Chunk | None = None
        began, start = time.monotonic(), self.step
        lines, saves = Interval(SECONDS_BETWEEN_LINES), Interval(_SECONDS_BETWEEN_SAVES)
        saves.due()
        self._clock = time.perf_counter()
        while self.step < self.steps and not all(member.ended for member in self.members):
            until = self._until()
            chunk = self._launch(until)
            self._settle(pending)
            pending, self.step = chunk, until
            stop, saving = self._signals.received, saves.due()
            evaluating = due(until, self._every)
            if until < self.steps and (stop or saving or evaluating):
                pending = self._settle(pending)
                if evaluating:
                    self._evaluate()
                if stop or saving:
                    self._save()
                if stop:
                    self._interrupt()
                self._clock = time.perf_counter()
            if lines.due():
                self._say(start, time.monotonic() - began)
        self._settle(pending)

    def _until(self) -> int:
        """The end of the next chunk: a check of the weights, an evaluation or the end of the runs."""
        ends = [self.steps, (self.step // CHECK_EVERY + 1) * CHECK_EVERY]
        if self._every:
            ends.append((self.step // self._every + 1) * self._every)
        return min(ends)

    def _launch(self, until: int) -> Chunk:
        found, largest = self.stack.advance(self.step, until), self.stack.largest()
        if self.stack.device.type != "cuda":
            return Chunk(found, largest, lambda: None)
        hosts = [torch.empty(one.shape, pin_memory=True).copy_(one, non_blocking=True) for one in (found, largest)]
        event = torch.cuda.Event()
        event.record()
        return Chunk(hosts[0], hosts[1], event.synchronize)

    def _settle(self, chunk: Chunk | None) -> None:
        """Let every run take in the numbers of its steps."""
        if chunk is None:
            return
        chunk.arrived()
        now = time.perf_counter()
        share = (now - self._clock) / len(chunk.found) / len(self.members)
        self._clock = now
        numbers, largest = chunk.found.tolist(), chunk.largest.tolist()
        for run, member in enumerate(self.members):
            for losses, norms in numbers:
                if not member.ended:
                    member.take(losses[run], norms[run], share)
            if not member.ended:
                member.check(largest[run])
            member.write()

    def _evaluate(self) -> list[Evaluation]:
        evaluations = self.stack.evaluate(self.members[0].trainer.eval_windows)
        for member, evaluation in zip(self.members, evaluations, strict=True):
            if not member.ended:
                member.rows.append({"step": self.step, **evaluation.row()})
                member.write()
        return evaluations

    def _save(self) -> None:
        for run, member in enumerate(self.members):
            if not member.ended:
                self.stack.give_back(run, self.step)
                member.trainer.save()

    def _interrupt(self) -> None:
        for member in self.members:
            if not member.ended:
                member.trainer.save_result("interrupted")
        raise Interrupted(f"interrupted at step {self.step}; every run of the stack is saved")

    def _conclude(self, extra: dict[str, Tensor]) -> None:
        """The last evaluation, checkpoint and result of every run that has not diverged."""
        if all(member.ended for member in self.members):
            return
        evaluations = self._evaluate()
        others = {name: self.stack.evaluate(windows) for name, windows in extra.items()}
        self._save()
        for run, member in enumerate(self.members):
            if not member.ended:
                losses = {name: found[run].loss for name, found in others.items()}
                member.trainer.save_result("done", **evaluations[run].row(), **losses)

    def _say(self, start: int, seconds: float) -> None:
        running = [member for member in self.members if not member.ended and member.trainer.step]
        losses = sorted(member.loss for member in running)
        shown = f"   loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
        rate = (self.step - start) * len(self.members) * self.members[0].trainer.config.tokens_per_step / seconds
        left = seconds / (self.step - start) * (self.steps - self.step)
        self._console.print(
            f"{len(running)} runs   step {self.step}/{self.steps}{shown}   {rate:,.0f} tokens/s   {clock(left)} left",
            markup=False,
        )
