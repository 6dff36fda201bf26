"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdd import config_io
from sdd.data import DataSource, Loader, eval_windows, resolve_data
from sdd.errors import Interrupted, RunFailed, UserError
from sdd.models import LanguageModel, count_parameters, generate
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.train import checkpoint as ckpt
from sdd.train.config import RunConfig
from sdd.train.evaluate import Evaluation, evaluate
from sdd.train.optim import build_optimizer, set_learning_rate
from sdd.train.progress import Reporter
from sdd.train.run_dir import RunDir, environment
from sdd.train.schedule import learning_rate
from sdd.train.tensorboard import TensorBoard


class Trainer:
    """One run: builds everything that `config` names, trains, and writes the files of the run directory.

    The order of samples is a pure function of (data, seed, step) and the learning rate one of the step, so the whole
    state of a run is: parameters, optimiser moments, generators, and the step.

    Args:
        config: the run.
        run_dir: where its files go; must exist.
        data: what `resolve_data(config.data.path, ...)` gave; found anew if None.

    Attributes:
        model, optimizer, loader: the parts.
        step: optimiser steps done.
        seconds: spent in training steps, evaluation and saving excluded, over all sessions of the run.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, data: DataSource | None = None) -> None:
        self.config, self.run_dir = config, run_dir
        self.device = pick_device(config.device)
        self.autocast_dtype = pick_autocast(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.data = data or resolve_data(config.data.path, config.data.tokenizer, context=config.model.context)
        _check_vocabulary(config, self.data)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config.model).to(self.device)
        self.model.checkpoint_blocks = config.activation_checkpointing
        self.model.chunked_loss = config.chunked_loss and HAS_CHUNKED_LOSS
        self.optimizer = build_optimizer(self.model, config.optim)
        self.loader = Loader(self.data.train, config.data.batch_size, config.model.context, config.seed)
        self.step = 0
        self.seconds = 0.0
        self._eval_windows = eval_windows(self.data.validation, config.eval_sequences, config.model.context)
        self._token_bytes = self._token_lengths()
        self._document_eos = self.data.eos if config.data.document_mask else None
        self._stop: int | None = None
        if config.data.document_mask and self.data.eos is None:
            raise UserError("data.document_mask=true needs to know the end-of-document token, and these data name none")
        if config.compile:
            self.model.compile()

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: if it is damaged, belongs to another model, or the data changed since it was written.
        """
        state = ckpt.load_checkpoint(path, self.model, self.optimizer)
        if state.get("data") != self.data.fingerprint():
            raise UserError(f"the training data are not those that {path.name} was trained on: bring them back")
        self.step, self.seconds = state["step"], state["seconds"]
        self.run_dir.drop_after(self.step)

    def run(self) -> dict[str, Any]:
        """Train to the last step, then let go of the run directory.

        Returns:
            What result.json holds.

        Raises:
            RunFailed: if the loss or a gradient is no longer finite, or a checkpoint cannot be written.
            Interrupted: after Ctrl-C or SIGTERM, with everything saved.
        """
        try:
            return self._run()
        finally:
            self.run_dir.unlock()

    def _run(self) -> dict[str, Any]:
        self.run_dir.write_json("environment.json", environment(self.device, self._precision_name))
        tensorboard = TensorBoard.if_present(self.run_dir.path, self.step)
        with self._signals(), Reporter(self.config.steps, self.step) as reporter, tensorboard:
            self._announce(reporter)
            try:
                evaluation = self._train(reporter, tensorboard)
            except FloatingPointError as error:
                self._save_result("failed", reason=str(error))
                raise RunFailed(f"{error}; the last checkpoint is {self._newest()}") from None
            except OSError as error:
                raise RunFailed(
                    f"step {self.step}: cannot write {error.filename or self.run_dir.path}: {error.strerror}; "
                    f"the last checkpoint is {self._newest()}"
                ) from None
            if evaluation is None:
                self._save_result("interrupted")
                raise Interrupted(
                    f"interrupted at step {self.step} and saved; go on with: sdd resume {self.run_dir.path}"
                )
            self._sample()
        return self._save_result(
            "done",
            eval_loss=evaluation.loss,
            eval_bits_per_byte=evaluation.bits_per_byte,
            eval_tokens=evaluation.tokens,
        )

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step on the batch of that number (from 0).

        Returns:
            Loss (nats a token, of the batch before the step) and global gradient norm, still on the device.
        """
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, step + 1, self.config.steps))
        batch = self.loader.batch(step)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        tokens = batch.to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        for part in tokens.chunk(self.config.accumulate):
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                loss = self.model(
                    part[:, :-1], part[:, 1:], document_eos=self._document_eos, z_loss=self.config.optim.z_loss
                )
            (loss / self.config.accumulate).backward()
            total += loss.detach() / self.config.accumulate
        clip = self.config.optim.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm

    def evaluate(self) -> Evaluation:
        """Held-out loss on the run's fixed windows."""
        rows = max(1, self.config.data.batch_size // self.config.accumulate)
        return evaluate(
            self.model,
            self._eval_windows,
            rows,
            token_bytes=self._token_bytes,
            document_eos=self._document_eos,
            autocast_dtype=self.autocast_dtype,
        )

    def save(self) -> Path:
        """Write a checkpoint, then delete those that are no longer to be kept."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.step * self.config.tokens_per_step,
            "data": self.data.fingerprint(),
            "environment": environment(self.device, self._precision_name),
        }
        path = ckpt.save_checkpoint(self.run_dir.checkpoints, self.model, self.optimizer, state)
        ckpt.prune(self.run_dir.checkpoints, self.config.keep_checkpoints)
        return path

    def _train(self, reporter: Reporter, tensorboard: TensorBoard) -> Evaluation | None:
        """All steps that are left; None if a signal ended them."""
        evaluation = None
        while self.step < self.config.steps:
            began = time.perf_counter()
            loss, grad_norm = (value.item() for value in self.train_step(self.step))
            self.seconds += time.perf_counter() - began
            self.step += 1
            row = {
                "step": self.step,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": self.optimizer.param_groups[0]["lr"],
                "tokens": self.step * self.config.tokens_per_step,
                "seconds": self.seconds,
                "time": time.time(),
                "tokens_per_second": self.config.tokens_per_step / (time.perf_counter() - began),
            }
            self.run_dir.append("metrics.jsonl", row)
            tensorboard.log(row)
            reporter.step(self.step, loss, row["tokens_per_second"])
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise FloatingPointError(f"step {self.step}: loss {loss}, gradient norm {grad_norm}: not finite")
            last = self.step == self.config.steps
            if last or _due(self.step, self.config.eval_every):
                evaluation = self._log_evaluation(reporter, tensorboard)
            if last or _due(self.step, self.config.checkpoint_every) or self._stop:
                self.save()
            if self._stop and not last:
                return None
        return evaluation or self.evaluate()

    def _log_evaluation(self, reporter: Reporter, tensorboard: TensorBoard) -> Evaluation:
        evaluation = self.evaluate()
        row = {
            "step": self.step,
            "eval_loss": evaluation.loss,
            "eval_bits_per_byte": evaluation.bits_per_byte,
            "eval_tokens": evaluation.tokens,
        }
        self.run_dir.append("metrics.jsonl", row)
        tensorboard.log(row)
        reporter.say(f"step {self.step}   held-out {_describe(evaluation)}")
        return evaluation

    def _sample(self) -> None:
        """Continue the start of the held-out text, for a human eye."""
        if not self.config.sample_tokens or self.data.tokenizer is None:
            return
        prompt = self._eval_windows[:1, : min(24, self.config.model.context)].to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        tokens = generate(
            self.model, prompt, self.config.sample_tokens, temperature=0.8, top_p=0.95, generator=generator
        )[0].tolist()
        self.model.train()
        decode = self.data.tokenizer.decode
        cut = prompt.shape[1]
        self.run_dir.append(
            "samples.jsonl", {"step": self.step, "prompt": decode(tokens[:cut]), "text": decode(tokens[cut:])}
        )

    def _save_result(self, status: str, **values: Any) -> dict[str, Any]:
        result = {
            "status": status,
            "placement": self.config.model.placement.name,
            "step": self.step,
            "steps": self.config.steps,
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": self.seconds,
            "parameters": count_parameters(self.config.model).total,
            **values,
        }
        self.run_dir.write_json("result.json", result)
        return result

    def _announce(self, reporter: Reporter) -> None:
        count = count_parameters(self.config.model)
        model = self.config.model
        reporter.say(
            f"{model.placement.name or 'own placement'}: {model.n_layers} layers, d_model {model.d_model}, "
            f"{count.total:,} parameters ({count.scales:,} of them alphas and norms)"
        )
        epochs = self.config.steps * self.config.data.batch_size / self.loader.n_windows
        reporter.say(
            f"{self.config.steps:,} steps of {self.config.data.batch_size} x {model.context} tokens of "
            f"{self.data.name} ({epochs:.2g} epochs), {self._precision_name} on {self.device}, into {self.run_dir.path}"
        )
        if self.step:
            reporter.say(f"going on from step {self.step}")
        if self.config.chunked_loss and not HAS_CHUNKED_LOSS:
            reporter.say(f"torch {torch.__version__} has no chunked loss: the plain one is used")

    @property
    def _precision_name(self) -> str:
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    def _token_lengths(self) -> np.ndarray | None:
        return None if self.data.tokenizer is None else self.data.tokenizer.token_bytes()

    def _newest(self) -> str:
        found = ckpt.list_checkpoints(self.run_dir.checkpoints)
        return str(found[-1]) if found else "none"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step in hand; a second Ctrl-C ends it at once."""

        def handle(number: int, _frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = number

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it owns the signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def pick_device(name: str) -> torch.device:
    """The device that a config's `device` names; "auto" is the first that exists of cuda, mps (untested) and cpu.

    Raises:
        UserError: if it does not exist here.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        there = ", ".join(kind for kind, found in present.items() if found)
        raise UserError(f"device={name!r} is not available here: choose from {there}, or auto")
    return torch.device(name)


def pick_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32.

    Raises:
        UserError: if bfloat16 was asked for on a GPU that has none.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if precision == "bfloat16" and not has_bfloat16:
        raise UserError("precision=bfloat16: this GPU has no bfloat16; choose float32")
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else None
    return torch.bfloat16 if precision == "bfloat16" else None


def fit_vocabulary(config: RunConfig, data: DataSource) -> RunConfig:
    """The config with a vocabulary as large as the data's, if theirs is larger."""
    if data.vocab_size <= config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=data.vocab_size))


def start(config: RunConfig, out: Path) -> Trainer:
    """A trainer for a new run in `out`.

    Raises:
        UserError: if `out` holds a run already, or the config does not fit machine or data.
    """
    run_dir = RunDir(out)
    if run_dir.config.exists():
        run_dir.create()  # says so, before the data are touched
    config = replace(config, data=config.data.absolute())
    data = resolve_data(config.data.path, config.data.tokenizer, context=config.model.context)
    trainer = Trainer(config, run_dir, data)
    run_dir.create()
    run_dir.lock()
    config_io.save(config, run_dir.config)
    return trainer


def reopen(out: Path, steps: int | None = None) -> Trainer:
    """A trainer that goes on with the run in `out` from its newest whole checkpoint.

    Args:
        out: the run directory.
        steps: a new length of the run; None keeps it.

    Raises:
        UserError: if there is no run, no whole checkpoint and the run was started under other code, or nothing to do.
    """
    run_dir = RunDir(out)
    if not run_dir.config.exists():
        raise UserError(f"{out} holds no run (no config.json): start one with sdd train PRESET --out {out}")
    config = config_io.load(run_dir.config)
    if steps is not None:
        config = replace(config, steps=steps)
    run_dir.lock()
    try:
        trainer = Trainer(config, run_dir)
        _resume_newest(trainer, run_dir)
        if trainer.step >= config.steps and (out / "result.json").exists():
            raise UserError(f"{out} is complete at step {trainer.step}: give more with --steps N to go on")
        if steps is not None:
            config_io.save(config, run_dir.config)
    except BaseException:
        run_dir.unlock()
        raise
    return trainer


def _resume_newest(trainer: Trainer, run_dir: RunDir) -> None:
    """Load the newest whole checkpoint; damaged ones are named and passed over; with none, start at step 0."""
    for path in reversed(ckpt.list_checkpoints(run_dir.checkpoints)):
        try:
            trainer.resume(path)
        except ckpt.DamagedCheckpoint as error:
            Reporter(1).say(f"passed over: {error}")
        else:
            return
    run_dir.drop_after(0)


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
