"""A plan: memory, time and GPU-hours of a run on given GPUs."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

from sdd.errors import UserError
from sdd.models import ParameterCount, count_parameters
from sdd.models.flops import TrainingFlops, training_flops
from sdd.parallel.layout import divisors
from sdd.plan.gpus import Gpu
from sdd.plan.measure import MemoryCase
from sdd.plan.memory import Memory, bare_activations, measure_memory
from sdd.plan.optimizer import OptimizerCost, optimizer_cost
from sdd.train import RunConfig

#: Share of a GPU's memory that a plan may fill; CUDA, NCCL and the allocator's gaps take the rest.
USABLE = 0.9


@dataclass(frozen=True)
class Plan:
    """A run on GPUs, before anything is run.

    Attributes:
        case: the run, the number of GPUs and the micro-batch.
        gpu: the kind of GPU.
        memory: of one GPU.
        mfu: assumed model FLOPs utilisation: the model's FLOPs a second over the GPUs' dense peak.
        tokens: number of tokens to train on.
    """

    case: MemoryCase
    gpu: Gpu
    memory: Memory
    mfu: float
    tokens: int

    @cached_property
    def parameters(self) -> ParameterCount:
        """The model's parameters by role."""
        return count_parameters(self.case.model)

    @cached_property
    def flops(self) -> TrainingFlops:
        """FLOPs of a token, forward and backward."""
        case = self.case
        return training_flops(
            case.model,
            checkpoint_blocks=case.run.activation_checkpointing,
            fused_attention=case.has_fused_attention,
        )

    @property
    def precision(self) -> str:
        """The precision of matrix products: "bfloat16" or "float32"."""
        return "bfloat16" if self.case.bfloat16 else "float32"

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step over all GPUs: the value of `--accumulate`."""
        return self.case.run.data.batch_size // self.case.micro_batch

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
        return math.ceil(self.tokens / self.case.run.tokens_per_step)

    @property
    def seconds(self) -> float:
        """Duration of training, without evaluations and checkpoints."""
        return self.steps * self.case.run.tokens_per_step / self.tokens_per_second

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.seconds / 3600 * self.case.gpus

    @property
    def optimizer_seconds(self) -> float:
        """Least time of the optimiser in a step: its traffic at the full bandwidth, its FLOPs at the utilisation."""
        cost = self.optimizer
        return cost.traffic / (self.gpu.bandwidth * 1e9) + cost.flops / (self.mfu * self.gpu.peak(self.precision))

    @cached_property
    def optimizer(self) -> OptimizerCost:
        """What the optimiser costs."""
        return optimizer_cost(self.case, self.memory.weights // 4)

    @cached_property
    def norms(self) -> int:
        """Bytes of the activations that a model without any norm would not keep."""
        return self.memory.activations - bare_activations(self.case)

    def alternatives(self) -> list[tuple[MemoryCase, Memory]]:
        """The memory with and without activation checkpointing and the chunked loss, at the same micro-batch."""
        run = self.case.run
        options = product((False, True), (False,) if run.optim.z_loss else (False, True))
        runs = [replace(run, activation_checkpointing=blocks, chunked_loss=chunked) for blocks, chunked in options]
        cases = [replace(self.case, run=run) for run in runs]
        return [(case, self.memory if case == self.case else measure_memory(case)) for case in cases]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON: bytes, seconds, FLOPs, tokens."""
        count, flops, run = self.parameters, self.flops, self.case.run
        return {
            "placement": run.model.placement.name,
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
                "sequences": run.data.batch_size,
                "context": run.model.context,
                "tokens": run.tokens_per_step,
                "micro_batch": self.case.micro_batch,
                "accumulate": self.accumulate,
            },
            "memory": {**self.memory.to_dict(), "norms": self.norms, "usable": self.capacity, "fits": self.fits},
            "alternatives": [
                {
                    "activation_checkpointing": case.run.activation_checkpointing,
                    "chunked_loss": case.run.chunked_loss,
                    "peak": memory.peak,
                    "fits": memory.peak <= self.capacity,
                }
                for case, memory in self.alternatives()
            ],
            "time": {
                "mfu": self.mfu,
                "hfu": self.hardware_utilisation,
                "tokens_per_second": self.tokens_per_second,
                "seconds_per_step": run.tokens_per_step / self.tokens_per_second,
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
    check_share(mfu)
    cases = [MemoryCase(run, gpus, n) for n in (divisors(rows) if micro_batch is None else [micro_batch])]
    case, memory = _largest_fitting(cases, gpu)
    plan = Plan(case, gpu, memory, mfu, tokens or run.steps * run.tokens_per_step)
    if plan.hardware_utilisation > 1:
        raise UserError(
            f"mfu={mfu:g} is too high: with recomputed FLOPs it takes {plan.hardware_utilisation:.0%} of the peak"
        )
    return plan


def check_share(mfu: float) -> None:
    """Refuse a utilisation that is none.

    Raises:
        UserError: if it is not in (0, 1].
    """
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu:g} is not a share of the peak: give more than 0 and at most 1")


def _largest_fitting(cases: Sequence[MemoryCase], gpu: Gpu) -> tuple[MemoryCase, Memory]:
    """The last case that fits, or the first if none does, and its memory, which must grow from case to case."""
    measured = cache(lambda index: measure_memory(cases[index]))

    def is_too_large(index: int) -> bool:
        try:
            return measured(index).peak > _usable(gpu)
        except UserError:  # more bytes than can be counted
            return True

    index = max(0, bisect_left(range(len(cases)), True, key=is_too_large) - 1)
    return cases[index], measured(index)


def _usable(gpu: Gpu) -> int:
    return int(USABLE * gpu.memory * 2**30)
