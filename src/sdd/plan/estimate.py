"""What a run needs of given GPUs: memory, time, GPU-hours."""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from typing import Any

from sdd.errors import UserError
from sdd.models import ParameterCount, count_parameters
from sdd.models.flops import TrainingFlops, training_flops
from sdd.plan.gpus import Gpu
from sdd.plan.memory import Job, Memory, alternatives, count_memory
from sdd.train import RunConfig

#: Share of a GPU's memory that a plan may fill; CUDA, NCCL and the allocator's gaps take the rest.
USABLE = 0.9


@dataclass(frozen=True)
class Plan:
    """A run on GPUs, before anything is run.

    Attributes:
        run: the run.
        gpu: the kind of GPU.
        job: number of GPUs, sequences in memory at once, precision and what is recomputed.
        memory: of one GPU.
        mfu: assumed model FLOPs utilisation: the model's FLOPs a second over the GPUs' dense peak.
        tokens: to be trained on.
    """

    run: RunConfig
    gpu: Gpu
    job: Job
    memory: Memory
    mfu: float
    tokens: int

    @property
    def parameters(self) -> ParameterCount:
        """By role."""
        return count_parameters(self.run.model)

    @property
    def flops(self) -> TrainingFlops:
        """Of a token, forward and backward."""
        job = self.job
        return training_flops(
            job.model, checkpoint_blocks=job.checkpoint_blocks, fused_attention=job.has_fused_attention
        )

    @property
    def precision(self) -> str:
        """Of matrix products: "bfloat16" or "float32"."""
        return "bfloat16" if self.job.bfloat16 else "float32"

    @property
    def accumulate(self) -> int:
        """`--accumulate`: micro-batches of a step, over all GPUs."""
        return self.run.data.batch_size // self.job.micro_batch

    @property
    def capacity(self) -> int:
        """Bytes of one GPU that the plan may fill."""
        return _usable(self.gpu)

    @property
    def fits(self) -> bool:
        """Whether the peak is within that."""
        return self.memory.peak <= self.capacity

    @property
    def hardware_utilisation(self) -> float:
        """What the MFU asks of the machine, recomputation counted (HFU)."""
        return self.mfu * self.flops.hardware / self.flops.model

    @property
    def tokens_per_second(self) -> float:
        """On all GPUs: `gpus * mfu * peak / model FLOPs a token`."""
        return self.job.gpus * self.mfu * self.gpu.peak(self.precision) / self.flops.model

    @property
    def steps(self) -> int:
        """Steps that the tokens make."""
        return math.ceil(self.tokens / self.run.tokens_per_step)

    @property
    def seconds(self) -> float:
        """Of training, evaluations and checkpoints not counted."""
        return self.steps * self.run.tokens_per_step / self.tokens_per_second

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.seconds / 3600 * self.job.gpus

    @property
    def optimizer_seconds(self) -> float:
        """Least time of AdamW in a step: it reads four float32 numbers a parameter and writes three."""
        return 28 * (self.memory.weights / 4) / (self.gpu.bandwidth * 1e9)

    def alternatives(self) -> list[tuple[Job, Memory]]:
        """The memory with and without activation checkpointing and the chunked loss, at the same micro-batch."""
        return alternatives(self.job)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON: bytes, seconds, FLOPs, tokens."""
        count, flops, model = self.parameters, self.flops, self.run.model
        return {
            "placement": model.placement.name,
            "gpus": self.job.gpus,
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
                "micro_batch": self.job.micro_batch,
                "accumulate": self.accumulate,
            },
            "memory": {**self.memory.to_dict(), "usable": self.capacity, "fits": self.fits},
            "alternatives": [
                {
                    "activation_checkpointing": job.checkpoint_blocks,
                    "chunked_loss": job.chunked_loss,
                    "peak": memory.peak,
                    "fits": memory.peak <= self.capacity,
                }
                for job, memory in self.alternatives()
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
        tokens: to be trained on; None for the run's own steps.
        micro_batch: sequences in a GPU's memory at once; None for as many as fit, and one if none does.

    Raises:
        UserError: if the batch cannot be split so, or the utilisation is out of range.
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
    job = _largest_fitting(run, gpu, gpus, rows) if micro_batch is None else Job.of(run, gpus, micro_batch)
    plan = Plan(run, gpu, job, count_memory(job), mfu, tokens or run.steps * run.tokens_per_step)
    if plan.hardware_utilisation > 1:
        raise UserError(
            f"mfu={mfu:g} cannot be: with what is recomputed it is {plan.hardware_utilisation:.0%} of the peak"
        )
    return plan


def _largest_fitting(run: RunConfig, gpu: Gpu, gpus: int, rows: int) -> Job:
    """The job with the largest micro-batch that fits and divides the rows of a GPU; else with one sequence."""

    def fits(micro_batch: int) -> bool:
        return count_memory(Job.of(run, gpus, micro_batch)).peak <= _usable(gpu)

    # memory grows with the micro-batch: the first that does not fit is found by halving
    first_too_large = bisect_left(range(1, rows + 1), True, key=lambda micro_batch: not fits(micro_batch)) + 1
    return Job.of(run, gpus, next((n for n in range(first_too_large - 1, 0, -1) if rows % n == 0), 1))


def _usable(gpu: Gpu) -> int:
    return int(USABLE * gpu.memory * 2**30)
