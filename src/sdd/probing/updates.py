"""How far a step moves the weights: the update ratio `||dW|| / ||W||`, the angle, and the gradients behind them.

`ParameterSums` adds up squares before and after the optimiser step; `update_ratio` and `angle` turn them into numbers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdd.probing.sums import Key, StepSums, processes, rank, sum_of_squares
from sdd.probing.watched import WatchedParameter


def update_ratio(square: float, step: float) -> float:
    """The update ratio `||D|| / ||W||` of a step from W to W + D, from `||W||^2` and `||D||^2`."""
    if square:
        return math.sqrt(step / square)
    return math.inf if step > 0 else math.nan


def angle(square: float, step: float, radial: float) -> float:
    """The angle between W and W + D in radians, from `||W||^2`, `||D||^2` and `<D, W>`.

    With u and v the two normalised, `||u - v||^2 = (||D||^2 - (|W+D| - |W|)^2) / (|W+D| |W|)` and
    `angle = 2 asin(||u - v|| / 2)`. Unlike the arc cosine of their product, this keeps the digits of small angles.
    """
    change = 2 * radial + step
    lengths = math.sqrt(square), math.sqrt(max(square + change, 0.0))
    if not (math.isfinite(square + change) and min(lengths) > 0):
        return math.nan
    chord = max(step - (change / sum(lengths)) ** 2, 0.0) / (lengths[0] * lengths[1])
    return 2 * math.asin(min(math.sqrt(chord) / 2, 1.0))


class ParameterSums:
    """The sums over weights, gradients and updates of one probed step.

    Each process sums over its own part of a sharded parameter. Where several processes hold the same part, only the
    first of them counts it.

    Args:
        parameters: the parameters to sum over.
        sums: receives the sums.
    """

    def __init__(self, parameters: Sequence[WatchedParameter], sums: StepSums) -> None:
        self._all, self._sums = parameters, sums
        self._counted = [watched for watched in parameters if _is_counted_here(watched.parameter)]
        self._matrices = [watched for watched in self._counted if watched.role == "weight"]
        self._has_gradients = False
        self._before: list[Tensor] | None = None

    def keys(self) -> list[Key]:
        """The keys of all sums, whether or not this process holds a part."""
        keys = [(watched.name, f"{watched.role}_{stat}") for watched in self._all for stat in ("norm", "grad_rms")]
        if self._before is not None:
            matrices = [watched.name for watched in self._all if watched.role == "weight"]
            keys += [(name, stat) for name in matrices for stat in ("step", "radial")]
        return keys

    @torch.no_grad()
    def gradients(self) -> None:
        """Sum the gradients as they are now; only the first call of a step does anything."""
        if self._has_gradients:
            return
        self._has_gradients = True
        for watched in self._counted:
            gradient = watched.parameter.grad
            if gradient is not None and not gradient.is_sparse:
                self._add(watched, f"{watched.role}_grad_rms", sum_of_squares(_rows(_local(gradient))))

    @torch.no_grad()
    def before_update(self) -> None:
        """Sum gradients and weights, and keep a copy of the matrices; only the first call of a step does anything."""
        self.gradients()
        if self._before is None:
            self._before = [_local(watched.parameter).clone() for watched in self._matrices]
            self._sum_weights()

    @torch.no_grad()
    def after_update(self) -> None:
        """Sum the changes, letting go of the copies one by one; if nothing was updated, sum the weights."""
        if self._before is None:
            self.gradients()
            self._sum_weights()
            return
        self._before.reverse()
        for watched in self._matrices:
            before = self._before.pop()
            before = _rows(before.to(torch.promote_types(before.dtype, torch.float32)))
            step = _rows(_local(watched.parameter)) - before
            self._add(watched, "step", sum_of_squares(step))
            self._add(watched, "radial", torch.linalg.vecdot(step, before).sum())

    def _sum_weights(self) -> None:
        for watched in self._counted:
            self._add(watched, f"{watched.role}_norm", sum_of_squares(_rows(_local(watched.parameter))))

    def _add(self, watched: WatchedParameter, stat: str, total: Tensor) -> None:
        self._sums.add((watched.name, stat), total, _local(watched.parameter).numel())


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    to_local = getattr(tensor, "to_local", None)  # a DTensor has it; to import its class takes seconds
    return (tensor if to_local is None else to_local()).detach()


def _is_counted_here(tensor: Tensor) -> bool:
    """Whether this process is the first to hold its part of a tensor."""
    if processes() == 1:
        return True
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return rank() == 0
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return not any(place for place, where in zip(coordinate, tensor.placements, strict=True) if where.is_replicate())
