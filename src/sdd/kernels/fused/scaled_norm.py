"""`y = alpha * norm(z) + b` in one kernel each way: reference `sdd.functional.scaled_norm`.

Saved for backward: z and r = 1/sqrt(mean(z^2) + eps), one float32 a row and group. With n = r*z

    dalpha = sum over rows of dy*n            db = sum over rows of dy
    dz     = r * (alpha*dy - n*m)             m = mean(alpha*dy*n)              deps = -r^2/2 * sum(alpha*dy*n)

A program holds a tile of whole groups `[heads, width]` of one row; a row wider than `MAX_BLOCK` is a group in several
blocks of columns, whose statistic a kernel before it takes.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sdd.functional import Eps, Group, resolve_group, split_alpha
from sdd.kernels.fused.common import (
    MAX_BLOCK,
    WIDE_BLOCK,
    cdiv,
    forbid_double_backward,
    jit,
    mean_square_kernel,
    n_programs,
    next_power_of_2,
    on_device,
    pairs,
    parts_of,
    row_eps_of,
    rows,
    tile,
    warps,
)


@jit
def forward_kernel(
    z_ptr,
    alpha_ptr,
    bias_ptr,
    eps_ptr,
    y_ptr,
    r_ptr,
    HEADS,
    WIDTH,
    z_stride,
    y_stride,
    r_stride,
    eps,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_EPS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's tile, or a block of columns of a wide group whose r is there already."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tile(BLOCK_H, BLOCK_D, BY_COLUMN)
    there = (head < HEADS) & (column < WIDTH)
    feature = head * WIDTH + column
    z = tl.load(z_ptr + row * z_stride + feature, mask=there, other=0).to(tl.float32)
    if BY_COLUMN:
        r = tl.load(r_ptr + row * r_stride + head)
    else:
        if ROW_EPS:
            eps = tl.load(eps_ptr + row)
        r = tl.rsqrt(tl.sum(z * z, 1)[:, None] / WIDTH + eps)
        tl.store(r_ptr + row * r_stride + head, r, mask=head < HEADS)
    alpha = tl.load(alpha_ptr + (column if SHARED else feature), mask=there, other=0).to(tl.float32)
    y = alpha * (z * r)
    if HAS_BIAS:
        y += tl.load(bias_ptr + feature, mask=there, other=0).to(tl.float32)
    tl.store(y_ptr + row * y_stride + feature, y.to(y_ptr.dtype.element_ty), mask=there)


@jit
def backward_mean_kernel(
    dy_ptr,
    z_ptr,
    alpha_ptr,
    r_ptr,
    mean_ptr,
    WIDTH,
    dy_stride,
    z_stride,
    r_stride,
    mean_stride,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of alpha*dy*n over one wide group."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = head * WIDTH
    dy_ptr += row * dy_stride + first
    z_ptr += row * z_stride + first
    if not SHARED:
        alpha_ptr += first
    total = tl.full((BLOCK,), 0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < WIDTH
        dy = tl.load(dy_ptr + column, mask=there, other=0).to(tl.float32)
        z = tl.load(z_ptr + column, mask=there, other=0).to(tl.float32)
        total += tl.load(alpha_ptr + column, mask=there, other=0).to(tl.float32) * dy * z
    r = tl.load(r_ptr + row * r_stride + head)
    tl.store(mean_ptr + row * mean_stride + head, tl.sum(total) * r / WIDTH)


@jit
def backward_kernel(
    dy_ptr,
    z_ptr,
    alpha_ptr,
    r_ptr,
    mean_ptr,
    add_ptr,
    dz_ptr,
    dalpha_ptr,
    dbias_ptr,
    N_ROWS,
    HEADS,
    WIDTH,
    dy_stride,
    z_stride,
    r_stride,
    mean_stride,
    add_stride,
    dz_stride,
    partial_stride,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    STORE_MEAN: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Every N_PROGRAMS-th row of a tile, so that dalpha needs one partial sum a program."""
    program, N_PROGRAMS = tl.program_id(0), tl.num_programs(0)
    head, column = tile(BLOCK_H, BLOCK_D, BY_COLUMN)
    there = (head < HEADS) & (column < WIDTH)
    feature = head * WIDTH + column
    alpha = tl.load(alpha_ptr + (column if SHARED else feature), mask=there, other=0).to(tl.float32)
    dalpha = tl.full((BLOCK_H, BLOCK_D), 0, tl.float32)
    dbias = tl.full((BLOCK_H, BLOCK_D), 0, tl.float32)
    for i in range(tl.cdiv(N_ROWS - program, N_PROGRAMS)):
        row = program.to(tl.int64) + i * N_PROGRAMS
        dy = tl.load(dy_ptr + row * dy_stride + feature, mask=there, other=0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + feature, mask=there, other=0).to(tl.float32)
        r = tl.load(r_ptr + row * r_stride + head, mask=head < HEADS, other=0)
        n = z * r
        scaled = alpha * dy
        if BY_COLUMN:
            mean = tl.load(mean_ptr + row * mean_stride + head)
        else:
            mean = tl.sum(scaled * n, 1)[:, None] / WIDTH
            if STORE_MEAN:
                tl.store(mean_ptr + row * mean_stride + head, mean, mask=head < HEADS)
        dz = r * (scaled - n * mean)
        if HAS_ADD:
            dz += tl.load(add_ptr + row * add_stride + feature, mask=there, other=0).to(tl.float32)
        tl.store(dz_ptr + row * dz_stride + feature, dz.to(dz_ptr.dtype.element_ty), mask=there)
        dalpha += dy * n
        if HAS_BIAS:
            dbias += dy
    partial = program * partial_stride + feature
    tl.store(dalpha_ptr + partial, dalpha, mask=there)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, dbias, mask=there)


def normalise(
    z: Tensor, alpha: Tensor, bias: Tensor | None, row_eps: Tensor | None, eps: float, group: int, y: Tensor, r: Tensor
) -> None:
    """Launch the forward kernels on one part: z `[rows, N]` to y `[rows, N]` and r `[rows, N/group]`."""
    heads = z.shape[1] // group
    grid, blocks = launch(z.shape[0], heads, group)
    if blocks["BY_COLUMN"]:
        mean_square_kernel[(z.shape[0], heads)](z, r, group, z.stride(0), r.stride(0), BLOCK=WIDE_BLOCK, num_warps=8)
        r.add_(eps if row_eps is None else row_eps[:, None]).rsqrt_()
    forward_kernel[grid](
        z, alpha, bias, row_eps, y, r, heads, group, z.stride(0), y.stride(0), r.stride(0), eps,
        SHARED=alpha.shape[0] != z.shape[1], HAS_BIAS=bias is not None, ROW_EPS=row_eps is not None,
        **blocks, num_warps=warps(blocks["BLOCK_H"] * blocks["BLOCK_D"], 16),
    )  # fmt: skip


def differentiate(
    dy: Tensor,
    z: Tensor,
    alpha: Tensor,
    r: Tensor,
    add: Tensor | None,
    group: int,
    dz: Tensor,
    mean: Tensor | None,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernels on one part.

    Args:
        dy: `[rows, N]`.
        z: `[rows, N]`.
        alpha: `[N]` or `[group]`.
        r: `[rows, N/group]`.
        add: added to dz, `[rows, N]` or None.
        group: the width of a group.
        dz: written, `[rows, N]`.
        mean: m, written, `[rows, N/group]` or None.
        bias: whether the gradient of a bias is wanted.

    Returns:
        dalpha in the shape of alpha and db `[N]` or None, both float32.
    """
    n_rows, width = z.shape
    heads, shared = width // group, alpha.shape[0] != width
    grid, blocks = launch(n_rows, heads, group)
    block = blocks["BLOCK_H"] * blocks["BLOCK_D"]
    store_mean = mean is not None
    if blocks["BY_COLUMN"]:
        mean = r.new_empty(r.shape) if mean is None else mean
        backward_mean_kernel[(n_rows, heads)](
            dy, z, alpha, r, mean, group, dy.stride(0), z.stride(0), r.stride(0), mean.stride(0),
            SHARED=shared, BLOCK=WIDE_BLOCK, num_warps=8,
        )  # fmt: skip
    programs = n_programs(z, n_rows, block, grid[1] * grid[2])
    partial = z.new_empty(2 if bias else 1, programs, width, dtype=torch.float32)
    backward_kernel[(programs, *grid[1:])](
        dy, z, alpha, r, mean, add, dz, partial[0], partial[-1], n_rows, heads, group,
        dy.stride(0), z.stride(0), r.stride(0), 0 if mean is None else mean.stride(0),
        0 if add is None else add.stride(0), dz.stride(0), width,
        SHARED=shared, HAS_BIAS=bias, HAS_ADD=add is not None, STORE_MEAN=store_mean,
        **blocks, num_warps=warps(block, 8),
    )  # fmt: skip
    total = partial.sum(1)
    dalpha = total[0].view(heads, group).sum(0) if shared else total[0]
    return dalpha, total[1] if bias else None


def launch(n_rows: int, heads: int, group: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and block sizes: a row in one program, its heads in several, or a wide group in blocks of columns."""
    if group > MAX_BLOCK:
        return (n_rows, cdiv(group, WIDE_BLOCK), heads), {"BLOCK_H": 1, "BLOCK_D": WIDE_BLOCK, "BY_COLUMN": True}
    block_d = next_power_of_2(group)
    block_h = min(next_power_of_2(heads), max(1, WIDE_BLOCK // block_d))
    return (n_rows, cdiv(heads, block_h), 1), {"BLOCK_H": block_h, "BLOCK_D": block_d, "BY_COLUMN": False}


@torch.library.custom_op("sdd::scaled_norm", mutates_args=())
def scaled_norm_op(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    row_eps: Tensor | None,
    eps: float,
    parts: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`y` in `dtype`, and r `[..., number of groups]`; parts are width, group, width, group, ..."""
    y, r = _empty(z, alpha, bias, row_eps, eps, parts, dtype)
    y_rows, r_rows, z_rows = rows(y), rows(r), rows(z)
    alpha, bias = alpha.contiguous(), None if bias is None else bias.contiguous()
    row_eps = None if row_eps is None else row_eps.reshape(-1).contiguous()
    with on_device(z):
        for part in parts_of(parts, alpha):
            z_part, y_part = z_rows[:, part.columns], y_rows[:, part.columns]
            bias_part = None if bias is None else bias[part.columns]
            if not part.group:
                y_part.copy_(z_part if bias_part is None else z_part.float() + bias_part)
            elif z_rows.shape[0]:
                normalise(
                    z_part, alpha[part.alphas], bias_part, row_eps, eps, part.group, y_part, r_rows[:, part.groups]
                )
    return y, r


@scaled_norm_op.register_fake
def _empty(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    row_eps: Tensor | None,
    eps: float,
    parts: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    n_groups = sum(width // group for width, group in pairs(parts) if group)
    return z.new_empty(z.shape, dtype=dtype), z.new_empty((*z.shape[:-1], n_groups), dtype=torch.float32)


@torch.library.custom_op("sdd::scaled_norm_backward", mutates_args=())
def scaled_norm_backward_op(
    dy: Tensor,
    z: Tensor,
    alpha: Tensor,
    r: Tensor,
    add: Tensor | None,
    parts: list[int],
    bias: bool,
    row_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dz` + add in the dtype of z; dalpha, db and deps in float32, the last two empty unless asked for."""
    dz, dalpha, dbias, deps = _empty_backward(dy, z, alpha, r, add, parts, bias, row_eps)
    dz_rows, dy_rows, z_rows, r_rows, alpha = rows(dz), rows(dy), rows(z), rows(r), alpha.contiguous()
    add_rows = None if add is None else rows(add)
    mean = torch.empty_like(r_rows) if row_eps else None
    if not z_rows.shape[0]:
        return dz, dalpha.zero_(), dbias.zero_(), deps
    with on_device(z):
        for part in parts_of(parts, alpha):
            dy_part, dz_part = dy_rows[:, part.columns], dz_rows[:, part.columns]
            if not part.group:
                dz_part.copy_(dy_part if add_rows is None else dy_part.float() + add_rows[:, part.columns])
                if bias:
                    dbias[part.columns] = dy_part.sum(0, dtype=torch.float32)
                continue
            part_dalpha, part_dbias = differentiate(
                dy_part,
                z_rows[:, part.columns],
                alpha[part.alphas],
                r_rows[:, part.groups],
                None if add_rows is None else add_rows[:, part.columns],
                part.group,
                dz_part,
                None if mean is None else mean[:, part.groups],
                bias,
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
    add: Tensor | None,
    parts: list[int],
    bias: bool,
    row_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape),
        alpha.new_empty(alpha.shape, dtype=torch.float32),
        alpha.new_empty(z.shape[-1] if bias else 0, dtype=torch.float32),
        r.new_empty(r.shape[:-1] if row_eps else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, alpha, bias, _, _, ctx.parts, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, alpha, bias, output[1])


def _backward(ctx: Any, dy: Tensor | None, _r: None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("scaled_norm")
    if dy is None:
        return (None,) * 7
    z, alpha, bias, r = ctx.saved_tensors
    _, _, has_bias, has_row_eps, *_ = ctx.needs_input_grad
    dz, dalpha, dbias, deps = scaled_norm_backward_op(dy, z, alpha, r, None, ctx.parts, has_bias, has_row_eps)
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
