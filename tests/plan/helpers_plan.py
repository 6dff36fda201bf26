"""Cases to measure, and what torch's profiler sees of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sdd.models import ModelConfig, MoEConfig
from sdd.placement import Placement, placements
from sdd.plan import MemoryCase
from sdd.train import OptimConfig, preset


class CpuCase(MemoryCase):
    """A case on a CPU, where operations are composed and torch's flash kernel takes float32 and grouped heads."""

    @property
    def has_kernels(self) -> bool:
        return False

    @property
    def has_fused_attention(self) -> bool:
        return True


class KernelCase(CpuCase):
    """A case with fused kernels, which Triton interprets on a CPU."""

    @property
    def has_kernels(self) -> bool:
        return True


class UnfusedCase(CpuCase):
    """A case whose attention writes the context x context weights."""

    @property
    def has_fused_attention(self) -> bool:
        return False


def make_case(
    model: ModelConfig,
    gpus: int = 1,
    micro_batch: int = 1,
    *,
    bfloat16: bool = False,
    checkpoint: bool = False,
    chunked: bool = False,
    z_loss: float = 0.0,
    kind: type[MemoryCase] = CpuCase,
) -> Any:
    run = replace(
        preset("nano"),
        model=model,
        precision="bfloat16" if bfloat16 else "float32",
        activation_checkpointing=checkpoint,
        chunked_loss=chunked,
        optim=OptimConfig(z_loss=z_loss),
    )
    return kind(run, gpus, micro_batch)


def small_config(placement: str | Placement, **changes: Any) -> ModelConfig:
    """The presets' proportions, narrow; activations outweigh the allocator's rounding."""
    shape: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 32,
        "d_ff": 80,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 300,
        "context": 48,
        "placement": placements[placement] if isinstance(placement, str) else placement,
    }
    return ModelConfig(**shape | changes)


def mixture_config(placement: str, **changes: Any) -> ModelConfig:
    """The same with experts, a shared one among them."""
    moe = MoEConfig(4, 2, d_shared=24, renormalise=True)
    return small_config(placement, **{"d_ff": 40, "moe": moe} | changes)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call holds at once of what it allocates, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
