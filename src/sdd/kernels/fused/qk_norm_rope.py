"""Normed queries or keys, rotated: reference `sdd.functional.qk_norm_rope`, per head, full width or without a norm.

With y = alpha*n, n = r*z, and the halves 1, 2 of each head:

    o1 = y1*cos1 - y2*sin1        o2 = y2*cos2 + y1*sin2
    dy1 = do1*cos1 + do2*sin2     dy2 = do2*cos2 - do1*sin1
    dalpha = sum over rows of dy*n             dz = r * (alpha*dy - n*m)             m = mean(alpha*dy*n)

A program holds the halves of some heads of one row (all heads for a norm of full width). Saved for backward: z and r.
The output lies in memory as [B, T, H, D], as z does; gradients may lie in any order. Row i reads row i modulo TABLE of
the tables, which have T rows for all sequences or B*T.
"""

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sdd import functional as sdd_F
from sdd.kernels.fused.common import (
    WIDE_BLOCK,
    Shape,
    cast,
    cdiv,
    dense,
    forbid_double_backward,
    jit,
    launched_as,
    n_programs,
    next_power_of_2,
    rows,
    warps,
)
from sdd.kernels.fused.scaled_norm import scaled_norm
from sdd.norm_groups import resolve_group, split_alpha

#: The widest row whose norm and rotation are one kernel; a wider one takes two.
MAX_FUSED = 8192


@jit
def place(HEADS, HALF, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads `[H, 1]`, columns of the first half `[1, D/2]`, and which of them there are."""
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    return head, column, (head < HEADS) & (column < HALF)


@jit
def halves(ptr, first, HALF, there):
    """Both halves of a tile in float32."""
    one = tl.load(ptr + first, mask=there, other=0).to(tl.float32)
    two = tl.load(ptr + first + HALF, mask=there, other=0).to(tl.float32)
    return one, two


@jit
def mean(x, HEADS, HALF, FULL: tl.constexpr):
    """The mean over each head, or over all."""
    total = tl.sum(x) / HEADS if FULL else tl.sum(x, 1)[:, None]
    return total / (2 * HALF)


@jit
def forward_kernel(
    z_ptr,
    alpha_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    r_ptr,
    TABLE,
    HEADS,
    HALF,
    z_stride,
    cos_stride,
    sin_stride,
    eps,
    NORM: tl.constexpr,
    FULL: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head, column, there = place(HEADS, HALF, BLOCK_H, BLOCK_D)
    first = head * 2 * HALF + column
    y1, y2 = halves(z_ptr + row * z_stride, first, HALF, there)
    if NORM:
        r = tl.rsqrt(mean(y1 * y1 + y2 * y2, HEADS, HALF, FULL) + eps)
        if FULL:
            tl.store(r_ptr + row, r)
        else:
            tl.store(r_ptr + row * HEADS + head, r, mask=head < HEADS)
        alpha1, alpha2 = halves(alpha_ptr, column if SHARED else first, HALF, there)
        y1 = alpha1 * (y1 * r)
        y2 = alpha2 * (y2 * r)
    position = row % TABLE
    cos1, cos2 = halves(cos_ptr + position * cos_stride, column, HALF, column < HALF)
    sin1, sin2 = halves(sin_ptr + position * sin_stride, column, HALF, column < HALF)
    out_ptr += row * 2 * HEADS * HALF
    tl.store(out_ptr + first, (y1 * cos1 - y2 * sin1).to(out_ptr.dtype.element_ty), mask=there)
    tl.store(out_ptr + first + HALF, (y2 * cos2 + y1 * sin2).to(out_ptr.dtype.element_ty), mask=there)


@jit
def backward_kernel(
    dout_ptr,
    z_ptr,
    alpha_ptr,
    cos_ptr,
    sin_ptr,
    r_ptr,
    dz_ptr,
    dalpha_ptr,
    N_ROWS,
    LENGTH,
    TABLE,
    HEADS,
    HALF,
    dout_batch,
    dout_row,
    dout_head,
    z_stride,
    cos_stride,
    sin_stride,
    NORM: tl.constexpr,
    FULL: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Every N_PROGRAMS-th row of some heads, so that dalpha needs one partial sum a program."""
    program, N_PROGRAMS = tl.program_id(0), tl.num_programs(0)
    head, column, there = place(HEADS, HALF, BLOCK_H, BLOCK_D)
    first = head * 2 * HALF + column
    dalpha1 = tl.full((BLOCK_H, BLOCK_D), 0, tl.float32)
    dalpha2 = tl.full((BLOCK_H, BLOCK_D), 0, tl.float32)
    if NORM:
        alpha1, alpha2 = halves(alpha_ptr, column if SHARED else first, HALF, there)
    for i in range(tl.cdiv(N_ROWS - program, N_PROGRAMS)):
        row = program.to(tl.int64) + i * N_PROGRAMS
        position = row % TABLE
        cos1, cos2 = halves(cos_ptr + position * cos_stride, column, HALF, column < HALF)
        sin1, sin2 = halves(sin_ptr + position * sin_stride, column, HALF, column < HALF)
        there_ptr = dout_ptr + (row // LENGTH) * dout_batch + (row % LENGTH) * dout_row
        dout1, dout2 = halves(there_ptr, head.to(tl.int64) * dout_head + column, HALF, there)
        dz1 = dout1 * cos1 + dout2 * sin2
        dz2 = dout2 * cos2 - dout1 * sin1
        if NORM:
            n1, n2 = halves(z_ptr + row * z_stride, first, HALF, there)
            r = tl.load(r_ptr + row) if FULL else tl.load(r_ptr + row * HEADS + head, mask=head < HEADS, other=0)
            n1 *= r
            n2 *= r
            dalpha1 += dz1 * n1
            dalpha2 += dz2 * n2
            dz1 *= alpha1
            dz2 *= alpha2
            m = mean(dz1 * n1 + dz2 * n2, HEADS, HALF, FULL)
            dz1 = r * (dz1 - n1 * m)
            dz2 = r * (dz2 - n2 * m)
        to = dz_ptr + row * 2 * HEADS * HALF + first
        tl.store(to, dz1.to(dz_ptr.dtype.element_ty), mask=there)
        tl.store(to + HALF, dz2.to(dz_ptr.dtype.element_ty), mask=there)
    if NORM:
        dalpha_ptr += program.to(tl.int64) * 2 * HEADS * HALF
        tl.store(dalpha_ptr + first, dalpha1, mask=there)
        tl.store(dalpha_ptr + first + HALF, dalpha2, mask=there)


def _empty(
    z: Tensor, alpha: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int, full: bool, eps: float
) -> tuple[Tensor, Tensor]:
    out = z.new_empty((*z.shape[:-1], n_heads, z.shape[-1] // n_heads))
    groups = () if alpha is None else (*z.shape[:-1], 1 if full else n_heads)
    return out, z.new_empty(groups or (0,), dtype=torch.float32)


@launched_as("qk_norm_rope", _empty)
def qk_norm_rope_op(outputs, z, alpha, cos, sin, n_heads, full, eps) -> None:
    """The rotated heads `[..., T, H, D]` in the dtype of z, and r `[..., T, groups]` (empty without alpha)."""
    z, cos, sin = rows(z), rows(cos), rows(sin)
    grid, blocks = _launch(z, n_heads, full)
    forward_kernel[(z.shape[0], *grid)](
        z, dense(alpha), cos, sin, *outputs, cos.shape[0], n_heads, cos.shape[-1] // 2,
        z.stride(0), cos.stride(0), sin.stride(0), eps,
        NORM=alpha is not None, FULL=full, SHARED=_shared(z, alpha),
        **blocks, num_warps=warps(2 * blocks["BLOCK_H"] * blocks["BLOCK_D"], 16),
    )  # fmt: skip


def _empty_backward(
    dout: Tensor,
    z: Tensor | None,
    alpha: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    r: Tensor,
    full: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    *front, heads, head_dim = dout.shape
    dz = dout.new_empty((*front, heads * head_dim), dtype=dtype)
    return dz, r.new_empty(0 if alpha is None else alpha.shape[0])


@launched_as("qk_norm_rope_backward", _empty_backward)
def qk_norm_rope_backward_op(outputs, dout, z, alpha, cos, sin, r, full, dtype) -> None:
    """`dz` `[..., T, H*D]` in `dtype`, and dalpha in float32 (empty without alpha)."""
    dz, dalpha = outputs
    *_, length, heads, head_dim = dout.shape
    dout = dout.reshape(math.prod(dout.shape[:-3]), length, heads, head_dim)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    n_rows, width = dout.shape[0] * length, heads * head_dim
    z, cos, sin = rows(dz if z is None else z), rows(cos), rows(sin)
    grid, blocks = _launch(z, heads, full)
    block = 2 * blocks["BLOCK_H"] * blocks["BLOCK_D"]
    shape = Shape(block, 1, warps(block, 8), 40 if alpha is None else 64)
    programs = n_programs(dout, n_rows, shape, grid[0])
    partial = r.new_empty(0 if alpha is None else programs, width)
    backward_kernel[(programs, *grid)](
        dout, z, dense(alpha), cos, sin, r, dz, partial, n_rows, length, cos.shape[0], heads, head_dim // 2,
        *dout.stride()[:3], z.stride(0), cos.stride(0), sin.stride(0),
        NORM=alpha is not None, FULL=full, SHARED=_shared(z, alpha), **blocks, **shape.resources,
    )  # fmt: skip
    if alpha is not None:
        torch.sum(partial.sum(0).view(-1, alpha.shape[0]), 0, out=dalpha)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, alpha, cos, sin, _, ctx.full, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.dtype = z.dtype
    ctx.save_for_backward(None if alpha is None else z, alpha, cos, sin, output[1])


def _backward(ctx: Any, dout: Tensor | None, _r: None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("qk_norm_rope")
    z, alpha, cos, sin, r = ctx.saved_tensors
    if dout is None:
        return (None,) * 7
    dz, dalpha = qk_norm_rope_backward_op(dout, z, alpha, cos, sin, r, ctx.full, ctx.dtype)
    return dz, cast(dalpha, alpha), *[None] * 5


qk_norm_rope_op.register_autograd(_backward, setup_context=_setup_context)


def qk_norm_rope(z, alpha, cos, sin, *, n_heads, group, eps) -> Tensor:
    """`rope(alpha * norm(z))`; the norm is a kernel of its own for other groups, wide rows and an eps for each row."""
    *batch, length, width = z.shape
    head_dim, parts = width // n_heads, resolve_group(group, width)
    # a number, since torch 2.11 while it compiles takes a `Parts` and an equal tuple for different
    one_group = parts[0][1] if len(parts) == 1 else None
    if alpha is not None:
        split_alpha(alpha, parts)  # raises if its size does not fit
        one_kernel = one_group == head_dim or (one_group == width and width <= MAX_FUSED)
        if not one_kernel or isinstance(eps, Tensor):
            z, alpha = scaled_norm(z, alpha, group=parts, eps=eps), None
    if cos.shape not in ((length, head_dim), (*batch, 1, length, head_dim)) or sin.shape != cos.shape:
        return sdd_F.qk_norm_rope(z, alpha, cos, sin, n_heads=n_heads, group=group, eps=eps)
    whole, eps = alpha is not None and one_group == width, 0.0 if alpha is None else eps
    return qk_norm_rope_op(z, alpha, cos, sin, n_heads, whole, eps)[0].transpose(-3, -2)


def _launch(z: Tensor, heads: int, whole: bool) -> tuple[tuple[int], dict[str, int]]:
    """Number of blocks of heads, and the heads and half width of a block: one block if the norm is over the `whole`."""
    block_d = next_power_of_2(z.shape[-1] // heads // 2)
    block_h = next_power_of_2(heads)
    if not whole:
        block_h = min(block_h, max(1, WIDE_BLOCK // (2 * block_d)))
    return (cdiv(heads, block_h),), {"BLOCK_H": block_h, "BLOCK_D": block_d}


def _shared(z: Tensor, alpha: Tensor | None) -> bool:
    return alpha is not None and alpha.shape[0] != z.shape[-1]
