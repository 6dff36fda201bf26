"""The kernels of `sdd.kernels.fused.expert_norm`, for the equations of `sdd.kernels.experts.expert_scaled_norm`.

`experts_ptr` holds the expert of each row. Rows are sorted by expert, and `ends_ptr` holds the end of each expert's
rows, so that a program of the backward pass has rows of one expert alone.
"""

import triton.language as tl

from sdd.kernels.fused.common import jit, load_row


@jit
def forward_kernel(
    z_ptr,
    alpha_ptr,
    weights_ptr,
    eps_ptr,
    experts_ptr,
    y_ptr,
    r_ptr,
    WIDTH,
    z_stride,
    eps,
    WEIGHTS: tl.constexpr,
    ROW_EPS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, or a block of columns of a row whose r another kernel has computed."""
    row = tl.program_id(0).to(tl.int64)
    alpha_ptr += tl.load(experts_ptr + row) * WIDTH
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    z = load_row(z_ptr + row * z_stride, column, there)
    if BY_COLUMN:
        r = tl.load(r_ptr + row)
    else:
        if ROW_EPS:
            eps = tl.load(eps_ptr + row)
        r = tl.rsqrt(tl.sum(z * z) / WIDTH + eps)
        tl.store(r_ptr + row, r)
    y = load_row(alpha_ptr, column, there) * (z * r)
    if WEIGHTS:
        y *= tl.load(weights_ptr + row).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=there)


@jit
def backward_mean_kernel(
    dy_ptr, z_ptr, alpha_ptr, experts_ptr, r_ptr, mean_ptr, WIDTH, dy_stride, z_stride, BLOCK: tl.constexpr
):
    """M of one wide row."""
    row = tl.program_id(0).to(tl.int64)
    alpha_ptr += tl.load(experts_ptr + row) * WIDTH
    total = tl.full((BLOCK,), 0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < WIDTH
        z = load_row(z_ptr + row * z_stride, column, there)
        total += load_row(alpha_ptr, column, there) * load_row(dy_ptr + row * dy_stride, column, there) * z
    tl.store(mean_ptr + row, tl.sum(total) / WIDTH * tl.load(r_ptr + row))


@jit
def backward_kernel(
    dy_ptr,
    z_ptr,
    alpha_ptr,
    weights_ptr,
    ends_ptr,
    r_ptr,
    mean_ptr,
    dz_ptr,
    dalpha_ptr,
    WIDTH,
    dy_stride,
    z_stride,
    AN_EXPERT,
    WEIGHTS: tl.constexpr,
    STORE_MEAN: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every AN_EXPERT-th row of an expert, or its block of columns, so that dalpha needs one partial sum a program."""
    program = tl.program_id(0)
    expert = program // AN_EXPERT
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0) + program % AN_EXPERT
    end = tl.load(ends_ptr + expert)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    alpha = load_row(alpha_ptr + expert.to(tl.int64) * WIDTH, column, there)
    dalpha = tl.full((BLOCK,), 0, tl.float32)
    for i in range(tl.cdiv(end - first, AN_EXPERT)):
        row = first.to(tl.int64) + i * AN_EXPERT
        r = tl.load(r_ptr + row)
        dy = load_row(dy_ptr + row * dy_stride, column, there)
        z = load_row(z_ptr + row * z_stride, column, there)
        scaled = alpha * dy
        if BY_COLUMN:
            mean = tl.load(mean_ptr + row)
        else:
            mean = r * tl.sum(scaled * z) / WIDTH
            if STORE_MEAN:
                tl.store(mean_ptr + row, mean)
        wr = r  # n = r*z is not formed: z as it was loaded takes fewer registers
        if WEIGHTS:
            wr *= tl.load(weights_ptr + row).to(tl.float32)
        dz = wr * scaled - z * (wr * r * mean)
        tl.store(dz_ptr + row * WIDTH + column, dz.to(dz_ptr.dtype.element_ty), mask=there)
        dalpha += dy * z * wr
    tl.store(dalpha_ptr + program * WIDTH + column, dalpha, mask=there)
