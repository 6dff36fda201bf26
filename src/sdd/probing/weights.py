"""Matrices, scales, their gradients, and how far a step moves them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdd.probing.sites import WatchedParameter
from sdd.probing.tally import Key, Tally, processes, rank, sum_of_squares


class Weights:
    """The parameters of one probed step.

    Of a sharded one, each process sums over its part; of what several processes hold alike, the first one does.

    Args:
        parameters: what to look at.
        tally: takes the sums.
    """

    def __init__(self, parameters: Sequence[WatchedParameter], tally: Tally) -> None:
        self._all, self._tally = parameters, tally
        self._counted = [watched for watched in parameters if _is_counted_here(watched.parameter)]
        self._matrices = [watched for watched in self._counted if watched.role == "weight"]
        self._has_gradients = False
        self._before: list[Tensor] | None = None

    def keys(self) -> list[Key]:
        """The keys of all sums, whether or not this process holds a part."""
        keys = [(watched.site, f"{watched.role}_{what}") for watched in self._all for what in ("norm", "grad_rms")]
        if self._before is None:
            return keys
        matrices = [watched for watched in self._all if watched.role == "weight"]
        return keys + [(watched.site, what) for watched in matrices for what in ("step", "radial")]

    @torch.no_grad()
    def gradients(self) -> None:
        """Sum the gradients as they are now; the first call of a step counts."""
        if self._has_gradients:
            return
        self._has_gradients = True
        for watched in self._counted:
            gradient = watched.parameter.grad
            if gradient is not None and not gradient.is_sparse:
                self._add(watched, f"{watched.role}_grad_rms", sum_of_squares(_rows(_part(gradient))))

    @torch.no_grad()
    def before_update(self) -> None:
        """Sum gradients and weights, and keep a copy of the matrices; the first call of a step counts."""
        self.gradients()
        if self._before is None:
            self._before = [_part(watched.parameter).clone() for watched in self._matrices]
            self._squares()

    @torch.no_grad()
    def after_update(self) -> None:
        """Sum what the step did; the copies are let go one by one. Without an update, sum the weights."""
        if self._before is None:
            self.gradients()
            self._squares()
            return
        self._before.reverse()
        for watched in self._matrices:
            before = self._before.pop()
            before = _rows(before.to(torch.promote_types(before.dtype, torch.float32)))
            step = _rows(_part(watched.parameter)) - before
            self._add(watched, "step", sum_of_squares(step))
            self._add(watched, "radial", torch.linalg.vecdot(step, before).sum())

    def _squares(self) -> None:
        for watched in self._counted:
            self._add(watched, f"{watched.role}_norm", sum_of_squares(_rows(_part(watched.parameter))))

    def _add(self, watched: WatchedParameter, what: str, total: Tensor) -> None:
        self._tally.add((watched.site, what), total, _part(watched.parameter).numel())


def angle(square: float, step: float, radial: float) -> float:
    """The angle between W and W + D in radians, from `||W||^2`, `||D||^2` and `<D, W>`.

    With u and v the two normalised, `||u - v||^2 = (||D||^2 - (|W+D| - |W|)^2) / (|W+D| |W|)` and
    `angle = 2 asin(||u - v|| / 2)`: unlike the arc cosine of their product, this keeps the digits of small angles.
    """
    change = 2 * radial + step
    lengths = math.sqrt(square), math.sqrt(max(square + change, 0.0))
    if not (math.isfinite(square + change) and min(lengths) > 0):
        return math.nan
    chord = max(step - (change / sum(lengths)) ** 2, 0.0) / (lengths[0] * lengths[1])
    return 2 * math.asin(min(math.sqrt(chord) / 2, 1.0))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def _part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    to_local = getattr(tensor, "to_local", None)  # a DTensor's; its class takes seconds to import
    return (tensor if to_local is None else to_local()).detach()


def _is_counted_here(tensor: Tensor) -> bool:
    """Whether no process before this one holds the same part of a tensor."""
    if processes() == 1:
        return True
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return rank() == 0
    coordinate = tensor.device_mesh.get_coordinate() or ()
    alike = [place for place, where in zip(coordinate, tensor.placements, strict=True) if where.is_replicate()]
    return not any(alike)
