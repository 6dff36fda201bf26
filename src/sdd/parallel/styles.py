"""Styles for torch's `parallelize_module`: how a layer is cut.

    from torch.distributed.tensor.parallel import parallelize_module
    parallelize_module(model, mesh["tensor"], {
        "layers.*.self_attn.q_proj": ColwiseSDD(),
        "layers.*.self_attn.q_norm": ShardedNorm(),      # a full-width norm of features that are cut
        "layers.*.self_attn.o_proj": RowwiseSDD(),
    })

They take `SDDLinear` and, for the layers of a plan that were left as they are, `nn.Linear`. Inputs and outputs are
plain tensors. Gradients are complete on every process after the backward pass, those of the whole vectors too.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from sdd.errors import UserError
from sdd.functional import norm
from sdd.nn import RMSNorm, SDDLinear
from sdd.parallel.exchange import gathered, scattered, shared, summed
from sdd.parallel.layers import (
    ColwiseLinear,
    ColwiseSDDLinear,
    CutRMSNorm,
    Exchange,
    ForeignRMSNorm,
    RowwiseLinear,
    RowwiseSDDLinear,
    cut_matrix,
)


class ColwiseSDD(ParallelStyle):
    """Cut the output features: each process holds some rows of V, and has as output the features that they give.

    A norm of full width spans all processes: one all-reduce of one float32 a token forward and one backward. A norm in
    groups (heads) needs none, because a process must hold whole groups.

    Args:
        input_layouts: `Replicate()` if every process has the whole input, `Shard(dim)` if each has a part of it along a
            dimension (the sequence), which is then gathered; None if the input has been prepared elsewhere, so that its
            gradient is added up there.

    Raises:
        UserError: on application, if the processes do not divide the features or the groups.
    """

    def __init__(self, *, input_layouts: Placement | None = Replicate()) -> None:  # noqa: B008
        super().__init__()
        self.input_layouts = input_layouts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return cut_colwise(module, device_mesh, _before(self.input_layouts, device_mesh))


class RowwiseSDD(ParallelStyle):
    """Cut the input features: each process holds some columns of V, and the norm comes after the sum over processes.

    Args:
        output_layouts: `Replicate()` if every process gets the whole output, `Shard(dim)` if each gets a part of it
            along a dimension (the sequence), of which it then computes the norm alone.

    Raises:
        UserError: on application, if the processes do not divide the features.
    """

    def __init__(self, *, output_layouts: Placement = Replicate()) -> None:  # noqa: B008
        super().__init__()
        self.output_layouts = output_layouts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layout = self.output_layouts
        if isinstance(layout, Shard):
            return cut_rowwise(module, device_mesh, partial(scattered, mesh=device_mesh, dim=layout.dim))
        return cut_rowwise(module, device_mesh, partial(summed, mesh=device_mesh), adds_up=False)


class ShardedNorm(ParallelStyle):
    """Compute a root-mean-square norm of features that are cut, after a `ColwiseSDD` layer.

    It takes `sdd.RMSNorm` and norms of other libraries that compute `weight * x / sqrt(mean(x^2) + eps)`; a small input
    shows whether one does.

    Raises:
        UserError: on application, if the module is another norm.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return cut_norm(module, device_mesh)


def cut_colwise(module: nn.Module, mesh: DeviceMesh, exchange: Exchange, adds_up: bool = True) -> nn.Module:
    """Cut the output features of a layer, in place; see `ColwiseSDD`."""
    _check_kind(module, "ColwiseSDD")
    _check_width(module, mesh, "out_features")
    if isinstance(module, SDDLinear):
        _check_groups(module, mesh)
    return _become(module, ColwiseLinear, ColwiseSDDLinear, mesh, exchange, adds_up, dim=0)


def cut_rowwise(module: nn.Module, mesh: DeviceMesh, exchange: Exchange, adds_up: bool = True) -> nn.Module:
    """Cut the input features of a layer, in place; see `RowwiseSDD`."""
    _check_kind(module, "RowwiseSDD")
    _check_width(module, mesh, "in_features")
    return _become(module, RowwiseLinear, RowwiseSDDLinear, mesh, exchange, adds_up, dim=1)


def cut_norm(module: nn.Module, mesh: DeviceMesh, adds_up: bool = True) -> nn.Module:
    """Make a norm one of cut features, in place; see `ShardedNorm`."""
    kind = CutRMSNorm if type(module) is RMSNorm else ForeignRMSNorm
    if kind is ForeignRMSNorm and not _is_rms_norm(module):
        raise UserError(
            f"ShardedNorm is for norms weight * x / sqrt(mean(x^2) + eps); a {type(module).__name__} computes "
            "something else"
        )
    vars(module).update(mesh=mesh, adds_up=adds_up)
    module.__class__ = kind if kind is CutRMSNorm else type(f"Cut{type(module).__name__}", (kind, type(module)), {})
    return module


def _before(layout: Placement | None, mesh: DeviceMesh) -> Exchange:
    if layout is None:
        return _as_it_is
    if isinstance(layout, Shard):
        return partial(gathered, mesh=mesh, dim=layout.dim)
    return partial(shared, mesh=mesh)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _become(
    module: nn.Module,
    plain: type[nn.Module],
    sdd: type[nn.Module],
    mesh: DeviceMesh,
    exchange: Exchange,
    adds_up: bool,
    dim: int,
) -> nn.Module:
    cut_matrix(module, mesh, dim)
    vars(module).update(mesh=mesh, exchange=exchange, adds_up=adds_up)
    object.__setattr__(module, "__class__", sdd if isinstance(module, SDDLinear) else plain)
    return module


def _check_kind(module: nn.Module, style: str) -> None:
    if type(module) not in (nn.Linear, SDDLinear):
        raise UserError(f"{style} cuts SDDLinear and nn.Linear, not {type(module).__name__}")


def _check_width(module: nn.Module, mesh: DeviceMesh, name: str) -> None:
    if getattr(module, name) % mesh.size():
        raise UserError(f"{mesh.size()} processes do not divide {name}={getattr(module, name)} of {module}")


def _check_groups(layer: SDDLinear, mesh: DeviceMesh) -> None:
    width = layer.out_features // mesh.size()
    if len(layer.parts) > 1 or not layer.parts[0][1]:
        raise UserError(f"a fused projection is not cut, since its parts {list(layer.parts)} lie one after the other")
    group = layer.parts[0][1]
    if group < layer.out_features and width % group:
        heads = layer.out_features // group
        raise UserError(
            f"{mesh.size()} processes do not divide the {heads} heads of {layer}: keep it whole, or take a divisor of "
            f"{heads}"
        )


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a foreign norm computes `weight * norm(x)`, seen on a small input."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float) or weight.is_meta:
        return False
    x = torch.linspace(-1.0, 2.0, 3 * len(weight), device=weight.device, dtype=weight.dtype).view(3, -1)
    try:
        y: Any = module(x)
    except Exception:  # whatever a foreign module raises, it is no such norm
        return False
    expected = (weight * norm(x, eps)).to(weight.dtype)
    return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-2, atol=1e-3)
