"""What torch really keeps and holds, to set beside the plan's arithmetic."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sdd.models import LanguageModel, ModelConfig
from sdd.placement import Placement, placements
from sdd.plan.memory import Job


class CpuJob(Job):
    """A job on a CPU, where torch's flash kernel takes float32 and grouped heads."""

    @property
    def has_kernels(self) -> bool:
        return False

    @property
    def has_fused_attention(self) -> bool:
        return True


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


def forward(
    model: LanguageModel, batch: int, *, bfloat16: bool = False, z_loss: float = 0.0, fused: bool = True
) -> torch.Tensor:
    """The loss of a batch of drawn tokens."""
    config = model.config
    tokens = torch.randint(config.vocab_size, (batch, config.context + 1))
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bfloat16))
        return model(tokens[:, :-1], tokens[:, 1:], z_loss=z_loss)


def saved_bytes(model: LanguageModel, batch: int, **options: Any) -> int:
    """Bytes that the graph of one forward pass keeps, without weights and copies of them (cast, or times a gain)."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim > 1}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_copy = {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own and not is_copy:
            kept[pointer] = tensor  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, batch, **options)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call holds at once of what it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
