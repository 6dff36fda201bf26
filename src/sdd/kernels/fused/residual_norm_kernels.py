"""The kernels of `sdd.kernels.fused.residual_norm`, whose equations they compute."""

import triton.language as tl

from sdd.kernels.fused.common import add_to_first, block_count, jit, load_row, zeros


@jit
def forward_kernel(
    z_ptr,
    residual_ptr,
    alpha_ptr,
    eps_ptr,
    post_alpha_ptr,
    stream_ptr,
    y_ptr,
    narrow_ptr,
    r_ptr,
    post_r_ptr,
    WIDTH,
    z_stride,
    residual_stride,
    scale,
    eps,
    post_eps,
    ALPHA: tl.constexpr,
    ROW_EPS: tl.constexpr,
    POST: tl.constexpr,
    STREAM: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, or (without post-norm) a block of columns of a row whose r another kernel has computed."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    s = load_row(z_ptr + row * z_stride, column, there)
    if ALPHA:
        if BY_COLUMN:
            r = tl.load(r_ptr + row)
        else:
            if ROW_EPS:
                eps = tl.load(eps_ptr + row)
            r = tl.rsqrt(tl.sum(s * s) / WIDTH + eps)
            tl.store(r_ptr + row, r)
        s = load_row(alpha_ptr, column, there) * (s * r)
    s += scale * load_row(residual_ptr + row * residual_stride, column, there)
    if STREAM:
        tl.store(stream_ptr + row * WIDTH + column, s.to(stream_ptr.dtype.element_ty), mask=there)
    if POST:
        post_r = tl.rsqrt(tl.sum(s * s) / WIDTH + post_eps)
        tl.store(post_r_ptr + row, post_r)
        s *= post_r
        y = load_row(post_alpha_ptr, column, there) * s
        tl.store(y_ptr + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=there)
        if NARROW:
            second = s if STREAM else y
            tl.store(narrow_ptr + row * WIDTH + column, second.to(narrow_ptr.dtype.element_ty), mask=there)


@jit
def block_of(
    dy_ptr,
    dcopy_ptr,
    ds_ptr,
    z_ptr,
    saved_ptr,
    alpha_ptr,
    post_alpha_ptr,
    r,
    post_r,
    scale,
    column,
    WIDTH,
    ALPHA: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_DCOPY: tl.constexpr,
    HAS_DS: tl.constexpr,
):
    """A block of n, n2 and dy, of ds without the part along n2, and of both alphas."""
    there = column < WIDTH
    n, alpha = 0.0, 1.0
    if ALPHA or SAVED == "residual":
        n = load_row(z_ptr, column, there) * r
    if ALPHA:
        alpha = load_row(alpha_ptr, column, there)
    post_n = load_row(saved_ptr, column, there)
    if SAVED == "residual":
        post_n = scale * post_n + alpha * n
    if SAVED != "norm":
        post_n *= post_r
    dy = load_row(dy_ptr, column, there)
    if HAS_DCOPY:
        dy += load_row(dcopy_ptr, column, there)
    post_alpha = load_row(post_alpha_ptr, column, there)
    ds = post_r * (post_alpha * dy)
    if HAS_DS:
        ds += load_row(ds_ptr, column, there)
    return n, post_n, dy, ds, alpha, post_alpha


@jit
def backward_kernel(
    dy_ptr,
    dcopy_ptr,
    ds_ptr,
    z_ptr,
    saved_ptr,
    alpha_ptr,
    post_alpha_ptr,
    r_ptr,
    post_r_ptr,
    dz_ptr,
    dresidual_ptr,
    dalpha_ptr,
    dpost_alpha_ptr,
    mean_ptr,
    N_ROWS,
    WIDTH,
    dy_stride,
    dcopy_stride,
    ds_stride,
    z_stride,
    saved_stride,
    scale,
    ALPHA: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_DCOPY: tl.constexpr,
    HAS_DS: tl.constexpr,
    STORE_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Every N_PROGRAMS-th row with a norm of s, so that each dalpha needs one partial sum a program."""
    program, N_PROGRAMS = tl.program_id(0), tl.num_programs(0)
    dalpha, dpost_alpha = zeros((BLOCK,), BLOCKS), zeros((BLOCK,), BLOCKS)
    for i in range(tl.cdiv(N_ROWS - program, N_PROGRAMS)):
        row = program.to(tl.int64) + i * N_PROGRAMS
        dy_row, saved_row = dy_ptr + row * dy_stride, saved_ptr + row * saved_stride
        dcopy_row = dcopy_ptr + row * dcopy_stride if HAS_DCOPY else dy_row
        ds_row = ds_ptr + row * ds_stride if HAS_DS else dy_row
        z_row = z_ptr + row * z_stride if ALPHA or SAVED == "residual" else dy_row
        r = tl.load(r_ptr + row) if ALPHA else 1.0
        post_r = tl.load(post_r_ptr + row)
        post_total = tl.full((BLOCK,), 0, tl.float32)
        total = tl.full((BLOCK,), 0, tl.float32)
        along = tl.full((BLOCK,), 0, tl.float32)
        for block in range(block_count(WIDTH, BLOCK, BLOCKS)):
            column = block * BLOCK + tl.arange(0, BLOCK)
            n, post_n, dy, ds, alpha, post_alpha = block_of(
                dy_row, dcopy_row, ds_row, z_row, saved_row, alpha_ptr, post_alpha_ptr, r, post_r, scale,
                column, WIDTH, ALPHA, SAVED, HAS_DCOPY, HAS_DS,
            )  # fmt: skip
            post_total += dy * post_alpha * post_n
            if ALPHA:
                total += alpha * n * ds
                along += alpha * n * post_n
        post_mean = post_r * (tl.sum(post_total) / WIDTH)
        mean = 0.0
        if ALPHA:
            mean = (tl.sum(total) - post_mean * tl.sum(along)) / WIDTH  # ds above is still without -post_mean*n2
            if STORE_MEAN:
                tl.store(mean_ptr + row, mean)
        for block in range(block_count(WIDTH, BLOCK, BLOCKS)):
            column = block * BLOCK + tl.arange(0, BLOCK)
            there = column < WIDTH
            n, post_n, dy, ds, alpha, post_alpha = block_of(
                dy_row, dcopy_row, ds_row, z_row, saved_row, alpha_ptr, post_alpha_ptr, r, post_r, scale,
                column, WIDTH, ALPHA, SAVED, HAS_DCOPY, HAS_DS,
            )  # fmt: skip
            dpost_alpha = add_to_first(dpost_alpha, dy * post_n)
            ds -= post_n * post_mean
            dalpha = add_to_first(dalpha, ds * n)
            tl.store(dresidual_ptr + row * WIDTH + column, (scale * ds).to(dresidual_ptr.dtype.element_ty), mask=there)
            if ALPHA:
                ds = r * (alpha * ds - n * mean)
            tl.store(dz_ptr + row * WIDTH + column, ds.to(dz_ptr.dtype.element_ty), mask=there)
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        there = column < WIDTH
        if ALPHA:
            tl.store(dalpha_ptr + program * WIDTH + column, dalpha[block], mask=there)
        tl.store(dpost_alpha_ptr + program * WIDTH + column, dpost_alpha[block], mask=there)
