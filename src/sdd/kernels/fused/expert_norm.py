"""`y = w * alpha_e * norm(z)` of rows sorted by expert, one kernel each way.

Equations and reference: `sdd.kernels.experts.expert_scaled_norm`. Saved for backward: z, and r with one float32 a row.
A program of the backward pass sums dalpha over rows of one expert, and its partial sums are added in a fixed order.
"""

from typing import Any

import torch
from torch import Tensor

from sdd.kernels.experts import check_expert_norm
from sdd.kernels.fused.common import (
    WIDE_BLOCK,
    Shape,
    cast,
    cdiv,
    dense,
    forbid_double_backward,
    launched_as,
    mean_square_kernel,
    n_programs,
    row_blocks,
    row_eps_of,
    rows,
    warps,
)
from sdd.kernels.fused.expert_norm_kernels import backward_kernel, backward_mean_kernel, forward_kernel

#: The most features that one program holds at once.
MAX_EXPERT = 8192
_BACKWARD_REGISTERS = 64


def _empty(
    z: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    row_eps: Tensor | None,
    eps: float,
    experts: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:1], dtype=torch.float32)


@launched_as("expert_scaled_norm", _empty)
def expert_norm_op(outputs, z, alpha, weights, row_eps, eps, experts, ends) -> None:
    """`y` in the dtype of z, and r `[M]`."""
    y, r = outputs
    z, row_eps = rows(z), dense(row_eps)
    n_rows, width = z.shape
    block, n_blocks = row_blocks(width, True, MAX_EXPERT)
    if n_blocks > 1:
        mean_square_kernel[(n_rows, 1)](z, r, width, z.stride(0), 1, BLOCK=WIDE_BLOCK, num_warps=8)
        r.add_(eps if row_eps is None else row_eps).rsqrt_()
    forward_kernel[(n_rows, n_blocks)](
        z, dense(alpha), dense(weights), row_eps, experts, y, r, width, z.stride(0), eps,
        WEIGHTS=weights is not None, ROW_EPS=row_eps is not None, BY_COLUMN=n_blocks > 1,
        BLOCK=block, num_warps=warps(block, 16),
    )  # fmt: skip


def _empty_backward(
    dy: Tensor,
    z: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    r: Tensor,
    experts: Tensor,
    ends: Tensor,
    row_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape),
        r.new_empty(alpha.shape),
        r.new_empty((0,) if weights is None else r.shape),
        r.new_empty(r.shape if row_eps else (0,)),
    )


@launched_as("expert_scaled_norm_backward", _empty_backward)
def expert_norm_backward_op(outputs, dy, z, alpha, weights, r, experts, ends, row_eps) -> None:
    """`dz` in the dtype of z; dalpha `[E, O]`, dw and deps `[M]` in float32, the last two empty unless asked for."""
    dz, dalpha, dweights, deps = outputs
    dy, z, alpha_flat, weights = rows(dy), rows(z), dense(alpha), dense(weights)
    n_rows, width = z.shape
    block, n_blocks = row_blocks(width, True, MAX_EXPERT)
    wants_mean = weights is not None or row_eps
    mean = torch.empty_like(r) if wants_mean or n_blocks > 1 else None
    if n_blocks > 1:
        backward_mean_kernel[(n_rows,)](
            dy, z, alpha_flat, experts, r, mean, width, dy.stride(0), z.stride(0), BLOCK=2048, num_warps=8
        )
    n_experts = len(ends)
    # twice as many programs in all, as experts have unlike numbers of rows
    shape = Shape(block, n_blocks, warps(block, 4), _BACKWARD_REGISTERS)
    an_expert = cdiv(2 * n_programs(z, n_rows, shape, n_blocks), n_experts)
    partial = r.new_empty(n_experts, an_expert, width)
    backward_kernel[(n_experts * an_expert, n_blocks)](
        dy, z, alpha_flat, weights, ends, r, mean, dz, partial, width, dy.stride(0), z.stride(0), an_expert,
        WEIGHTS=weights is not None, STORE_MEAN=wants_mean, BY_COLUMN=n_blocks > 1,
        BLOCK=block, **shape.resources,
    )  # fmt: skip
    torch.sum(partial, 1, out=dalpha)
    if mean is None:
        return
    mean *= width
    if weights is not None:
        dweights.copy_(mean)
        mean *= weights
    if row_eps:
        torch.mul(mean, r.square(), out=deps).mul_(-0.5)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, alpha, weights, _, _, experts, ends = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, alpha, weights, output[1], experts, ends)


def _backward(ctx: Any, dy: Tensor | None, _r: None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("expert_scaled_norm")
    if dy is None:
        return (None,) * 7
    z, alpha, weights, r, experts, ends = ctx.saved_tensors
    has_row_eps = ctx.needs_input_grad[3]
    dz, dalpha, dweights, deps = expert_norm_backward_op(dy, z, alpha, weights, r, experts, ends, has_row_eps)
    return dz, cast(dalpha, alpha), cast(dweights, weights), deps if has_row_eps else None, None, None, None


expert_norm_op.register_autograd(_backward, setup_context=_setup_context)


def expert_scaled_norm(z, alpha, order, weights=None, *, eps) -> Tensor:
    """`w * alpha_e * norm(z)`."""
    check_expert_norm(z, alpha, order, weights)
    return expert_norm_op(z, alpha, weights, *row_eps_of(eps, z), order.experts_M, order.ends_E)[0]
