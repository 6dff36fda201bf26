"""Points at which a model shows a probe the tensors that hooks of modules cannot see.

Without a probe that records, a call only looks whether a list is empty. Under torch.compile a call costs nothing:
there `is_compiling()` is a constant, so no guard, graph break or recompilation comes of it. A probe runs its steps
eagerly.

A fused operation never forms some of the tensors that its points show. It computes them separately on recorded steps:

    if probe_points.recording():
        y = composed(...)               # with probe_points.projection(...)
    else:
        y = fused(...)
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Listener(Protocol):
    """Receives what the points show: one method a point, for the modules of its own model."""

    def output(self, where: nn.Module | str, y: Tensor) -> None: ...  # noqa: D102

    def projection(self, module: nn.Module, z: Tensor, y: Tensor) -> None: ...  # noqa: D102

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None: ...  # noqa: D102


_listeners: list[Listener] = []


def add(listener: Listener) -> None:
    """Show the points to a listener until `remove`; it must ignore modules of other models."""
    _listeners.append(listener)


def remove(listener: Listener) -> None:
    """Stop showing the points to a listener."""
    _listeners.remove(listener)


def recording() -> bool:
    """Whether anything listens; False while torch.compile traces."""
    return not torch.compiler.is_compiling() and bool(_listeners)


def output(where: nn.Module | str, y: Tensor) -> None:
    """Show an output `[..., N]`, whose gradient is recorded too.

    Args:
        where: the module whose output it is; or a name, if it is no module's output but the running model's.
        y: the output.
    """
    if recording():
        for listener in _listeners:
            listener.output(where, y)


def projection(module: nn.Module, z: Tensor, y: Tensor) -> None:
    """Show an SDD layer's output `y = alpha * norm(z) + b` and the z over which its norm was taken.

    Args:
        module: the layer; its eps and group are those of the norm.
        z: `V x`, `[..., N]`; of a joint norm, the whole vector.
        y: `[..., out_features]`.
    """
    if recording():
        for listener in _listeners:
            listener.projection(module, z, y)


def attention(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """Show the queries and keys of `softmax(q k^T / sqrt(D))`.

    Args:
        module: the module that attends.
        q: `[B, H, T, D]`.
        k: `[B, K, T, D]`, K dividing H.
        mask: True where attention is allowed, broadcast to `[B, H, T, T]`; None for causal.
    """
    if recording():
        for listener in _listeners:
            listener.attention(module, q, k, mask)
