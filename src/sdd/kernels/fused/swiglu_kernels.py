"""The kernels of `sdd.kernels.fused.swiglu`, which has their equations.

Rows may belong to experts, each with an alpha of its own. `experts_ptr` holds the expert of each row. Rows are sorted
by expert, and `ends_ptr` holds the end of each expert's rows, so that a program of the backward pass has rows of one
expert alone.
"""

import triton.language as tl

from sdd.kernels.fused.common import add_to_first, block_count, jit, load_row, zeros


@jit
def forward_kernel(
    z_gate_ptr,
    z_up_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
    experts_ptr,
    h_ptr,
    r_ptr,
    q_ptr,
    WIDTH,
    gate_stride,
    up_stride,
    eps,
    up_eps,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    JOINT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, or a block of columns of a row whose statistics another kernel has computed."""
    row = tl.program_id(0).to(tl.int64)
    alpha = tl.load(experts_ptr + row) * WIDTH if EXPERTS else 0
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    g = load_row(z_gate_ptr + row * gate_stride, column, there)
    u = load_row(z_up_ptr + row * up_stride, column, there)
    if not GATE:  # a branch without a norm: unwritten memory would break that equal inputs give equal bits
        tl.store(r_ptr + 2 * row, 1.0)
    if UP != 2:
        tl.store(r_ptr + 2 * row + 1, 1.0)
    r_gate = 1.0
    if GATE:
        if BY_COLUMN:
            r_gate = tl.load(r_ptr + 2 * row)
        elif JOINT:
            r_gate = tl.rsqrt((tl.sum(g * g) + tl.sum(u * u)) / (2 * WIDTH) + eps)
            tl.store(r_ptr + 2 * row, r_gate)
        else:
            r_gate = tl.rsqrt(tl.sum(g * g) / WIDTH + eps)
            tl.store(r_ptr + 2 * row, r_gate)
        g = load_row(alpha_gate_ptr + alpha, column, there) * (g * r_gate)
    if UP == 2:
        if BY_COLUMN:
            r_up = tl.load(r_ptr + 2 * row + 1)
        else:
            r_up = r_gate if JOINT else tl.rsqrt(tl.sum(u * u) / WIDTH + up_eps)
            tl.store(r_ptr + 2 * row + 1, r_up)
        u = load_row(alpha_up_ptr + alpha, column, there) * (u * r_up)
    if UP == 1:
        if not BY_COLUMN:
            tl.store(q_ptr + row, tl.sum(u * u) / WIDTH)
        u = load_row(alpha_up_ptr + alpha, column, there) * u
    h = g / (1 + tl.exp(-g)) * u
    tl.store(h_ptr + row * WIDTH + column, h.to(h_ptr.dtype.element_ty), mask=there)


@jit
def gradients(
    gate_ptr,
    up_ptr,
    dh_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
    alpha,
    r_gate,
    r_up,
    column,
    WIDTH,
    GATE: tl.constexpr,
    UP: tl.constexpr,
):
    """`n_g`, `n_u` (z times r, which is 1 without a norm), dg, du and both alphas (1 for a plain branch) of a block."""
    there = column < WIDTH
    n_gate, n_up = load_row(gate_ptr, column, there) * r_gate, load_row(up_ptr, column, there) * r_up
    dh = load_row(dh_ptr, column, there)
    alpha_gate = load_row(alpha_gate_ptr + alpha, column, there) if GATE else 1.0
    alpha_up = load_row(alpha_up_ptr + alpha, column, there) if UP else 1.0
    g, u = alpha_gate * n_gate, alpha_up * n_up
    sigma = 1 / (1 + tl.exp(-g))
    return n_gate, n_up, dh * u * sigma * (1 + g * (1 - sigma)), dh * g * sigma, alpha_gate, alpha_up


@jit
def means(
    gate_ptr,
    up_ptr,
    dh_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
    alpha,
    r_gate,
    r_up,
    WIDTH,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The means of alpha_g*dg*n_g and alpha_u*du*n_u over a row of one block (BLOCKS is 1) or of any number."""
    gate_total = tl.full((BLOCK,), 0, tl.float32)
    up_total = tl.full((BLOCK,), 0, tl.float32)
    for block in range(block_count(WIDTH, BLOCK, BLOCKS)):
        column = block * BLOCK + tl.arange(0, BLOCK)
        n_gate, n_up, dg, du, a_gate, a_up = gradients(
            gate_ptr, up_ptr, dh_ptr, alpha_gate_ptr, alpha_up_ptr, alpha, r_gate, r_up, column, WIDTH, GATE, UP
        )
        gate_total += a_gate * dg * n_gate
        up_total += a_up * du * n_up
    return tl.sum(gate_total) / WIDTH, tl.sum(up_total) / WIDTH


@jit
def backward_mean_kernel(
    z_gate_ptr,
    z_up_ptr,
    dh_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
    experts_ptr,
    r_ptr,
    mean_ptr,
    WIDTH,
    gate_stride,
    up_stride,
    dh_stride,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The means of alpha_g*dg*n_g and alpha_u*du*n_u over one wide row."""
    row = tl.program_id(0).to(tl.int64)
    alpha = tl.load(experts_ptr + row) * WIDTH if EXPERTS else 0
    r_gate = tl.load(r_ptr + 2 * row) if GATE else 1.0
    r_up = tl.load(r_ptr + 2 * row + 1) if UP == 2 else 1.0
    mean_gate, mean_up = means(
        z_gate_ptr + row * gate_stride, z_up_ptr + row * up_stride, dh_ptr + row * dh_stride,
        alpha_gate_ptr, alpha_up_ptr, alpha, r_gate, r_up, WIDTH, GATE, UP, BLOCK, 2,
    )  # fmt: skip
    tl.store(mean_ptr + 2 * row, mean_gate)
    tl.store(mean_ptr + 2 * row + 1, mean_up)


@jit
def backward_kernel(
    z_gate_ptr,
    z_up_ptr,
    dh_ptr,
    dq_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
    ends_ptr,
    r_ptr,
    mean_ptr,
    dz_gate_ptr,
    dz_up_ptr,
    dalpha_gate_ptr,
    dalpha_up_ptr,
    N_ROWS,
    WIDTH,
    gate_stride,
    up_stride,
    dh_stride,
    AN_EXPERT,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    JOINT: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_DQ: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Every STRIDE-th row (of an expert), or its block of columns, so that dalpha needs one partial sum a program."""
    program = tl.program_id(0)
    first, end, STRIDE, alpha = program, N_ROWS, tl.num_programs(0), 0
    if EXPERTS:  # AN_EXPERT programs for each, with its alpha; an expert without rows has sums of 0
        expert, STRIDE = program // AN_EXPERT, AN_EXPERT
        first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0) + program % AN_EXPERT
        end, alpha = tl.load(ends_ptr + expert), expert.to(tl.int64) * WIDTH
    start = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dalpha_gate, dalpha_up = zeros((BLOCK,), BLOCKS), zeros((BLOCK,), BLOCKS)
    for i in range(tl.cdiv(end - first, STRIDE)):
        row = first.to(tl.int64) + i * STRIDE
        gate_row, up_row, dh_row = z_gate_ptr + row * gate_stride, z_up_ptr + row * up_stride, dh_ptr + row * dh_stride
        r_gate = tl.load(r_ptr + 2 * row) if GATE else 1.0
        r_up = tl.load(r_ptr + 2 * row + 1) if UP == 2 else 1.0
        mean_gate, mean_up = 0.0, 0.0
        if BY_COLUMN:
            if GATE:
                mean_gate = tl.load(mean_ptr + 2 * row)
            if UP == 2:
                mean_up = tl.load(mean_ptr + 2 * row + 1)
        elif GATE or UP == 2:
            mean_gate, mean_up = means(
                gate_row, up_row, dh_row, alpha_gate_ptr, alpha_up_ptr, alpha, r_gate, r_up, WIDTH, GATE, UP, BLOCK,
                BLOCKS,
            )  # fmt: skip
        if JOINT:
            mean_gate = (mean_gate + mean_up) / 2
            mean_up = mean_gate
        for block in range(block_count(WIDTH, BLOCK, BLOCKS)):
            column = start + block * BLOCK
            there = column < WIDTH
            n_gate, n_up, dg, du, a_gate, a_up = gradients(
                gate_row, up_row, dh_row, alpha_gate_ptr, alpha_up_ptr, alpha, r_gate, r_up, column, WIDTH, GATE, UP
            )
            dalpha_gate = add_to_first(dalpha_gate, dg * n_gate)
            dalpha_up = add_to_first(dalpha_up, du * n_up)
            dz_gate, dz_up = a_gate * dg, a_up * du
            if GATE:
                dz_gate = r_gate * (dz_gate - n_gate * mean_gate)
            if UP == 2:
                dz_up = r_up * (dz_up - n_up * mean_up)
            if HAS_DQ:
                dz_up += tl.load(dq_ptr + row) * 2 / WIDTH * n_up
            tl.store(dz_gate_ptr + row * WIDTH + column, dz_gate.to(dz_gate_ptr.dtype.element_ty), mask=there)
            tl.store(dz_up_ptr + row * WIDTH + column, dz_up.to(dz_up_ptr.dtype.element_ty), mask=there)
    for block in tl.static_range(BLOCKS):
        column = start + block * BLOCK
        there = column < WIDTH
        partial = program * WIDTH + column
        if GATE:
            tl.store(dalpha_gate_ptr + partial, dalpha_gate[block], mask=there)
        if UP:
            tl.store(dalpha_up_ptr + partial, dalpha_up[block], mask=there)
