"""`y = alpha * norm(z) + b` in one kernel each way: reference `sdd.functional.scaled_norm`.

Saved for backward: z and r = 1/sqrt(mean(z^2) + eps), one float32 a row and group; where y is in a narrower dtype than
z, n in that one takes the place of z: half of the bytes, and no more error than the rounding of dy brings. With n = r*z

    dalpha = sum over rows of dy*n            db = sum over rows of dy
    dz     = r * (alpha*dy - n*m)             m = mean(alpha*dy*n)              deps = -r^2/2 * sum(alpha*dy*n)
"""

from typing import Any

import torch
from torch import Tensor

from sdd.functional import Eps, Group, resolve_group, split_alpha
from sdd.kernels.fused.common import forbid_double_backward, on_device, pairs, parts_of, row_eps_of, rows
from sdd.kernels.fused.scaled_norm_kernels import differentiate, normalise


def narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether numbers of this dtype take fewer bytes than those of the other."""
    return dtype.itemsize < other.itemsize


@torch.library.custom_op("sdd::scaled_norm", mutates_args=())
def scaled_norm_op(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    row_eps: Tensor | None,
    eps: float,
    parts: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` in `dtype`, r `[..., number of groups]`, and if `dtype` is narrower than that of z, n in `dtype`, else empty.

    parts are width, group, width, group, ...
    """
    y, r, n = _empty(z, alpha, bias, row_eps, eps, parts, dtype)
    y_rows, r_rows, z_rows, n_rows = rows(y), rows(r), rows(z), rows(n) if narrower(dtype, z.dtype) else None
    alpha, bias = alpha.contiguous(), None if bias is None else bias.contiguous()
    row_eps = None if row_eps is None else row_eps.reshape(-1).contiguous()
    with on_device(z):
        for part in parts_of(parts, alpha):
            z_part, y_part = z_rows[:, part.columns], y_rows[:, part.columns]
            bias_part = None if bias is None else bias[part.columns]
            if not part.group:
                y_part.copy_(z_part if bias_part is None else z_part.float() + bias_part)
                if n_rows is not None:
                    n_rows[:, part.columns] = 0
            elif z_rows.shape[0]:
                n_part = None if n_rows is None else n_rows[:, part.columns]
                normalise(
                    z_part, alpha[part.alphas], bias_part, row_eps, eps, part.group, y_part, n_part,
                    r_rows[:, part.groups],
                )  # fmt: skip
    return y, r, n


@scaled_norm_op.register_fake
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


@torch.library.custom_op("sdd::scaled_norm_backward", mutates_args=())
def scaled_norm_backward_op(
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
    """`dz` in `dtype`; dalpha, db and deps in float32, the last two empty unless asked for; z is n if `has_n`."""
    dz, dalpha, dbias, deps = _empty_backward(dy, z, alpha, r, parts, bias, row_eps, has_n, dtype)
    dz_rows, dy_rows, z_rows, r_rows, alpha = rows(dz), rows(dy), rows(z), rows(r), alpha.contiguous()
    mean = torch.empty_like(r_rows) if row_eps else None
    if not z_rows.shape[0]:
        return dz, dalpha.zero_(), dbias.zero_(), deps
    with on_device(z):
        for part in parts_of(parts, alpha):
            dy_part, dz_part = dy_rows[:, part.columns], dz_rows[:, part.columns]
            if not part.group:
                dz_part.copy_(dy_part)
                if bias:
                    dbias[part.columns] = dy_part.sum(0, dtype=torch.float32)
                continue
            part_dalpha, part_dbias = differentiate(
                dy_part,
                z_rows[:, part.columns],
                alpha[part.alphas],
                r_rows[:, part.groups],
                part.group,
                dz_part,
                None if mean is None else mean[:, part.groups],
                bias,
                has_n,
            )
            dalpha[part.alphas] = part_dalpha
            if part_dbias is not None:
                dbias[part.columns] = part_dbias
            if mean is not None:
                mean[:, part.groups] *= part.group
    if mean is not None:
        deps = (mean * r_rows.square()).sum(-1).mul_(-0.5).view(deps.shape)
    return dz, dalpha, dbias, deps


@scaled_norm_backward_op.register_fake
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
    dbias_, deps_ = dbias.to(bias.dtype) if has_bias else None, deps if has_row_eps else None
    return dz, dalpha.to(alpha.dtype), dbias_, deps_, None, None, None


scaled_norm_op.register_autograd(_backward, setup_context=_setup_context)


def scaled_norm(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    eps: Eps = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`sdd.functional.scaled_norm` by the kernels."""
    parts = resolve_group(group, z.shape[-1])
    split_alpha(alpha, parts)  # its sizes, or an error
    flat = [number for part in parts for number in part]
    return scaled_norm_op(z, alpha, bias, *row_eps_of(eps, z), flat, dtype or z.dtype)[0]
