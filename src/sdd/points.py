"""Points at which a model shows a probe what a module's hooks cannot see.

Without a probe that records, a call is one look at a variable. Under torch.compile it is nothing at all: there
`is_compiling()` is a constant, so that no guard, graph break or recompilation comes of it, and a probe runs its steps
eagerly.

A fused operation that never forms what its points show computes it apart on recorded steps:

    if points.recording():
        y = composed(...)               # with points.projection(...)
    else:
        y = fused(...)
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Recorder(Protocol):
    """What a probe does at the points; see the functions of the same names."""

    def output(self, site: nn.Module | str, y: Tensor) -> None:
        """See `output`."""
        ...

    def projection(self, module: nn.Module, z: Tensor, y: Tensor) -> None:
        """See `projection`."""
        ...

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """See `attention`."""
        ...


_recorder: Recorder | None = None


def set_recorder(recorder: Recorder | None) -> Recorder | None:
    """Begin or end (None) to record.

    Returns:
        The recorder before.
    """
    global _recorder
    before, _recorder = _recorder, recorder
    return before


def recording() -> bool:
    """Whether a probe records."""
    return not torch.compiler.is_compiling() and _recorder is not None


def output(site: nn.Module | str, y: Tensor) -> None:
    """Show an output `[..., N]` of a module, or of something that is none, by name; its gradient is recorded too."""
    if not torch.compiler.is_compiling() and _recorder is not None:
        _recorder.output(site, y)


def projection(module: nn.Module, z: Tensor, y: Tensor) -> None:
    """Show an SDDLinear's output `y = alpha * norm(z) + b` and the z over which its norm was taken.

    Args:
        module: the SDDLinear; says group and eps.
        z: `V x`, `[..., N]`; of a joint norm, the whole vector.
        y: `[..., out_features]`.
    """
    if not torch.compiler.is_compiling() and _recorder is not None:
        _recorder.projection(module, z, y)


def attention(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """Show the queries and keys that meet in `softmax(q k^T / sqrt(D))`.

    Args:
        module: the module that attends.
        q: `[B, H, T, D]`.
        k: `[B, K, T, D]`, K dividing H.
        mask: True where attention is allowed, broadcast to `[B, H, T, T]`; None for causal.
    """
    if not torch.compiler.is_compiling() and _recorder is not None:
        _recorder.attention(module, q, k, mask)
