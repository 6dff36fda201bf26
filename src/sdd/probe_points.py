"""Points at which a model shows a probe what a module's hooks cannot see.

Without a probe that records, a call is one look at a list. Under torch.compile it is nothing at all: there
`is_compiling()` is a constant, so that no guard, graph break or recompilation comes of it, and a probe runs its steps
eagerly.

A fused operation that never forms what its points show computes it apart on recorded steps:

    if probe_points.recording():
        y = composed(...)               # with probe_points.projection(...)
    else:
        y = fused(...)
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Recorder(Protocol):
    """What a probe does at the points: the functions of these names, for the modules that are its own."""

    def output(self, site: nn.Module | str, y: Tensor) -> None: ...  # noqa: D102

    def projection(self, module: nn.Module, z: Tensor, y: Tensor) -> None: ...  # noqa: D102

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None: ...  # noqa: D102


_recorders: list[Recorder] = []


def add(recorder: Recorder) -> None:
    """Show the points to a recorder, until `remove`; it must pass over the modules that are not its own."""
    _recorders.append(recorder)


def remove(recorder: Recorder) -> None:
    """Show them to it no more."""
    _recorders.remove(recorder)


def recording() -> bool:
    """Whether anything records."""
    return not torch.compiler.is_compiling() and bool(_recorders)


def output(site: nn.Module | str, y: Tensor) -> None:
    """Show an output `[..., N]`, whose gradient is recorded too.

    Args:
        site: the module whose output it is; or the name of something that is none, in the model that is running.
        y: the output.
    """
    if recording():
        for recorder in _recorders:
            recorder.output(site, y)


def projection(module: nn.Module, z: Tensor, y: Tensor) -> None:
    """Show an SDDLinear's output `y = alpha * norm(z) + b` and the z over which its norm was taken.

    Args:
        module: the SDDLinear; says group and eps.
        z: `V x`, `[..., N]`; of a joint norm, the whole vector.
        y: `[..., out_features]`.
    """
    if recording():
        for recorder in _recorders:
            recorder.projection(module, z, y)


def attention(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """Show the queries and keys that meet in `softmax(q k^T / sqrt(D))`.

    Args:
        module: the module that attends.
        q: `[B, H, T, D]`.
        k: `[B, K, T, D]`, K dividing H.
        mask: True where attention is allowed, broadcast to `[B, H, T, T]`; None for causal.
    """
    if recording():
        for recorder in _recorders:
            recorder.attention(module, q, k, mask)
