"""Everything that defines a run, as plain dataclasses; config.json is this, complete, and feeds back in."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sdd.data.spec import absolute as absolute_spec
from sdd.models import ModelConfig, model_presets

#: More than any machine has cores for; a larger number is a slip, and torch would start them all.
_MOST_THREADS = 1024


def _positive(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(f"{name}={getattr(owner, name)} must be at least 1")


def _fraction(owner: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            raise ValueError(f"{name}={getattr(owner, name)} must be between 0 and 1")


def _not_negative(owner: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(owner, name) < float("inf"):
            raise ValueError(f"{name}={getattr(owner, name)} must be finite and not negative")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        path: token files, plain text files or a folder of either; none for the built-in classics. A mixture is
            PATH:WEIGHT,PATH:WEIGHT or a mixture.json.
        tokenizer: a tokenizer.json for plain text; none for the built-in one.
        dtype: of token files that have no json.
        eos: id of the end-of-document token of token files whose json does not say.
        batch_size: sequences a step, over all accumulation steps and processes.
        document_mask: attention does not cross the end of a document.
    """

    path: str | None = None
    tokenizer: str | None = None
    dtype: Literal["uint16", "uint32"] | None = None
    eos: int | None = None
    batch_size: int = 8
    document_mask: bool = False

    def __post_init__(self) -> None:
        _positive(self, "batch_size")
        if self.eos is not None and self.eos < 0:
            raise ValueError(f"eos={self.eos} must not be negative")

    def absolute(self) -> "DataConfig":
        """The same with absolute paths, so that a run resumes from any folder."""
        path = None if self.path is None else absolute_spec(self.path)
        return replace(self, path=path, tokenizer=self.tokenizer and str(Path(self.tokenizer).absolute()))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and the learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: "cosine" from lr to lr * final_lr; "wsd" (warm-up, stable, decay) falls linearly over the last
            decay_fraction of the steps; "constant" stays at lr.
        final_lr: the learning rate at the last step, as a fraction of lr.
        decay_fraction: of the steps, for "wsd".
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of matrices.
        alpha_weight_decay: of every alpha and norm weight; the released recipe decays them by 0.1.
        embedding_weight_decay: of the embedding (tied or not).
        grad_clip: largest global gradient norm; 0 does not clip.
        z_loss: weight of logsumexp(logits)^2 in the loss (arXiv 2204.02311).
    """

    lr: float = 3e-3
    warmup: int = 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final_lr: float = 0.1
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    alpha_weight_decay: float = 0.0
    embedding_weight_decay: float = 0.0
    grad_clip: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _fraction(self, "final_lr", "decay_fraction", "beta1", "beta2")
        _not_negative(
            self,
            "lr",
            "warmup",
            "eps",
            "weight_decay",
            "alpha_weight_decay",
            "embedding_weight_decay",
            "grad_clip",
            "z_loss",
        )
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: choose cosine, wsd or constant")


@dataclass(frozen=True)
class GuardConfig:
    """What is done about a step that went wrong; every action is in metrics.jsonl and on the screen.

    Attributes:
        nonfinite: a loss or gradient that is not finite, or a damaged weight: "skip" takes the step with the next
            batch instead, and rolls back where that does not help; "stop" ends the run with exit code 3.
        spikes: a spike of loss or gradient norm: "observe" only notes it, "skip" does as above.
        loss_margin: a loss spike is this many robust standard deviations, of the noise from step to step, above the
            median of the last losses.
        grad_factor: a gradient spike is this many times the median of the last gradient norms.
        window: how many accepted steps the running estimates look back.
        patience: skips in a row after which the last good checkpoint is loaded.
        max_rollbacks: how often without passing the bad step, before the run is given up.
    """

    nonfinite: Literal["skip", "stop"] = "skip"
    spikes: Literal["observe", "skip"] = "observe"
    loss_margin: float = 8.0
    grad_factor: float = 20.0
    window: int = 64
    patience: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        _positive(self, "patience")
        if self.window < 16:
            raise ValueError(f"window={self.window} must be at least 16 steps")
        _not_negative(self, "loss_margin", "grad_factor", "max_rollbacks")


@dataclass(frozen=True)
class RunConfig:
    """A run: the model, its data, the optimiser, and how long and where.

    Attributes:
        model: shape and placement.
        data: what is trained on.
        optim: optimiser and schedule.
        guard: what is done about steps that go wrong.
        steps: optimiser steps.
        seed: of the initial weights and of the order of the data.
        accumulate: equal parts of a step's batch, of which one at a time is in memory; divides data.batch_size. Several
            processes share them out.
        precision: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere.
        compile: torch.compile the model.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        chunked_loss: never hold all logits (torch >= 2.13): less memory for a little time.
        eval_every: steps between evaluations on the held-out text; 0 only at the end.
        eval_sequences: held-out sequences an evaluation, spread evenly and the same each time.
        checkpoint_every: steps between checkpoints; 0 only at the end and on interruption.
        probe_every: steps between those at which `sdd.Probe` looks into the model, into probe.jsonl, and steps 1, 2, 4,
            8, ... before the first of them; 0 never looks.
        keep_checkpoints: how many of the newest checkpoints to keep; 0 keeps all.
        sample_tokens: tokens of the sample written at the end; 0 writes none.
        device: "auto" is the first of cuda, mps (untested) and cpu that exists.
        threads: CPU threads; 0 leaves it to torch.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    steps: int = 500
    seed: int = 0
    accumulate: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    chunked_loss: bool = False
    eval_every: int = 100
    eval_sequences: int = 64
    checkpoint_every: int = 500
    probe_every: int = 50
    keep_checkpoints: int = 2
    sample_tokens: int = 80
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "accumulate", "eval_sequences")
        _not_negative(self, "seed", "eval_every", "checkpoint_every", "probe_every")
        _not_negative(self, "keep_checkpoints", "sample_tokens", "threads")
        if self.data.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide data.batch_size={self.data.batch_size}")
        if self.chunked_loss and self.optim.z_loss:
            raise ValueError("optim.z_loss needs all logits: leave out chunked_loss")
        if self.threads > _MOST_THREADS:  # torch starts as many as it is told to
            raise ValueError(f"threads={self.threads}: expected at most {_MOST_THREADS}, 0 leaves it to torch")

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimiser step."""
        return self.data.batch_size * self.model.context


# Large shapes: the paper's batch, schedule and rates; see docs/training.md.
_PUBLISHED_OPTIM = OptimConfig(lr=3e-4, warmup=2000)
_PUBLISHED_MOE_OPTIM = OptimConfig(lr=4e-4, warmup=2500)


def _published(name: str) -> RunConfig:
    return RunConfig(
        model=model_presets[name],
        data=DataConfig(batch_size=1024),
        optim=_PUBLISHED_OPTIM,
        steps=47_684,  # 200B tokens
        accumulate=256,
        activation_checkpointing=True,
        eval_every=1000,
        eval_sequences=256,
        checkpoint_every=1000,
    )


def preset(name: str) -> RunConfig:
    """The run that a preset's name stands for.

    Raises:
        KeyError: if there is no such preset; `model_presets` names them.
    """
    model = model_presets[name]
    match name:
        case "nano" | "moe-nano":
            return RunConfig(
                model, DataConfig(batch_size=4), OptimConfig(lr=4e-3, warmup=40), steps=400, checkpoint_every=200
            )
        case "micro":
            return RunConfig(
                model, DataConfig(batch_size=16), OptimConfig(lr=2e-3, warmup=50), steps=500, eval_sequences=128
            )
        case "moe-588m-3b" | "moe-1b-7b":
            return replace(_published(name), optim=_PUBLISHED_MOE_OPTIM, steps=59_605)  # 250B tokens
        case _:
            return _published(name)
