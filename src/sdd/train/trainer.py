"""The training loop."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdd.data import DataSource, Loader, eval_windows
from sdd.errors import Diverged, Interrupted, RunFailed, UserError
from sdd.models import LanguageModel, count_parameters
from sdd.models.moe import Routing
from sdd.models.transformer import HAS_CHUNKED_LOSS, TrainingLoss
from sdd.probing import Probe
from sdd.probing.alarms import Alarms
from sdd.train import checkpoint as ckpt
from sdd.train import config_io
from sdd.train.config import RunConfig
from sdd.train.data import resolve
from sdd.train.device import pick_autocast, pick_device
from sdd.train.evaluate import Evaluation, evaluate
from sdd.train.optim import build_optimizer, clip_gradients, set_learning_rate
from sdd.train.parallel import ALONE, World
from sdd.train.progress import Reporter
from sdd.train.recovery import CHECK_EVERY, Recovery
from sdd.train.resuming import accepted_state
from sdd.train.routing import StepRouting
from sdd.train.run_dir import RunDir, environment
from sdd.train.schedule import learning_rate
from sdd.train.sharding import average_gradients, build_model, compile_model
from sdd.train.signals import StopSignals
from sdd.train.tensorboard import TensorBoard
from sdd.train.words import opening, sample


class Trainer:
    """One run: builds everything that `config` names, trains, and writes the files of the run directory.

    The order of samples is a pure function of (data, seed, step, skipped batches) and the learning rate one of the
    step, so the whole state of a run is: parameters, optimiser moments, generators, the step, and what the guard knows.

    Args:
        config: the run.
        run_dir: where its files go; must exist.
        data: what `resolve(config)` gave; found anew if None.
        world: the processes that share the run.

    Attributes:
        model, optimizer, loader, probe, alarms, recovery, reporter: the parts.
        step: optimiser steps done.
        seconds: spent in training steps, evaluation and saving excluded, over all sessions of the run.
    """

    def __init__(
        self, config: RunConfig, run_dir: RunDir, data: DataSource | None = None, world: World = ALONE
    ) -> None:
        self.config, self.run_dir, self.world = config, run_dir, world
        self.device = world.together(lambda: world.place(pick_device(config.device)))
        self.autocast_dtype = world.together(lambda: pick_autocast(config.precision, self.device))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.data = data or world.in_turn(lambda: resolve(config))
        self.loader = world.together(self._build_loader)
        if len(set(world.gather(self.data.fingerprint()))) > 1:
            raise UserError("the processes do not see the same training data: give every machine the same files")
        torch.manual_seed(config.seed)
        self.model = build_model(LanguageModel(config.model, "meta"), self.device, self.autocast_dtype, world)
        self.model.checkpoint_blocks = config.activation_checkpointing
        self.model.chunked_loss = config.chunked_loss and HAS_CHUNKED_LOSS
        self.model.sum_counts = world.total if world.size > 1 else None
        self.optimizer = build_optimizer(self.model, config.optim)
        self.recovery = Recovery(self)
        self.reporter = Reporter(config.steps, quiet=not world.is_main)
        self.step = 0
        self.seconds = 0.0
        self._routing: StepRouting | None = None
        self._passes = world.passes(config.data.batch_size, config.accumulate)
        self._eval_windows = eval_windows(self.data.validation, config.eval_sequences, config.model.context)
        self._token_bytes = self._token_lengths()
        self._document_eos = self.data.eos if config.data.document_mask else None
        self._signals = StopSignals()
        if config.compile:
            compile_model(self.model)
        self.probe = Probe(self.model, every=config.probe_every, out=partial(self.record, "probe.jsonl"), early=True)
        self.alarms = self._new_alarms()

    def resume(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint.

        Returns:
            Its state.

        Raises:
            UserError: if it is damaged, belongs to another model or other data, or lies beyond the end of the run.
        """
        self.world.on_main(lambda: accepted_state(path, self))
        state = ckpt.load_checkpoint(path, self.model, self.optimizer, self.world)
        self.step, self.seconds = state["step"], max(self.seconds, state["seconds"])
        self.recovery.load_state_dict(state)
        self._forget_after()
        return state

    def begin_again(self) -> None:
        """Go back to step 0: the weights are drawn as they were."""
        torch.manual_seed(self.config.seed)
        self.model.init_weights()
        self.optimizer.state.clear()
        self.step = 0
        self.recovery.forget()
        self._forget_after()

    def _forget_after(self) -> None:
        """Drop the rows of later steps; what alarms before comes to word again if it goes on."""
        self.alarms = self._new_alarms()
        self.world.on_main(lambda: self.run_dir.drop_after(self.step))

    def _new_alarms(self) -> Alarms:
        return Alarms(config_io.flatten(config_io.to_dict(self.config)))

    def run(self) -> dict[str, Any]:
        """Train to the last step, then let go of the run directory.

        Returns:
            What result.json holds.

        Raises:
            RunFailed: if the guard gives up, or a checkpoint cannot be written.
            Interrupted: after Ctrl-C or SIGTERM, with everything saved.
        """
        try:
            return self._run()
        except OSError as error:
            raise RunFailed(
                f"step {self.step}: cannot write {error.filename or self.run_dir.path}: {error.strerror}; the last "
                f"checkpoint is {self._newest()}; once that is mended: sdd resume {self.run_dir.path}"
            ) from None
        finally:
            self.run_dir.unlock()

    def _run(self) -> dict[str, Any]:
        self.run_dir.write_json("environment.json", self.environment())
        self.reporter = Reporter(self.config.steps, self.step, quiet=not self.world.is_main)
        tensorboard = TensorBoard()
        if self.world.is_main:
            tensorboard = TensorBoard.if_present(self.run_dir.path, self.step, self.reporter.say)
        with self._signals, self.reporter, tensorboard, self.probe:
            for line in opening(self):
                self.reporter.say(line)
            try:
                evaluation = self._train(tensorboard)
            except Diverged as error:
                self._save_result("failed", cause="diverged", reason=str(error))
                raise Diverged(f"{error}; the last checkpoint is {self._newest()}") from None
            except RunFailed as error:
                self._save_result("failed", cause="stopped", reason=str(error))
                failure = RunFailed(f"step {self.step}: {error}; the last checkpoint is {self._newest()}")
                failure.rank = error.rank
                raise failure from None
            if evaluation is None:
                self._save_result("interrupted")
                raise Interrupted(
                    f"interrupted at step {self.step} and saved; go on with: sdd resume {self.run_dir.path}"
                )
            if row := sample(self, self._eval_windows):
                self.run_dir.put("samples.jsonl", row)
        return self._save_result(
            "done",
            eval_loss=evaluation.loss,
            eval_bits_per_byte=evaluation.bits_per_byte,
            eval_tokens=evaluation.tokens,
        )

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step (from 0), whatever its loss; all processes take it together. Returns as `gradients`."""
        found = self.gradients(step)
        self.update()
        return found

    def gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of one step (from 0); the gradients are clipped and not yet used.

        Returns:
            Loss (nats a token, of the whole batch, without the auxiliary losses of a mixture of experts) and global
            gradient norm before clipping, still on the device; the same on every process.
        """
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, step + 1, self.config.steps))
        parts = self._batch(step).chunk(self._passes)
        total = torch.zeros((), device=self.device)
        passes: list[Routing] = []
        for part in parts:
            loss = self._loss(part)
            (loss.total / len(parts)).backward()
            total += loss.cross_entropy / len(parts)
            if loss.routing is not None:
                passes.append(loss.routing)
        average_gradients(self.model, self.world)
        self._routing = StepRouting(passes, self.world) if passes else None
        self.probe.gradients_ready()
        return self.world.mean(total), clip_gradients(self.model, self.config.optim.grad_clip)

    def _loss(self, rows: Tensor) -> TrainingLoss:
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.model(
                rows[:, :-1],
                rows[:, 1:],
                document_eos=self._document_eos,
                z_loss=self.config.optim.z_loss,
                detailed=True,
            )

    def update(self) -> None:
        """The optimiser's part of a step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def record(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl or probe.jsonl, and say what it alarms about."""
        self.run_dir.append(name, row)
        if self.world.is_main:
            for alarm in self.alarms.update(row):
                self.reporter.say(str(alarm))

    def _batch(self, step: int) -> Tensor:
        """This process's rows of a batch, on the device."""
        batch = self.world.alone(lambda: self.loader.batch(step))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def evaluate(self) -> Evaluation:
        """Held-out loss on the run's fixed windows."""
        rows = self.config.data.batch_size // (self.world.size * self._passes)
        return evaluate(
            self.model,
            self._eval_windows,
            rows,
            token_bytes=self._token_bytes,
            document_eos=self._document_eos,
            autocast_dtype=self.autocast_dtype,
            world=self.world,
        )

    def save(self) -> Path:
        """Write a checkpoint, then delete those that are no longer to be kept."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.step * self.config.tokens_per_step,
            "data": self.data.fingerprint(),
            "data_files": self.data.listing,
            "config": config_io.to_dict(self.config),
            "environment": self.environment(),
            **self.recovery.state_dict(),
        }
        self.world.on_main(self.run_dir.sync)
        path = ckpt.save_checkpoint(self.run_dir.checkpoints, self.model, self.optimizer, state, self.world)
        self.world.on_main(lambda: ckpt.prune(self.run_dir.checkpoints, self.config.keep_checkpoints, path))
        return path

    def _train(self, tensorboard: TensorBoard) -> Evaluation | None:
        """All steps that are left; None if a signal ended them."""
        evaluation = None
        while self.step < self.config.steps:
            if not self._take_step(tensorboard):
                continue
            last = self.step == self.config.steps
            stop = self.world.any(self._signals.received)
            saving = last or stop or _due(self.step, self.config.checkpoint_every)
            if (saving or _due(self.step, CHECK_EVERY)) and not self.recovery.weights_are_sound():
                continue
            if last or _due(self.step, self.config.eval_every):
                evaluation = self._log_evaluation(tensorboard)
            if saving:
                self.save()
            if stop and not last:
                return None
        return evaluation or self.evaluate()

    def _take_step(self, tensorboard: TensorBoard) -> bool:
        """The present step, if the guard allows it."""
        began, fatal = time.perf_counter(), None
        try:
            with self.probe.step(self.optimizer, self.step + 1):
                loss, grad_norm = (value.item() for value in self.gradients(self.step))
                try:
                    allowed = self.recovery.allows(loss, grad_norm)
                except Diverged as error:  # the step that ends the run is logged and probed like any other
                    allowed, fatal = True, error
                if not allowed:
                    raise _NotAllowed  # past the probe, which then leaves this attempt out
                if fatal is None:
                    self.update()
        except _NotAllowed:
            self.optimizer.zero_grad()
            return False
        self._log_step(loss, grad_norm, began, tensorboard)
        if fatal is not None:
            raise fatal
        return True

    def _log_step(self, loss: float, grad_norm: float, began: float, tensorboard: TensorBoard) -> None:
        """Count the step that began then, and write its row."""
        seconds = time.perf_counter() - began
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
            **(self._routing.row() if self._routing else {}),
        }
        self.record("metrics.jsonl", row)
        tensorboard.log(row)
        self.reporter.step(self.step, loss, row["tokens_per_second"])

    def _log_evaluation(self, tensorboard: TensorBoard) -> Evaluation:
        evaluation = self.evaluate()
        row = {
            "step": self.step,
            "eval_loss": evaluation.loss,
            "eval_bits_per_byte": evaluation.bits_per_byte,
            "eval_tokens": evaluation.tokens,
            **(self._routing.loads() if self._routing else {}),
        }
        self.record("metrics.jsonl", row)
        tensorboard.log(row)
        self.reporter.say(f"step {self.step}   held-out {_describe(evaluation)}")
        return evaluation

    def _save_result(self, status: str, **values: Any) -> dict[str, Any]:
        result = {
            "status": status,
            "placement": self.config.model.placement.name,
            "step": self.step,
            "steps": self.config.steps,
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": self.seconds,
            "parameters": count_parameters(self.config.model).total,
            "skipped_batches": self.recovery.skipped,
            **values,
        }
        self.run_dir.write_json("result.json", result)
        return result

    @property
    def precision_name(self) -> str:
        """Of the matrix products."""
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    def _build_loader(self) -> Loader:
        """The loader, if the config fits the data."""
        config, data, world = self.config, self.data, self.world
        _check_vocabulary(config, data)
        if config.data.document_mask and data.eos is None:
            raise UserError("data.document_mask=true needs to know the end-of-document token, and these data name none")
        batch_size, context = config.data.batch_size, config.model.context
        return Loader(data.parts, batch_size, context, config.seed, rank=world.rank, world_size=world.size)

    def environment(self) -> dict[str, Any]:
        """What a result depends on beside the config."""
        return environment(self.device, self.precision_name, self.world.size, self.world.job)

    def _token_lengths(self) -> np.ndarray | None:
        return None if self.data.tokenizer is None else self.data.tokenizer.token_bytes()

    def _newest(self) -> str:
        found = ckpt.list_checkpoints(self.run_dir.checkpoints)
        return str(found[-1]) if found else "none"


class _NotAllowed(Exception):
    """The guard did something about the step instead."""


def _check_vocabulary(config: RunConfig, data: DataSource) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small: the data have {data.vocab_size} tokens"
        )


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _describe(evaluation: Evaluation) -> str:
    text = f"loss {evaluation.loss:.4f}"
    return text if evaluation.bits_per_byte is None else f"{text}, {evaluation.bits_per_byte:.4f} bits per byte"
