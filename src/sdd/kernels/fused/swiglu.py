"""`h = silu(g) * u` of two normed, scaled or plain projections.

References: `sdd_swiglu`, `swiglu` and `sdd_swiglu_bare_up` of `sdd.functional`, which also round g and u. With n = r*z
of a normed branch and sigma the logistic function:

    g = alpha_g*n_g or z_g              u = alpha_u*n_u, alpha_u*z_u or z_u           h = g*sigma(g) * u
    du = dh * g*sigma(g)                dg = dh * u * sigma(g) * (1 + g*(1 - sigma(g)))
    dalpha_g = sum over rows of dg*n_g  dz_g = r_g * (alpha_g*dg - n_g*m_g)           m_g = mean(alpha_g*dg*n_g)

and the same for a normed u. A joint group has one r and one m over both. A bare up projection (its norm left to an SDD
consumer) has dalpha_u = sum of du*z_u and dz_u = alpha_u*du + dq * 2*z_u/N, where q = mean(z_u^2) is its second output.
Saved for backward: z_g, z_u and r.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sdd import functional as sdd_F
from sdd.kernels.fused.common import (
    WIDE_BLOCK,
    dense,
    forbid_double_backward,
    jit,
    load_row,
    mean_square_kernel,
    n_programs,
    on_device,
    row_blocks,
    rows,
    warps,
)

#: The most features of gate and of up that one program holds at once.
MAX_PAIR = 8192
#: What the up projection is: plain, scaled by its alpha (its norm left out), or normed.
PLAIN, BARE, NORMED = range(3)


@jit
def forward_kernel(
    z_gate_ptr,
    z_up_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
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
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, or a block of columns of a row whose statistics are there already."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    g = load_row(z_gate_ptr + row * gate_stride, column, there)
    u = load_row(z_up_ptr + row * up_stride, column, there)
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
        g = load_row(alpha_gate_ptr, column, there) * (g * r_gate)
    if UP == 2:
        if BY_COLUMN:
            r_up = tl.load(r_ptr + 2 * row + 1)
        else:
            r_up = r_gate if JOINT else tl.rsqrt(tl.sum(u * u) / WIDTH + up_eps)
            tl.store(r_ptr + 2 * row + 1, r_up)
        u = load_row(alpha_up_ptr, column, there) * (u * r_up)
    if UP == 1:
        if not BY_COLUMN:
            tl.store(q_ptr + row, tl.sum(u * u) / WIDTH)
        u = load_row(alpha_up_ptr, column, there) * u
    h = g / (1 + tl.exp(-g)) * u
    tl.store(h_ptr + row * WIDTH + column, h.to(h_ptr.dtype.element_ty), mask=there)


@jit
def gradients(z_gate, z_up, dh, alpha_gate, alpha_up, r_gate, r_up):
    """`n_g`, `n_u` (z times r, which is 1 where no norm is), dg and du; alpha is 1 for a plain branch."""
    n_gate, n_up = z_gate * r_gate, z_up * r_up
    g, u = alpha_gate * n_gate, alpha_up * n_up
    sigma = 1 / (1 + tl.exp(-g))
    return n_gate, n_up, dh * u * sigma * (1 + g * (1 - sigma)), dh * g * sigma


@jit
def backward_mean_kernel(
    z_gate_ptr,
    z_up_ptr,
    dh_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
    r_ptr,
    mean_ptr,
    WIDTH,
    gate_stride,
    up_stride,
    dh_stride,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The means of alpha_g*dg*n_g and alpha_u*du*n_u over one wide row."""
    row = tl.program_id(0).to(tl.int64)
    alpha_gate, alpha_up, r_gate, r_up = 1.0, 1.0, 1.0, 1.0
    if GATE:
        r_gate = tl.load(r_ptr + 2 * row)
    if UP == 2:
        r_up = tl.load(r_ptr + 2 * row + 1)
    gate_total = tl.full((BLOCK,), 0, tl.float32)
    up_total = tl.full((BLOCK,), 0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < WIDTH
        z_gate = load_row(z_gate_ptr + row * gate_stride, column, there)
        z_up = load_row(z_up_ptr + row * up_stride, column, there)
        dh = load_row(dh_ptr + row * dh_stride, column, there)
        a_gate = load_row(alpha_gate_ptr, column, there) if GATE else alpha_gate
        a_up = load_row(alpha_up_ptr, column, there) if UP else alpha_up
        n_gate, n_up, dg, du = gradients(z_gate, z_up, dh, a_gate, a_up, r_gate, r_up)
        gate_total += a_gate * dg * n_gate
        up_total += a_up * du * n_up
    tl.store(mean_ptr + 2 * row, tl.sum(gate_total) / WIDTH)
    tl.store(mean_ptr + 2 * row + 1, tl.sum(up_total) / WIDTH)


@jit
def backward_kernel(
    z_gate_ptr,
    z_up_ptr,
    dh_ptr,
    dq_ptr,
    alpha_gate_ptr,
    alpha_up_ptr,
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
    GATE: tl.constexpr,
    UP: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_DQ: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every N_PROGRAMS-th row, or its block of columns, so that dalpha needs one partial sum a program."""
    program, N_PROGRAMS = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    alpha_gate, alpha_up, r_gate, r_up = 1.0, 1.0, 1.0, 1.0
    if GATE:
        alpha_gate = load_row(alpha_gate_ptr, column, there)
    if UP:
        alpha_up = load_row(alpha_up_ptr, column, there)
    dalpha_gate = tl.full((BLOCK,), 0, tl.float32)
    dalpha_up = tl.full((BLOCK,), 0, tl.float32)
    for i in range(tl.cdiv(N_ROWS - program, N_PROGRAMS)):
        row = program.to(tl.int64) + i * N_PROGRAMS
        z_gate = load_row(z_gate_ptr + row * gate_stride, column, there)
        z_up = load_row(z_up_ptr + row * up_stride, column, there)
        dh = load_row(dh_ptr + row * dh_stride, column, there)
        r_g = tl.load(r_ptr + 2 * row) if GATE else r_gate
        r_u = tl.load(r_ptr + 2 * row + 1) if UP == 2 else r_up
        n_gate, n_up, dg, du = gradients(z_gate, z_up, dh, alpha_gate, alpha_up, r_g, r_u)
        dz_gate, dz_up = alpha_gate * dg, alpha_up * du
        if GATE:
            mean_gate = tl.load(mean_ptr + 2 * row) if BY_COLUMN else tl.sum(dz_gate * n_gate) / WIDTH
            dalpha_gate += dg * n_gate
        if UP == 2:
            mean_up = tl.load(mean_ptr + 2 * row + 1) if BY_COLUMN else tl.sum(dz_up * n_up) / WIDTH
            if JOINT:
                mean_gate = (mean_gate + mean_up) / 2
                mean_up = mean_gate
            dz_up = r_u * (dz_up - n_up * mean_up)
        if GATE:
            dz_gate = r_g * (dz_gate - n_gate * mean_gate)
        if UP:
            dalpha_up += du * n_up
        if HAS_DQ:
            dz_up += tl.load(dq_ptr + row) * 2 / WIDTH * z_up
        tl.store(dz_gate_ptr + row * WIDTH + column, dz_gate.to(dz_gate_ptr.dtype.element_ty), mask=there)
        tl.store(dz_up_ptr + row * WIDTH + column, dz_up.to(dz_up_ptr.dtype.element_ty), mask=there)
    partial = program * WIDTH + column
    if GATE:
        tl.store(dalpha_gate_ptr + partial, dalpha_gate, mask=there)
    if UP:
        tl.store(dalpha_up_ptr + partial, dalpha_up, mask=there)


@torch.library.custom_op("sdd::swiglu", mutates_args=())
def swiglu_op(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    up: int,
    joint: bool,
    eps: float,
    up_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`h` in the dtype of z_gate, r `[..., 2]`, and q `[...]` (empty unless up is BARE)."""
    h, r, q = _empty(z_gate, z_up, alpha_gate, alpha_up, up, joint, eps, up_eps)
    gate_rows, up_rows, r_rows = rows(z_gate), rows(z_up), r.view(-1, 2)
    n_rows, width = gate_rows.shape
    if not n_rows:
        return h, r, q
    with on_device(h):
        reduces = alpha_gate is not None or up != PLAIN
        block, n_blocks = row_blocks(width, reduces, MAX_PAIR)
        if reduces and n_blocks > 1:
            _statistics(gate_rows, up_rows, r_rows, q, alpha_gate is not None, up, joint, eps, up_eps)
        forward_kernel[(n_rows, n_blocks)](
            gate_rows, up_rows, dense(alpha_gate), dense(alpha_up), h, r, q, width,
            gate_rows.stride(0), up_rows.stride(0), eps, up_eps,
            GATE=alpha_gate is not None, UP=up, JOINT=joint, BY_COLUMN=n_blocks > 1,
            BLOCK=block, num_warps=warps(block, 16),
        )  # fmt: skip
    return h, r, q


@swiglu_op.register_fake
def _empty(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    up: int,
    joint: bool,
    eps: float,
    up_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = z_gate.shape[:-1]
    return (
        z_gate.new_empty(z_gate.shape),
        z_gate.new_empty((*shape, 2), dtype=torch.float32),
        z_gate.new_empty(shape if up == BARE else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("sdd::swiglu_backward", mutates_args=())
def swiglu_backward_op(
    dh: Tensor,
    dq: Tensor | None,
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    r: Tensor,
    up: int,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dz_g`, `dz_u` in the dtypes of z; dalpha_g, dalpha_u in float32, empty where there is no alpha."""
    outputs = _empty_backward(dh, dq, z_gate, z_up, alpha_gate, alpha_up, r, up, joint)
    gate_rows, up_rows, dh_rows = rows(z_gate), rows(z_up), rows(dh)
    n_rows, width = gate_rows.shape
    if not n_rows:
        return *outputs[:2], outputs[2].zero_(), outputs[3].zero_()
    alphas = dense(alpha_gate), dense(alpha_up)
    strides = gate_rows.stride(0), up_rows.stride(0), dh_rows.stride(0)
    flags = {"GATE": alpha_gate is not None, "UP": up}
    with on_device(dh):
        reduces = alpha_gate is not None or up == NORMED
        block, n_blocks = row_blocks(width, reduces, MAX_PAIR)
        mean = torch.empty_like(r) if reduces and n_blocks > 1 else None
        if mean is not None:
            backward_mean_kernel[(n_rows,)](
                gate_rows, up_rows, dh_rows, *alphas, r, mean, width, *strides, **flags, BLOCK=2048, num_warps=8
            )
        programs = n_programs(dh, n_rows, block, n_blocks)
        partial = [dh.new_empty(programs if a is not None else 0, width, dtype=torch.float32) for a in alphas]
        backward_kernel[(programs, n_blocks)](
            gate_rows, up_rows, dh_rows, None if dq is None else dq.reshape(-1).contiguous(), *alphas, r, mean,
            *outputs[:2], *partial, n_rows, width, *strides, **flags,
            JOINT=joint, HAS_DQ=dq is not None, BY_COLUMN=n_blocks > 1, BLOCK=block, num_warps=warps(block, 8),
        )  # fmt: skip
    dalpha_gate, dalpha_up = (sums.sum(0) if sums.shape[0] else sums.view(-1) for sums in partial)
    return *outputs[:2], dalpha_gate, dalpha_up


@swiglu_backward_op.register_fake
def _empty_backward(
    dh: Tensor,
    dq: Tensor | None,
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    r: Tensor,
    up: int,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (0 if alpha is None else z_gate.shape[-1] for alpha in (alpha_gate, alpha_up))
    dalpha_gate, dalpha_up = (r.new_empty(size) for size in sizes)
    return z_gate.new_empty(z_gate.shape), z_up.new_empty(z_up.shape), dalpha_gate, dalpha_up


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z_gate, z_up, alpha_gate, alpha_up, ctx.up, ctx.joint, _, _ = inputs
    _, r, q = output
    ctx.mark_non_differentiable(*([r] if ctx.up == BARE else [r, q]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z_gate, z_up, alpha_gate, alpha_up, r)


def _backward(ctx: Any, dh: Tensor | None, _r: None, dq: Tensor | None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("sdd_swiglu")
    z_gate, z_up, alpha_gate, alpha_up, r = ctx.saved_tensors
    dh = torch.zeros_like(z_gate) if dh is None else dh
    dz_gate, dz_up, dalpha_gate, dalpha_up = swiglu_backward_op(
        dh, dq, z_gate, z_up, alpha_gate, alpha_up, r, ctx.up, ctx.joint
    )
    return (
        dz_gate,
        dz_up,
        None if alpha_gate is None else dalpha_gate.to(alpha_gate.dtype),
        None if alpha_up is None else dalpha_up.to(alpha_up.dtype),
        *[None] * 4,
    )


swiglu_op.register_autograd(_backward, setup_context=_setup_context)


def sdd_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    *,
    joint: bool = False,
    eps: float = 1e-6,
    up_eps: float | None = None,
) -> Tensor:
    """`sdd.functional.sdd_swiglu` (and `swiglu`, without alphas) by the kernels."""
    sdd_F.check_swiglu(z_gate, z_up, alpha_gate, alpha_up, joint, up_eps not in (None, eps))
    up = PLAIN if alpha_up is None else NORMED
    return swiglu_op(z_gate, z_up, alpha_gate, alpha_up, up, joint, eps, eps if up_eps is None else up_eps)[0]


def sdd_swiglu_bare_up(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor | None, alpha_up: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`sdd.functional.sdd_swiglu_bare_up` by the kernels."""
    sdd_F.check_shapes(z_gate, z_up, alpha_gate, alpha_up)
    h, _, q = swiglu_op(z_gate, z_up, alpha_gate, alpha_up, BARE, False, eps, eps)
    return h, q


def _statistics(
    gate: Tensor,
    up: Tensor,
    r: Tensor,
    q: Tensor,
    has_gate_norm: bool,
    up_kind: int,
    joint: bool,
    eps: float,
    up_eps: float,
) -> None:
    """Write r and q of wide rows."""
    n_rows, width = gate.shape

    def mean_square(z: Tensor, to: Tensor) -> None:
        mean_square_kernel[(n_rows, 1)](z, to, width, z.stride(0), to.stride(0), BLOCK=WIDE_BLOCK, num_warps=8)

    if has_gate_norm:
        mean_square(gate, r[:, 0])
    if up_kind == NORMED:
        mean_square(up, r[:, 1])
    if up_kind == BARE:
        mean_square(up, q.view(-1))
    if joint:
        r[:] = r.mean(-1, keepdim=True)
    r.add_(torch.tensor([eps, up_eps], device=r.device)).rsqrt_()
