"""The training loop of a run: it takes the steps, writes the files, and carries out the guard's decisions."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdd.errors import BadData, Diverged, Interrupted, RunFailed, UserError
from sdd.files import read_json_object
from sdd.models import count_parameters
from sdd.train import compiling, config_io, precision, starting
from sdd.train.config import RunConfig, resolve
from sdd.train.evaluate import Evaluation, sample
from sdd.train.log import opening
from sdd.train.optim import clip_gradients, describe
from sdd.train.parallel import ALONE, StopSignals, World, pick_autocast, pick_device
from sdd.train.recovery import Decision, Problem, weight_problem
from sdd.train.resumable import Resumable
from sdd.train.run_dir import RunDir

#: Steps between checks of all weights. A check reads each weight once: a tenth of the bytes that an update moves.
CHECK_EVERY = 10


def start(config: RunConfig, out: Path, world: World = ALONE, *, fit: bool = False) -> "Trainer":
    """A trainer for a new run in `out`; if torchrun has restarted the job, for the run that it left there.

    Args:
        config: the run.
        out: the run directory.
        world: the processes that share the run.
        fit: enlarge the model's vocabulary to that of the data, if theirs is larger.

    Raises:
        UserError: if `out` holds a run already, or the config does not fit machine or data.
    """
    run_dir = RunDir(out, world.is_main)
    config = replace(config, data=config.data.absolute())
    # before the data are touched, which may take long to tokenise
    world.together(lambda: pick_autocast(config.precision, world.place(pick_device(config.device))))
    left = world.on_main(lambda: starting.is_of_job(run_dir, world))
    if not left:
        world.on_main(run_dir.check_free)
    if fit:
        config = starting.fit_vocabulary(config, world.in_turn(lambda: resolve(config)))
    if left and world.on_main(lambda: starting.holds(run_dir, config)):
        return reopen(out, world=world)
    world.on_main(run_dir.check_free)
    trainer, lines = _built(config, run_dir, world)
    world.on_main(lambda: starting.claim(run_dir, trainer.config))
    for line in filter(None, (*lines, precision.hint(config, trainer.device) if world.is_main else None)):
        trainer.log.say(line)
    return trainer


def _built(asked: RunConfig, run_dir: RunDir, world: World) -> tuple["Trainer", list[str]]:
    """The trainer of a new run, compiled where that was decided, and what to say about it."""
    config, line = compiling.decide(asked, world)
    lines = [line] if line else []
    trainer = Trainer(config, run_dir, world)
    if config.compile:
        trainer.log.say("compiling the model; nothing is written before that is done")
        reason = compiling.failure(trainer.warm_up, world)
        if reason and asked.compile is True:
            raise compiling.refusal(reason)
        if reason:
            del trainer
            trainer, lines = Trainer(replace(config, compile=False), run_dir, world), [f"not compiled: {reason}"]
    return trainer, lines


def reopen(
    out: Path, steps: int | None = None, world: World = ALONE, parallel: Mapping[str, Any] | None = None
) -> "Trainer":
    """A trainer that goes on with the run in `out` from its newest whole checkpoint.

    Args:
        out: the run directory.
        steps: a new length of the run; None keeps it.
        world: the processes that share the run; their number may differ from before.
        parallel: a new layout and `accumulate`, fields of the config by dotted name (`{"parallel.tensor": 2}`); the
            others stay.

    Raises:
        UserError: if there is no run, if all its checkpoints are damaged or none fits, or if it is complete.
    """
    run_dir = RunDir(out, world.is_main)
    world.on_main(lambda: starting.lock_existing(run_dir))
    try:
        config = world.together(lambda: config_io.load(run_dir.config))
        if steps is not None:
            config = replace(config, steps=steps)
        if parallel:
            config = world.together(lambda: starting.shared_anew(config, parallel))
        config, line = compiling.decide(config, world)
        trainer = Trainer(config, run_dir, world)
        trainer.resume_newest()
        result = read_json_object(out / "result.json")
        if trainer.step >= config.steps and (result.get("status"), result.get("step")) == ("done", trainer.step):
            raise UserError(f"{out} is complete at step {trainer.step}: give more with --steps N to go on")
        if line:
            trainer.log.say(line)
        if line or steps is not None or parallel:
            world.on_main(lambda: config_io.save(config, run_dir.config))
    except BaseException:
        run_dir.unlock()
        raise
    return trainer


class Trainer(Resumable):
    """One run: builds everything that `config` names, trains, and writes the files of the run directory.

    See `Resumable` for arguments and attributes.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, world: World = ALONE) -> None:
        super().__init__(config, run_dir, world)
        self._signals = StopSignals()

    # --- the whole run

    def run(self) -> dict[str, Any]:
        """Train to the last step, then let go of the run directory.

        Returns:
            The values of result.json.

        Raises:
            RunFailed: if the guard gives up, or a checkpoint cannot be written.
            Interrupted: after Ctrl-C or SIGTERM, with everything saved.
        """
        try:
            return self._run()
        except OSError as error:
            raise RunFailed(
                f"step {self.step}: cannot write {error.filename or self.run_dir.path}: {error.strerror}; the last "
                f"checkpoint is {self.newest()}; once that is mended: sdd resume {self.run_dir.path}"
            ) from None
        finally:
            self.settle()
            self.run_dir.unlock()

    def _run(self) -> dict[str, Any]:
        self.run_dir.write_json("environment.json", self.environment())
        with self._signals, self.log.open(self.step), self.probe:
            self._say_opening()
            try:
                evaluation = self._train()
            except RunFailed as error:
                reason = f"step {self.step}: {error}"
                cause = "diverged" if isinstance(error, Diverged) else "stopped"
                self.save_result("failed", cause=cause, reason=reason)
                if isinstance(error, BadData) and self.world.size == 1:  # of several, the others do not know of it
                    self.save()
                failure = type(error)(f"{reason}; the last checkpoint is {self.newest()}")
                failure.rank = error.rank
                raise failure from None
            if evaluation is None:
                self.save_result("interrupted")
                raise Interrupted(
                    f"interrupted at step {self.step} and saved; go on with: sdd resume {self.run_dir.path}"
                )
            self._put_sample()
        return self.save_result("done", **evaluation.row())

    def _train(self) -> Evaluation | None:
        """Take all steps that are left; None if a signal ended them."""
        evaluation = None
        while self.step < self.config.steps:
            if not self._take_step():
                continue
            last = self.step == self.config.steps
            stop = self.world.any(self._signals.received or self.saver.failed)
            if stop:
                self.saver.finish()  # raises what failed
            saving = last or stop or due(self.step, self.config.checkpoint_every)
            checking = saving or due(self.step, CHECK_EVERY)
            if checking and not self._follow(self.guard.decide(None, self._damage())):
                continue
            if last or due(self.step, self.config.eval_every):
                evaluation = self._log_evaluation()
            if saving:
                self.save() if last or stop else self.save_beside()
            if stop and not last:
                return None
        return evaluation or self.evaluate()

    # --- one step, and what the guard decides about it

    def _take_step(self) -> bool:
        """Compute the present step and do what the guard decides; return whether the step was taken."""
        began = time.perf_counter()
        with self.probe.step(self.optimizer, self.step + 1):
            loss, grad_norm = (value.item() for value in self.gradients(self.step))
            problem = self.guard.judge(loss, grad_norm)
            decision = self.guard.decide(problem, self._damage() if problem else None)
            if decision.action == "take":
                self.update()
            elif decision.action != "stop":  # the step that ends a run is recorded like any other
                self.probe.leave_out()
                self.optimizer.zero_grad()
        if problem is not None:
            self.note_or_skip(decision, problem)
        if decision.action == "take":
            self.guard.taken(self.step, loss, grad_norm)
        if decision.action in ("take", "stop"):
            self._log_step(loss, grad_norm, time.perf_counter() - began)
        return self._follow(decision)

    def _damage(self) -> Problem | None:
        """The problem of the weights, on all processes alike."""
        own = weight_problem(self.model.parameters())
        if not self.world.any(own is not None):
            return None
        return own or Problem("damaged weights", "a weight of another process is damaged")

    def _follow(self, decision: Decision) -> bool:
        """End the run or roll back, if the guard decided so.

        Returns:
            True if the step was taken.

        Raises:
            Diverged: if the run ends.
            RunFailed: if no checkpoint can be loaded.
        """
        if decision.action == "stop":
            raise Diverged(decision.reason)
        if decision.action == "roll back" and decision.problem:
            self._roll_back(decision.problem)
        return decision.action == "take"

    def note_or_skip(self, decision: Decision, problem: Problem) -> None:
        """Pass over the present batch if the guard decided so, or note that a spike was only observed."""
        batch = self.loader.batch_index(self.step)
        if decision.action == "take":
            self._note(self.step + 1, "observe", problem, "taken all the same", batch=batch)
        if decision.skips_batch:
            self._note(self.step + 1, "skip", problem, f"batch {batch} skipped", batch=batch)
            self.guard.skip(batch)
            self.loader.pass_over(self.guard.skipped)

    def _roll_back(self, problem: Problem) -> None:
        failed_at, found_bad = self.step, self.guard.skipped
        try:
            self.resume_newest()
        except UserError as error:
            raise RunFailed(f"{problem.what}; cannot roll back: {error}") from None
        self.guard.rolled_back(failed_at, () if problem.kind == "damaged weights" else found_bad)
        self.loader.pass_over(self.guard.skipped)
        self._note(failed_at + 1, "roll back", problem, f"back to step {self.step}", to=self.step)

    def _note(self, step: int, event: str, problem: Problem, outcome: str, **numbers: int) -> None:
        """Record an action of the guard on a step (from 1), and have the next step probed."""
        row = {"step": step, "event": event, "kind": problem.kind, "what": problem.what, **numbers}
        self.log.record("metrics.jsonl", {**row, "time": time.time()})
        if self.guard.note_event(step):
            self.probe.look()
        self.log.say(f"step {step}: {problem.kind}: {problem.what}; {outcome}")

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Take one optimiser step (from 0), whatever its loss. All processes call it together; see `gradients`."""
        found = self.gradients(step)
        self.update()
        return found

    def gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward and backward passes of one step (from 0). The gradients are clipped and not yet used.

        Returns:
            Loss (see `backward`) and global gradient norm before clipping, still on the device; the same on every
            process.
        """
        loss = self.backward(step)
        self.probe.gradients_ready()
        return loss, clip_gradients(self.model, self.config.optim.grad_clip)

    def _log_step(self, loss: float, grad_norm: float, seconds: float) -> None:
        """Count the present step, and write its row."""
        self.seconds += seconds
        self.step += 1
        row = {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": self.seconds,
            "time": time.time(),
            "tokens_per_second": self.config.tokens_per_step / seconds,
            **({} if self.objective is None else {"total_loss": self.objective.item()}),
            **(self.router_stats.row() if self.router_stats else {}),
        }
        self.log.record_numbers(row)

    def _log_evaluation(self) -> Evaluation:
        evaluation = self.evaluate()
        row = {"step": self.step, **evaluation.row(), **(self.router_stats.loads() if self.router_stats else {})}
        self.log.record_numbers(row)
        self.log.say(f"step {self.step}   held-out {evaluation}")
        return evaluation

    def _say_opening(self) -> None:
        spread = f"{self.device.type}; {self.world.shape}" if self.world.shape else self.device.type
        where = str(self.device) if self.world.size == 1 else f"{self.world.size} processes ({spread})"
        how = f"{self.precision}, compiled" if self.config.compile else self.precision
        place = f"{how} on {where}, into {self.run_dir.path}"
        for line in (
            *opening(self.config, self.loader, self.data.name, place, self.step),
            *describe(self.optimizer),
        ):
            self.log.say(line)

    def _put_sample(self) -> None:
        tokenizer = self.data.tokenizer
        if self.config.sample_tokens and tokenizer is not None:
            text = sample(self.model, self.config, tokenizer, self.eval_windows, self.autocast_dtype)
            self.run_dir.put("samples.jsonl", {"step": self.step, **text})

    def save_result(self, status: str, **values: Any) -> dict[str, Any]:
        """Write result.json, and return its values."""
        result = {
            "status": status,
            "placement": self.config.model.placement.name,
            "step": self.step,
            "steps": self.config.steps,
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": self.seconds,
            "parameters": count_parameters(self.config.model).total,
            "skipped_batches": self.guard.skipped,
            **values,
        }
        self.run_dir.write_json("result.json", result)
        return result


def due(step: int, every: int) -> bool:
    """Whether what is done every so many steps is done after this one; `every` 0 is never."""
    return bool(every) and step % every == 0
