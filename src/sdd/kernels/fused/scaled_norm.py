"""`y = alpha * norm(z) + b` in one kernel each way: reference `sdd.functional.scaled_norm`.

Saved for backward: z and r = 1/sqrt(mean(z^2) + eps), one float32 for each row and group. Where y is in a narrower
dtype than z, n in that dtype takes the place of z: half of the bytes, and no more error than the rounding of dy brings.
With n = r*z

    dalpha = sum over rows of dy*n            db = sum over rows of dy
    dz     = r * (alpha*dy - n*m)             m = mean(alpha*dy*n)              deps = -r^2/2 * sum(alpha*dy*n)
"""

from typing import Any

import torch
from torch import Tensor

from sdd.kernels.fused.common import cast, dense, forbid_double_backward, launched_as, pairs, parts_of, row_eps_of, rows
from sdd.kernels.fused.scaled_norm_kernels import differentiate, normalise
from sdd.norm_groups import resolve_group, split_alpha


def narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether numbers of this dtype take fewer bytes than those of the other."""
    return dtype.itemsize < other.itemsize


def _empty(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    row_eps: Tensor | None,
    eps: float,
    parts: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    n_groups = sum(width // group for width, group in pairs(parts) if group)
    return (
        z.new_empty(z.shape, dtype=dtype),
        z.new_empty((*z.shape[:-1], n_groups), dtype=torch.float32),
        z.new_empty(z.shape if narrower(dtype, z.dtype) else (0,), dtype=dtype),
    )


@launched_as("scaled_norm", _empty)
def scaled_norm_op(outputs, z, alpha, bias, row_eps, eps, parts, dtype) -> None:
    """`y` in `dtype`, r `[..., number of groups]`, and if `dtype` is narrower than that of z, n in `dtype`, else empty.

    parts are width, group, width, group, ...
    """
    y, r, n = map(rows, outputs)
    z, alpha, bias, row_eps = rows(z), alpha.contiguous(), dense(bias), dense(row_eps)
    keeps_n = narrower(dtype, z.dtype)
    for part in parts_of(parts, alpha):
        z_part, y_part = z[:, part.columns], y[:, part.columns]
        n_part = n[:, part.columns] if keeps_n else None
        bias_part = None if bias is None else bias[part.columns]
        if part.group:
            r_part = r[:, part.groups]
            normalise(z_part, alpha[part.alphas], bias_part, row_eps, eps, part.group, y_part, n_part, r_part)
            continue
        y_part.copy_(z_part if bias_part is None else z_part.float() + bias_part)
        if n_part is not None:
            n_part.zero_()


def _empty_backward(
    dy: Tensor,
    z: Tensor,
    alpha: Tensor,
    r: Tensor,
    parts: list[int],
    bias: bool,
    row_eps: bool,
    has_n: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape, dtype=dtype),
        alpha.new_empty(alpha.shape, dtype=torch.float32),
        alpha.new_empty(z.shape[-1] if bias else 0, dtype=torch.float32),
        r.new_empty(r.shape[:-1] if row_eps else (0,)),
    )


@launched_as("scaled_norm_backward", _empty_backward)
def scaled_norm_backward_op(outputs, dy, z, alpha, r, parts, bias, row_eps, has_n, dtype) -> None:
    """`dz` in `dtype`; dalpha, db and deps in float32, the last two empty unless asked for; z is n if `has_n`."""
    dz, dalpha, dbias, deps = outputs
    dz, dy, z, r, alpha = rows(dz), rows(dy), rows(z), rows(r), alpha.contiguous()
    mean = torch.empty_like(r) if row_eps else None
    for part in parts_of(parts, alpha):
        dy_part, dz_part = dy[:, part.columns], dz[:, part.columns]
        if not part.group:
            dz_part.copy_(dy_part)
            if bias:
                dbias[part.columns] = dy_part.sum(0, dtype=torch.float32)
            continue
        mean_part = None if mean is None else mean[:, part.groups]
        part_dalpha, part_dbias = differentiate(
            dy_part,
            z[:, part.columns],
            alpha[part.alphas],
            r[:, part.groups],
            part.group,
            dz_part,
            mean_part,
            bias,
            has_n,
        )
        dalpha[part.alphas] = part_dalpha
        if part_dbias is not None:
            dbias[part.columns] = part_dbias
        if mean_part is not None:
            mean_part *= part.group
    if mean is not None:
        torch.sum(mean * r.square(), -1, out=deps.view(-1)).mul_(-0.5)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, alpha, bias, _, _, ctx.parts, dtype = inputs
    _, r, n = output
    ctx.mark_non_differentiable(r, n)
    ctx.set_materialize_grads(False)
    ctx.has_n, ctx.dtype = narrower(dtype, z.dtype), z.dtype
    ctx.save_for_backward(n if ctx.has_n else z, alpha, bias, r)


def _backward(ctx: Any, dy: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("scaled_norm")
    if dy is None:
        return (None,) * 7
    z, alpha, bias, r = ctx.saved_tensors
    _, _, has_bias, has_row_eps, *_ = ctx.needs_input_grad
    dz, dalpha, dbias, deps = scaled_norm_backward_op(
        dy, z, alpha, r, ctx.parts, has_bias, has_row_eps, ctx.has_n, ctx.dtype
    )
    return dz, cast(dalpha, alpha), cast(dbias, bias if has_bias else None), deps if has_row_eps else None, *[None] * 3


scaled_norm_op.register_autograd(_backward, setup_context=_setup_context)


def scaled_norm(z, alpha, bias=None, *, eps, group=None, dtype=None) -> Tensor:
    """`alpha * norm(z) + b`, in one kernel for each part."""
    parts = resolve_group(group, z.shape[-1])
    split_alpha(alpha, parts)  # raises if its size does not fit
    flat = [number for part in parts for number in part]
    return scaled_norm_op(z, alpha, bias, *row_eps_of(eps, z), flat, dtype or z.dtype)[0]
