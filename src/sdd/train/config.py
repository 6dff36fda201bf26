"""All settings of a run, as plain dataclasses. config.json holds every one of them and can start the same run again."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sdd.data import DataSource, Notify, resolve_data
from sdd.data.spec import absolute as absolute_spec
from sdd.models import ModelConfig, model_presets
from sdd.parallel.layout import ParallelConfig
from sdd.spikes import ENOUGH

#: More threads than any machine has cores for. A larger number is a typing error, and torch would start them all.
_MOST_THREADS = 1024
#: The loader numbers the sequences in 64 bits, which a step of more than these could exhaust.
_MOST_SEQUENCES = 2**56


def _at_least(least: float, owner: object, *names: str, most: float = math.inf, unit: str = "") -> None:
    """Check that fields are finite and within bounds."""
    for name in names:
        value = getattr(owner, name)
        if not abs(value) < math.inf:
            raise ValueError(f"{name}={value} must be finite")
        if not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise ValueError(f"{name}={value} must be {bounds}{unit}")


@dataclass(frozen=True)
class DataConfig:
    """The training data, and how many sequences make a step.

    Attributes:
        path: text (.txt, .md), JSON lines (.jsonl, .ndjson, .json), each also packed (.gz, .zst, .bz2, .xz), parquet,
            token files (.npy, .bin), or a folder of these; none for the built-in classics. A mixture is
            PATH:WEIGHT,PATH:WEIGHT or a mixture.json.
        tokenizer: a tokenizer.json for plain text; none for the built-in one.
        dtype: number type of token files that have no json.
        eos: id or text of the end-of-document token, for token files whose json does not say and for tokenizers that
            have none of the usual names.
        batch_size: sequences a step, over all accumulation steps and processes.
        document_mask: whether attention stops at the end of a document.
    """

    path: str | None = None
    tokenizer: str | None = None
    dtype: Literal["uint16", "uint32"] | None = None
    eos: int | str | None = None
    batch_size: int = 8
    document_mask: bool = False

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size", most=_MOST_SEQUENCES)
        if isinstance(self.eos, str) and self.eos.lstrip("-").isdecimal():
            object.__setattr__(self, "eos", int(self.eos))
        if isinstance(self.eos, int):
            _at_least(0, self, "eos")

    def absolute(self) -> "DataConfig":
        """The same config with absolute paths, so that a run resumes from any folder."""
        path = None if self.path is None else absolute_spec(self.path)
        return replace(self, path=path, tokenizer=self.tokenizer and str(Path(self.tokenizer).absolute()))


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and the learning-rate schedule.

    Attributes:
        name: "adamw" (arXiv 1711.05101); "stable-adamw", AdamW with clipped updates (arXiv 2304.13013); "muon" for the
            blocks' matrices with AdamW for the rest, both at one lr (arXiv 2502.16982).
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: "cosine" from lr to lr * final_lr; "wsd" (warm-up, stable, decay) falls linearly over the last
            decay_fraction of the steps; "constant" stays at lr; "ramp" rises geometrically from lr * first_lr at the
            first step to lr at the last, to find the highest rate that a model bears.
        final_lr: the learning rate at the last step of "cosine" and "wsd", as a fraction of lr.
        first_lr: the learning rate at the first step of "ramp", as a fraction of lr.
        decay_fraction: fraction of the steps in which "wsd" decays.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        momentum: of Muon.
        weight_decay: weight decay of matrices.
        alpha_weight_decay: weight decay of every alpha and norm weight; the released recipe decays them by 0.1.
        embedding_weight_decay: weight decay of the embedding (tied or not).
        sdd_weight_decay: weight decay of V, the matrices of SDD layers; none for weight_decay.
        alpha_lr: learning rate of every alpha and norm weight, as a multiple of lr.
        grad_clip: largest global gradient norm; 0 does not clip.
        z_loss: weight of logsumexp(logits)^2 in the loss (arXiv 2204.02311).
        weights: what keeps the lengths of the matrices in the blocks' projections, which then have no weight decay:
            "free" nothing; "rows" that each row keeps its own (weight normalisation, arXiv 1602.07868, with fixed
            lengths); "hyperball" that each matrix keeps its Frobenius norm and moves by lr times it a step (arXiv
            2606.16899), see `sdd.train.weights`.
    """

    name: Literal["adamw", "stable-adamw", "muon"] = "adamw"
    lr: float = 3e-3
    warmup: int = 50
    schedule: Literal["cosine", "wsd", "constant", "ramp"] = "cosine"
    final_lr: float = 0.1
    first_lr: float = 1e-5
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    alpha_weight_decay: float = 0.0
    embedding_weight_decay: float = 0.0
    sdd_weight_decay: float | None = None
    alpha_lr: float = 1.0
    grad_clip: float = 1.0
    z_loss: float = 0.0
    weights: Literal["free", "rows", "hyperball"] = "free"

    def __post_init__(self) -> None:
        _at_least(0, self, "final_lr", "decay_fraction", "beta1", "beta2", "momentum", most=1)
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name}={getattr(self, name)} must be less than 1: a mean that never moves")
        _at_least(0, self, "lr", "warmup", "eps", "grad_clip", "z_loss")
        _at_least(0, self, "weight_decay", "alpha_weight_decay", "embedding_weight_decay", "alpha_lr")
        if self.sdd_weight_decay is not None:
            _at_least(0, self, "sdd_weight_decay")
        _at_least(0, self, "first_lr", most=1)
        if self.first_lr == 0:
            raise ValueError("first_lr=0 must be above 0: a geometric ramp cannot start at 0")
        if self.schedule not in ("cosine", "wsd", "constant", "ramp"):
            raise ValueError(f"schedule={self.schedule!r}: choose cosine, wsd, constant or ramp")
        if self.weights not in ("free", "rows", "hyperball"):
            raise ValueError(f"weights={self.weights!r}: choose free, rows or hyperball")
        if self.name not in ("adamw", "stable-adamw", "muon"):
            raise ValueError(f"name={self.name!r}: choose adamw, stable-adamw or muon")


@dataclass(frozen=True)
class GuardConfig:
    """How to handle a step that went wrong. Every action is in metrics.jsonl and on the screen.

    Attributes:
        nonfinite: on a loss or gradient that is not finite, or a damaged weight: "skip" takes the step with the next
            batch instead, and rolls back where that does not help; "stop" ends the run with exit code 3.
        spikes: on a spike of loss or gradient norm: "observe" only notes it, "skip" does as above.
        loss_margin: a loss spike is this many robust standard deviations, of the noise from step to step, above the
            median of the last losses.
        grad_factor: a gradient spike is this many times the median of the last gradient norms.
        window: accepted steps that the running estimates look back on.
        patience: skips in a row after which the last good checkpoint is loaded.
        max_rollbacks: rollbacks without getting past the bad step after which the run is given up.
    """

    nonfinite: Literal["skip", "stop"] = "skip"
    spikes: Literal["observe", "skip"] = "observe"
    loss_margin: float = 8.0
    grad_factor: float = 20.0
    window: int = 64
    patience: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        _at_least(1, self, "patience")
        _at_least(ENOUGH, self, "window", unit=" steps")
        _at_least(0, self, "loss_margin", "grad_factor", "max_rollbacks")


@dataclass(frozen=True)
class RunConfig:
    """A run: the model, its data, the optimiser, and how long and where.

    Attributes:
        model: shape and placement.
        data: the training data.
        optim: optimiser and schedule.
        guard: how to handle steps that go wrong.
        parallel: how several processes share the work.
        steps: optimiser steps.
        seed: seed of the initial weights and of the order of the data.
        accumulate: number of equal parts that a step's batch is cut into, one in memory at a time; divides
            data.batch_size. Several processes share the parts.
        precision: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere.
        compile: torch.compile the model. "auto" does where it works and the run is long enough to pay for it; a new run
            keeps the decision in its config.json.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        chunked_loss: never hold all logits (torch >= 2.13): less memory for a little time.
        eval_every: steps between evaluations on the held-out text; 0 evaluates only at the end.
        eval_sequences: held-out sequences an evaluation, spread evenly and the same each time.
        checkpoint_every: steps between checkpoints; 0 saves only at the end and on interruption.
        checkpoint_async: write checkpoints in mid-run while the training goes on, from a copy of all state in host
            memory. The files are the same.
        probe_every: steps between those that `sdd.Probe` records in probe.jsonl; steps 1, 2, 4, 8, ... before the first
            of them are recorded too. 0 never probes.
        keep_checkpoints: number of the newest checkpoints to keep; 0 keeps all.
        sample_tokens: length of the text that the model writes at the end; 0 writes none.
        device: "auto" is the first of cuda, mps (untested) and cpu that exists.
        threads: CPU threads; 0 leaves the number to torch.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = 500
    seed: int = 0
    accumulate: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    activation_checkpointing: bool = False
    chunked_loss: bool = False
    eval_every: int = 100
    eval_sequences: int = 64
    checkpoint_every: int = 500
    checkpoint_async: bool = False
    probe_every: int = 50
    keep_checkpoints: int = 2
    sample_tokens: int = 80
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        _at_least(1, self, "steps", "accumulate", "eval_sequences")
        _at_least(0, self, "seed", "eval_every", "checkpoint_every", "probe_every", "keep_checkpoints", "sample_tokens")
        _at_least(0, self, "threads", most=_MOST_THREADS)
        if self.data.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide data.batch_size={self.data.batch_size}")
        if self.chunked_loss and self.optim.z_loss:
            raise ValueError("optim.z_loss needs all logits: leave out chunked_loss")
        if self.model.statistics != "float32" and (self.activation_checkpointing or self.compile is True):
            raise ValueError(
                "model.statistics=bfloat16 would not round everywhere: leave out compile and activation_checkpointing"
            )
        if self.parallel.rings and self.data.document_mask:
            raise ValueError(
                "parallel.context_attention=ring has no document mask: choose gather, or leave out data.document_mask"
            )
        placement = self.model.placement
        if placement.weights != "free" and self.optim.weights != "free":
            raise ValueError(
                f"optim.weights={self.optim.weights} does not fit {placement.name or 'own placement'}, whose rows and "
                "columns are unit vectors: leave it at free"
            )

    @property
    def weight_rule(self) -> Literal["free", "unit", "rows", "hyperball"]:
        """What keeps the lengths of weights, see `sdd.train.weights`: the placement's rule or the optimiser's."""
        return self.optim.weights if self.model.placement.weights == "free" else self.model.placement.weights

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimiser step."""
        return self.data.batch_size * self.model.context


def preset(name: str) -> RunConfig:
    """The run that a preset's name stands for.

    Raises:
        KeyError: if there is no such preset; the names are those of `model_presets`.
    """
    model = model_presets[name]
    if name in ("nano", "moe-nano"):
        return RunConfig(
            model, DataConfig(batch_size=4), OptimConfig(lr=4e-3, warmup=40), steps=400, checkpoint_every=200
        )
    if name == "micro":
        return RunConfig(
            model, DataConfig(batch_size=16), OptimConfig(lr=2e-3, warmup=50), steps=500, eval_sequences=128
        )
    # large shapes: the paper's batch, schedule and rates, see docs/training.md
    large_moe = model.moe is not None
    return RunConfig(
        model,
        DataConfig(batch_size=1024),
        OptimConfig(lr=4e-4, warmup=2500) if large_moe else OptimConfig(lr=3e-4, warmup=2000),
        steps=59_605 if large_moe else 47_684,  # 250B or 200B tokens
        accumulate=256,
        activation_checkpointing=True,
        eval_every=1000,
        eval_sequences=256,
        checkpoint_every=1000,
    )


def resolve(config: RunConfig, notify: Notify | None = None) -> DataSource:
    """Find a run's data, and tokenise them if need be.

    Args:
        config: the run. Token files that do not say how large their vocabulary is have the model's.
        notify: receives one line before work that takes a while; by default it is logged.

    Raises:
        UserError: see `resolve_data`.
    """
    data = config.data
    return resolve_data(
        data.path,
        data.tokenizer,
        context=config.model.context,
        dtype=data.dtype,
        eos=data.eos,
        vocab_size=config.model.vocab_size,
        notify=notify,
    )
