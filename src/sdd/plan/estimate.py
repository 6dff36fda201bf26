"""A plan: memory, time and GPU-hours of a run on given GPUs."""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from typing import Any

from sdd.errors import UserError
from sdd.models import ParameterCount, count_parameters
from sdd.models.flops import TrainingFlops, training_flops
from sdd.plan.gpus import Gpu
from sdd.plan.measure import MemoryCase
from sdd.plan.memory import Memory, alternatives, measure_memory, norm_activations
from sdd.train import RunConfig

#: Share of a GPU's memory that a plan may fill; CUDA, NCCL and the allocator's gaps take the rest.
USABLE = 0.9


@dataclass(frozen=True)
class Plan:
    """A run on GPUs, before anything is run.

    Attributes:
        run: the run.
        gpu: the kind of GPU.
        case: number of GPUs, sequences in memory at once, precision, and whether blocks are recomputed.
        memory: of one GPU.
        mfu: assumed model FLOPs utilisation: the model's FLOPs a second over the GPUs' dense peak.
        tokens: number of tokens to train on.
    """

    run: RunConfig
    gpu: Gpu
    case: MemoryCase
    memory: Memory
    mfu: float
    tokens: int

    @property
    def parameters(self) -> ParameterCount:
        """The model's parameters by role."""
        return count_parameters(self.run.model)

    @property
    def flops(self) -> TrainingFlops:
        """FLOPs of a token, forward and backward."""
        case = self.case
        return training_flops(
            case.model, checkpoint_blocks=case.checkpoint_blocks, fused_attention=case.has_fused_attention
        )

    @property
    def precision(self) -> str:
        """The precision of matrix products: "bfloat16" or "float32"."""
        return "bfloat16" if self.case.bfloat16 else "float32"

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step over all GPUs: the value of `--accumulate`."""
        return self.run.data.batch_size // self.case.micro_batch

    @property
    def capacity(self) -> int:
        """Bytes of one GPU that the plan may fill."""
        return _usable(self.gpu)

    @property
    def fits(self) -> bool:
        """Whether the peak is within `capacity`."""
        return self.memory.peak <= self.capacity

    @property
    def hardware_utilisation(self) -> float:
        """The utilisation of the GPUs with recomputed FLOPs counted (HFU)."""
        return self.mfu * self.flops.hardware / self.flops.model

    @property
    def tokens_per_second(self) -> float:
        """Speed of all GPUs together: `gpus * mfu * peak / model FLOPs a token`."""
        return self.case.gpus * self.mfu * self.gpu.peak(self.precision) / self.flops.model

    @property
    def steps(self) -> int:
        """Number of steps."""
        return math.ceil(self.tokens / self.run.tokens_per_step)

    @property
    def seconds(self) -> float:
        """Duration of training, without evaluations and checkpoints."""
        return self.steps * self.run.tokens_per_step / self.tokens_per_second

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.seconds / 3600 * self.case.gpus

    @property
    def optimizer_seconds(self) -> float:
        """Least time of AdamW in a step: it reads four float32 numbers a parameter and writes three."""
        return 28 * (self.memory.weights / 4) / (self.gpu.bandwidth * 1e9)

    @property
    def norms(self) -> int:
        """Bytes of the activations that a model without any norm would not keep."""
        return norm_activations(self.case)

    def alternatives(self) -> list[tuple[MemoryCase, Memory]]:
        """The memory with and without activation checkpointing and the chunked loss, at the same micro-batch."""
        return alternatives(self.case)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON: bytes, seconds, FLOPs, tokens."""
        count, flops, model = self.parameters, self.flops, self.run.model
        return {
            "placement": model.placement.name,
            "gpus": self.case.gpus,
            "gpu": asdict(self.gpu),
            "precision": self.precision,
            "parameters": {**asdict(count), "total": count.total, "active": count.active, "published": count.published},
            "flops_per_token": {
                **asdict(flops),
                "model": flops.model,
                "causal": flops.causal,
                "hardware": flops.hardware,
            },
            "batch": {
                "sequences": self.run.data.batch_size,
                "context": model.context,
                "tokens": self.run.tokens_per_step,
                "micro_batch": self.case.micro_batch,
                "accumulate": self.accumulate,
            },
            "memory": {**self.memory.to_dict(), "norms": self.norms, "usable": self.capacity, "fits": self.fits},
            "alternatives": [
                {
                    "activation_checkpointing": case.checkpoint_blocks,
                    "chunked_loss": case.chunked_loss,
                    "peak": memory.peak,
                    "fits": memory.peak <= self.capacity,
                }
                for case, memory in self.alternatives()
            ],
            "time": {
                "mfu": self.mfu,
                "hfu": self.hardware_utilisation,
                "tokens_per_second": self.tokens_per_second,
                "seconds_per_step": self.run.tokens_per_step / self.tokens_per_second,
                "optimizer_seconds_per_step": self.optimizer_seconds,
                "tokens": self.tokens,
                "steps": self.steps,
                "days": self.seconds / 86400,
                "gpu_hours": self.gpu_hours,
            },
        }


def make_plan(
    run: RunConfig,
    gpu: Gpu,
    gpus: int = 1,
    *,
    mfu: float = 0.4,
    tokens: int | None = None,
    micro_batch: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        run: its batch is split evenly; its precision "auto" is bfloat16.
        gpu: the kind of GPU.
        gpus: how many.
        mfu: assumed model FLOPs utilisation, in (0, 1].
        tokens: number of tokens to train on; None for the run's own steps.
        micro_batch: sequences in a GPU's memory at once; None for as many as fit, or one if not even that fits.

    Raises:
        UserError: if the batch does not divide in this way, a tensor is too large to be counted, or the utilisation
            is out of range.
    """
    rows, rest = divmod(run.data.batch_size, gpus)
    if rest:
        raise UserError(
            f"a batch of {run.data.batch_size} sequences does not divide among {gpus} GPUs: "
            f"give --batch-size {(rows + 1) * gpus}, or another number of GPUs"
        )
    if micro_batch is not None and rows % micro_batch:
        raise UserError(f"micro-batches of {micro_batch} do not divide the {rows} sequences of one GPU")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu:g} is not a share of the peak: give more than 0 and at most 1")
    case = MemoryCase.of(run, gpus, micro_batch or _largest_fitting(run, gpu, gpus, rows))
    plan = Plan(run, gpu, case, measure_memory(case), mfu, tokens or run.steps * run.tokens_per_step)
    if plan.hardware_utilisation > 1:
        raise UserError(
            f"mfu={mfu:g} is too high: with recomputed FLOPs it takes {plan.hardware_utilisation:.0%} of the peak"
        )
    return plan


def _largest_fitting(run: RunConfig, gpu: Gpu, gpus: int, rows: int) -> int:
    """The largest micro-batch that divides the rows of a GPU and fits; 1 if none does."""

    def is_too_large(micro_batch: int) -> bool:
        try:
            return measure_memory(MemoryCase.of(run, gpus, micro_batch)).peak > _usable(gpu)
        except UserError:  # more bytes than can be counted
            return True

    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = sorted({*small, *(rows // n for n in small)})
    # memory grows with the micro-batch, so the first that is too large is found by halving
    return divisors[max(0, bisect_left(divisors, True, key=is_too_large) - 1)]


def _usable(gpu: Gpu) -> int:
    return int(USABLE * gpu.memory * 2**30)
