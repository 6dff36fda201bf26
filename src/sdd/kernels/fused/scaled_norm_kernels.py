"""The kernels of `sdd.kernels.fused.scaled_norm`, whose equations they compute, and their launch on one part.

A program holds a tile of whole groups `[heads, width]` of one row. A group wider than `MAX_BLOCK` is split into blocks
of columns, and another kernel computes its statistic first.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sdd.kernels.fused.common import (
    MAX_BLOCK,
    WIDE_BLOCK,
    Shape,
    add_to_first,
    block_count,
    cdiv,
    fits,
    jit,
    load_row,
    mean_square_kernel,
    n_programs,
    next_power_of_2,
    row_shape,
    tile,
    warps,
    zeros,
)


@jit
def forward_kernel(
    z_ptr,
    alpha_ptr,
    bias_ptr,
    eps_ptr,
    y_ptr,
    n_ptr,
    r_ptr,
    HEADS,
    WIDTH,
    z_stride,
    y_stride,
    n_stride,
    r_stride,
    eps,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_N: tl.constexpr,
    ROW_EPS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's tile, or a block of columns of a wide group whose r another kernel has computed."""
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
    n = z * r
    if KEEP_N:
        tl.store(n_ptr + row * n_stride + feature, n.to(n_ptr.dtype.element_ty), mask=there)
    y = alpha * n
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
    HAS_N: tl.constexpr,
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
    mean = tl.sum(total) / WIDTH
    if not HAS_N:
        mean *= tl.load(r_ptr + row * r_stride + head)
    tl.store(mean_ptr + row * mean_stride + head, mean)


@jit
def block_of(dy_ptr, z_ptr, alpha_ptr, r, head, column, HEADS, WIDTH, SHARED: tl.constexpr, HAS_N: tl.constexpr):
    """A block of n, of dy and of alpha*dy."""
    there = (head < HEADS) & (column < WIDTH)
    feature = head * WIDTH + column
    dy = load_row(dy_ptr, feature, there)
    n = load_row(z_ptr, feature, there)
    if not HAS_N:
        n *= r
    return n, dy, dy * load_row(alpha_ptr, column if SHARED else feature, there)


@jit
def backward_kernel(
    dy_ptr,
    z_ptr,
    alpha_ptr,
    r_ptr,
    mean_ptr,
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
    dz_stride,
    partial_stride,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_N: tl.constexpr,
    STORE_MEAN: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Every N_PROGRAMS-th row of a tile, so that dalpha needs one partial sum a program; z is n with HAS_N."""
    program, N_PROGRAMS = tl.program_id(0), tl.num_programs(0)
    BLOCK_D: tl.constexpr = BLOCK // BLOCK_H
    head, start = tile(BLOCK_H, BLOCK_D, BY_COLUMN)
    dalpha, dbias = zeros((BLOCK_H, BLOCK_D), BLOCKS), zeros((BLOCK_H, BLOCK_D), BLOCKS)
    for i in range(tl.cdiv(N_ROWS - program, N_PROGRAMS)):
        row = program.to(tl.int64) + i * N_PROGRAMS
        dy_row, z_row = dy_ptr + row * dy_stride, z_ptr + row * z_stride
        r = tl.load(r_ptr + row * r_stride + head, mask=head < HEADS, other=0)
        if BY_COLUMN:
            mean = tl.load(mean_ptr + row * mean_stride + head)
        else:
            total = tl.full((BLOCK_H, BLOCK_D), 0, tl.float32)
            for block in range(block_count(WIDTH, BLOCK_D, BLOCKS)):
                n, dy, scaled = block_of(
                    dy_row, z_row, alpha_ptr, r, head, start + block * BLOCK_D, HEADS, WIDTH, SHARED, HAS_N
                )
                total += scaled * n
            mean = tl.sum(total, 1)[:, None] / WIDTH
            if STORE_MEAN:
                tl.store(mean_ptr + row * mean_stride + head, mean, mask=head < HEADS)
        for block in range(block_count(WIDTH, BLOCK_D, BLOCKS)):
            column = start + block * BLOCK_D
            n, dy, scaled = block_of(dy_row, z_row, alpha_ptr, r, head, column, HEADS, WIDTH, SHARED, HAS_N)
            dalpha = add_to_first(dalpha, dy * n)
            dbias = add_to_first(dbias, dy)
            dz = r * (scaled - n * mean)
            there = (head < HEADS) & (column < WIDTH)
            tl.store(dz_ptr + row * dz_stride + head * WIDTH + column, dz.to(dz_ptr.dtype.element_ty), mask=there)
    for block in tl.static_range(BLOCKS):
        column = start + block * BLOCK_D
        there = (head < HEADS) & (column < WIDTH)
        partial = program * partial_stride + head * WIDTH + column
        tl.store(dalpha_ptr + partial, dalpha[block], mask=there)
        if HAS_BIAS:
            tl.store(dbias_ptr + partial, dbias[block], mask=there)


def normalise(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    row_eps: Tensor | None,
    eps: float,
    group: int,
    y: Tensor,
    n: Tensor | None,
    r: Tensor,
) -> None:
    """Launch the forward kernels on one part: z `[rows, N]` to y and n `[rows, N]` and r `[rows, N/group]`."""
    heads = z.shape[1] // group
    grid, blocks = launch(z.shape[0], heads, group)
    if blocks["BY_COLUMN"]:
        mean_square_kernel[(z.shape[0], heads)](z, r, group, z.stride(0), r.stride(0), BLOCK=WIDE_BLOCK, num_warps=8)
        r.add_(eps if row_eps is None else row_eps[:, None]).rsqrt_()
    forward_kernel[grid](
        z, alpha, bias, row_eps, y, n, r, heads, group, z.stride(0), y.stride(0), 0 if n is None else n.stride(0),
        r.stride(0), eps, SHARED=alpha.shape[0] != z.shape[1], HAS_BIAS=bias is not None, KEEP_N=n is not None,
        ROW_EPS=row_eps is not None, **blocks, num_warps=warps(blocks["BLOCK_H"] * blocks["BLOCK_D"], 16),
    )  # fmt: skip


def differentiate(
    dy: Tensor,
    z: Tensor,
    alpha: Tensor,
    r: Tensor,
    group: int,
    dz: Tensor,
    mean: Tensor | None,
    bias: bool,
    has_n: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernels on one part.

    Args:
        dy: `[rows, N]`.
        z: `[rows, N]`, or n in its place.
        alpha: `[N]` or `[group]`.
        r: `[rows, N/group]`.
        group: the width of a group.
        dz: written, `[rows, N]`.
        mean: m, written, `[rows, N/group]` or None.
        bias: whether the gradient of a bias is wanted.
        has_n: whether z is n.

    Returns:
        dalpha in the shape of alpha and db `[N]` or None, both float32.
    """
    n_rows, width = z.shape
    heads, shared = width // group, alpha.shape[0] != width
    n_sums = 2 if bias else 1
    grid, blocks = launch(n_rows, heads, group, n_sums)
    by_column, block_h = blocks["BY_COLUMN"], blocks["BLOCK_H"]
    store_mean = mean is not None
    if by_column:
        mean = r.new_empty(r.shape) if mean is None else mean
        backward_mean_kernel[(n_rows, heads)](
            dy, z, alpha, r, mean, group, dy.stride(0), z.stride(0), r.stride(0), mean.stride(0),
            SHARED=shared, HAS_N=has_n, BLOCK=WIDE_BLOCK, num_warps=8,
        )  # fmt: skip
    if by_column or block_h > 1:
        block = block_h * blocks["BLOCK_D"]
        shape = Shape(block, 1, warps(block, 8), 64)
    else:
        shape = row_shape(group, n_sums)
    programs = n_programs(z, n_rows, shape, grid[1] * grid[2])
    partial = z.new_empty(2 if bias else 1, programs, width, dtype=torch.float32)
    backward_kernel[(programs, *grid[1:])](
        dy, z, alpha, r, mean, dz, partial[0], partial[-1], n_rows, heads, group,
        dy.stride(0), z.stride(0), r.stride(0), 0 if mean is None else mean.stride(0),
        dz.stride(0), width,
        SHARED=shared, HAS_BIAS=bias, HAS_N=has_n, STORE_MEAN=store_mean, BY_COLUMN=by_column, BLOCK_H=block_h,
        **shape.options,
    )  # fmt: skip
    total = partial.sum(1)
    dalpha = total[0].view(heads, group).sum(0) if shared else total[0]
    return dalpha, total[1] if bias else None


def launch(n_rows: int, heads: int, group: int, n_sums: int = 0) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and block sizes: a row in one program, its heads in several, or a wide group in blocks of columns.

    `n_sums` are the sums over rows that a program holds.
    """
    if group > MAX_BLOCK or not fits(group, n_sums):
        return (n_rows, cdiv(group, WIDE_BLOCK), heads), {"BLOCK_H": 1, "BLOCK_D": WIDE_BLOCK, "BY_COLUMN": True}
    block_d = next_power_of_2(group)
    block_h = min(next_power_of_2(heads), max(1, WIDE_BLOCK // block_d))
    return (n_rows, cdiv(heads, block_h), 1), {"BLOCK_H": block_h, "BLOCK_D": block_d, "BY_COLUMN": False}
