"""The parameters of SDD layers: how V is drawn, and how alpha is made and kept in float32."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def new_alpha(weight: Tensor, shape: tuple[int, ...], value: float) -> nn.Parameter:
    """Alpha for a weight: on its device, in at least float32, trained if the weight is."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(torch.full(shape, value, device=weight.device, dtype=dtype), weight.requires_grad)


def whole(weight: Tensor) -> Tensor:
    """All of a matrix of which each process holds some rows (a DTensor); others are returned as they are.

    The backward pass adds up the gradients of the processes, each of which uses the matrix for other tokens.
    """
    if not hasattr(weight, "device_mesh"):
        return weight
    from torch.distributed.tensor import DTensor, Partial, Replicate  # takes seconds to import

    assert isinstance(weight, DTensor)
    n = weight.device_mesh.ndim
    return weight.redistribute(placements=[Replicate()] * n).to_local(grad_placements=[Partial()] * n)


def held(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds; its gradient is that of the part."""
    to_local = getattr(parameter, "to_local", None)  # a DTensor has it; to import its class takes seconds
    return parameter if to_local is None else to_local()


#: Of the paper's standard deviation, as in the placement `sdd`: the norm takes the scale of V away, and a step turns a
#: small V further.
DRAW_FACTOR = 0.5


@torch.no_grad()
def draw_(weight: Tensor, in_features: int, generator: torch.Generator | None = None) -> None:
    """Fill a matrix, or stacked ones, from N(0, 1/(2 sqrt(2.5 N))) truncated at 3 std, N its input features.

    Values are drawn in float32 and then rounded, so that a seed gives a half-precision model the values of the float32
    one; on the generator's device, or the weight's. On the meta device nothing is drawn.

    Source: arXiv 2502.15499, at half its standard deviation, see `DRAW_FACTOR`.
    """
    std = DRAW_FACTOR / math.sqrt(2.5 * in_features)
    drawn = torch.empty(
        weight.shape,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        device=weight.device if generator is None else generator.device,
    )
    weight.copy_(nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator))


def keep_wide(module: M, names: Sequence[str], apply: Callable[[], M]) -> M:
    """Run a module's `_apply`; then widen the tensors of these names to float32 where it made them narrower.

    Their values and gradients keep every bit, and they follow the module to another device.
    """
    wide = {name: getattr(module, name) for name in names}
    data = {name: value.data for name, value in wide.items()}
    grads = {name: None if value.grad is None else value.grad.data for name, value in wide.items()}
    apply()
    for name in names:
        alpha: Tensor = getattr(module, name)
        if alpha.is_floating_point() and alpha.dtype != torch.promote_types(alpha.dtype, torch.float32):
            grad, alpha.grad = grads[name], None
            alpha.data = data[name].to(alpha.device, torch.float32)
            alpha.grad = None if grad is None else grad.to(alpha.device, torch.float32)
    return module


def widen(module: nn.Module, names: Sequence[str]) -> None:
    """Give parameters of these names float32 where they are narrower, as after loading with `assign=True`."""
    for name in names:
        alpha = module._parameters.get(name)
        if alpha is not None and alpha.dtype != torch.promote_types(alpha.dtype, torch.float32):
            setattr(module, name, nn.Parameter(alpha.detach().float(), alpha.requires_grad))
