"""`h = silu(g) * u` of two normed, scaled or plain projections.

References: `sdd_swiglu`, `swiglu` and `sdd_swiglu_bare_up` of `sdd.functional`, which also round g and u. With n = r*z
of a normed branch and sigma the logistic function:

    g = alpha_g*n_g or z_g              u = alpha_u*n_u, alpha_u*z_u or z_u           h = g*sigma(g) * u
    du = dh * g*sigma(g)                dg = dh * u * sigma(g) * (1 + g*(1 - sigma(g)))
    dalpha_g = sum over rows of dg*n_g  dz_g = r_g * (alpha_g*dg - n_g*m_g)           m_g = mean(alpha_g*dg*n_g)

and the same for a normed u. A joint group has one r and one m over both. A bare up projection (its norm left to an SDD
consumer) has dalpha_u = sum of du*z_u and dz_u = alpha_u*du + dq * 2*z_u/N, where q = mean(z_u^2) is its second output.
Saved for backward: z_g, z_u and r.

Rows sorted by expert use the alphas of their expert, `[E, N]`, and dalpha sums over the expert's rows: references
`expert_swiglu` and `expert_swiglu_bare_up` of `sdd.kernels.experts`.
"""

from typing import Any

import torch
from torch import Tensor

from sdd import functional as sdd_F
from sdd.kernels.experts import check_expert_swiglu
from sdd.kernels.fused.common import (
    WIDE_BLOCK,
    cast,
    cdiv,
    dense,
    fits,
    forbid_double_backward,
    launched_as,
    mean_square_kernel,
    n_programs,
    row_blocks,
    row_shape,
    rows,
    warps,
)
from sdd.kernels.fused.scaled_norm import scaled_norm
from sdd.kernels.fused.swiglu_kernels import backward_kernel, backward_mean_kernel, forward_kernel
from sdd.kernels.recompute import gate_and_up

#: The most features of gate and of up that one program holds at once.
MAX_PAIR = 16_384
#: The kind of the up projection: plain, scaled by its alpha (its norm left out), or normed.
PLAIN, BARE, NORMED = range(3)


def _empty(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    up: int,
    joint: bool,
    eps: float,
    up_eps: float,
    experts: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = z_gate.shape[:-1]
    return (
        z_gate.new_empty(z_gate.shape),
        z_gate.new_empty((*shape, 2), dtype=torch.float32),
        z_gate.new_empty(shape if up == BARE else (0,), dtype=torch.float32),
    )


@launched_as("swiglu", _empty)
def swiglu_op(outputs, gate, up, alpha_gate, alpha_up, kind, joint, eps, up_eps, experts=None, ends=None) -> None:
    """`h` in the dtype of z_gate, r `[..., 2]`, and q `[...]` (empty unless the kind of up is BARE)."""
    h, r, q = outputs
    gate, up, r = rows(gate), rows(up), r.view(-1, 2)
    n_rows, width = gate.shape
    reduces = alpha_gate is not None or kind != PLAIN
    block, n_blocks = row_blocks(width, reduces, MAX_PAIR)
    if reduces and n_blocks > 1:
        _statistics(gate, up, r, q, alpha_gate is not None, kind, joint, eps, up_eps)
    forward_kernel[(n_rows, n_blocks)](
        gate, up, dense(alpha_gate), dense(alpha_up), experts, h, r, q, width,
        gate.stride(0), up.stride(0), eps, up_eps,
        GATE=alpha_gate is not None, UP=kind, JOINT=joint, EXPERTS=experts is not None, BY_COLUMN=n_blocks > 1,
        BLOCK=block, num_warps=warps(block, 8),
    )  # fmt: skip


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
    experts: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((0,) if alpha is None else alpha.shape for alpha in (alpha_gate, alpha_up))
    dalpha_gate, dalpha_up = (r.new_empty(shape) for shape in shapes)
    return z_gate.new_empty(z_gate.shape), z_up.new_empty(z_up.shape), dalpha_gate, dalpha_up


@launched_as("swiglu_backward", _empty_backward)
def swiglu_backward_op(
    outputs, dh, dq, gate, up, alpha_gate, alpha_up, r, kind, joint, experts=None, ends=None
) -> None:
    """`dz_g`, `dz_u` in the dtypes of z; dalpha_g, dalpha_u in float32, `[0]` where there is no alpha."""
    read = rows(gate), rows(up), rows(dh)
    n_rows, width = read[0].shape
    alphas, strides = (dense(alpha_gate), dense(alpha_up)), [x.stride(0) for x in read]
    flags = {"GATE": alpha_gate is not None, "UP": kind, "EXPERTS": experts is not None}
    reduces, n_sums = alpha_gate is not None or kind == NORMED, (alpha_gate is not None) + (kind != PLAIN)
    whole = reduces and width <= MAX_PAIR and fits(width, n_sums)
    block, n_blocks = (width, 1) if whole else row_blocks(width, False, MAX_PAIR)
    shape = row_shape(block, n_sums)
    mean = torch.empty_like(r) if reduces and not whole else None
    if mean is not None:
        backward_mean_kernel[(n_rows,)](
            *read, *alphas, experts, r, mean, width, *strides, **flags, BLOCK=2048, num_warps=8
        )
    n_experts = 1 if ends is None else len(ends)
    an_expert = n_programs(dh, n_rows, shape, n_blocks)
    if ends is not None:  # twice as many programs in all, as experts have unlike numbers of rows
        an_expert = cdiv(2 * an_expert, n_experts)
    each = n_experts, an_expert, width
    partial = [dh.new_empty(each if a is not None else (0,), dtype=torch.float32) for a in alphas]
    backward_kernel[(n_experts * an_expert, n_blocks)](
        *read, dense(dq), *alphas, ends, r, mean, *outputs[:2], *partial, n_rows, width, *strides, an_expert, **flags,
        JOINT=joint, HAS_DQ=dq is not None, BY_COLUMN=not whole, **shape.options,
    )  # fmt: skip
    for sums, dalpha in zip(partial, outputs[2:], strict=True):
        if dalpha.numel():
            torch.sum(sums, 1, out=dalpha.view(n_experts, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z_gate, z_up, alpha_gate, alpha_up, ctx.up, ctx.joint, _, _, experts, ends = inputs
    _, r, q = output
    ctx.mark_non_differentiable(*([r] if ctx.up == BARE else [r, q]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z_gate, z_up, alpha_gate, alpha_up, r, experts, ends)


def _backward(ctx: Any, dh: Tensor | None, _r: None, dq: Tensor | None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("sdd_swiglu")
    z_gate, z_up, alpha_gate, alpha_up, r, experts, ends = ctx.saved_tensors
    dh = torch.zeros_like(z_gate) if dh is None else dh
    dz_gate, dz_up, dalpha_gate, dalpha_up = swiglu_backward_op(
        dh, dq, z_gate, z_up, alpha_gate, alpha_up, r, ctx.up, ctx.joint, experts, ends
    )
    return dz_gate, dz_up, cast(dalpha_gate, alpha_gate), cast(dalpha_up, alpha_up), *[None] * 6


swiglu_op.register_autograd(_backward, setup_context=_setup_context)


def swiglu(gate, up) -> Tensor:
    """`silu(gate) * up`."""
    sdd_F.check_shapes(gate, up)
    return swiglu_op(gate, up, None, None, PLAIN, False, 0.0, 0.0)[0]


def sdd_swiglu(z_gate, z_up, alpha_gate, alpha_up, *, joint, eps, up_eps) -> Tensor:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * norm(z_u))`; with an eps for each row the norms are separate kernels."""
    sdd_F.check_swiglu(z_gate, z_up, alpha_gate, alpha_up, joint, eps, up_eps)
    up_eps = eps if up_eps is None else up_eps
    if isinstance(eps, Tensor) or isinstance(up_eps, Tensor):
        return swiglu(*gate_and_up(scaled_norm, z_gate, z_up, alpha_gate, alpha_up, joint, eps, up_eps))
    kind = PLAIN if alpha_up is None else NORMED
    return swiglu_op(z_gate, z_up, alpha_gate, alpha_up, kind, joint, eps, up_eps)[0]


def sdd_swiglu_bare_up(z_gate, z_up, alpha_gate, alpha_up, *, eps) -> tuple[Tensor, Tensor]:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * z_u)`, and `mean(z_u^2)`."""
    sdd_F.check_shapes(z_gate, z_up, alpha_gate, alpha_up)
    if isinstance(eps, Tensor):
        z_gate = z_gate if alpha_gate is None else scaled_norm(z_gate, alpha_gate, eps=eps)
        alpha_gate, eps = None, 0.0
    h, _, q = swiglu_op(z_gate, z_up, alpha_gate, alpha_up, BARE, False, eps, eps)
    return h, q


def expert_swiglu(z_gate, z_up, alpha_gate, alpha_up, order, *, joint, eps, up_eps) -> Tensor:
    """`sdd_swiglu` of rows sorted by expert, with the alphas of their experts."""
    check_expert_swiglu(z_gate, z_up, alpha_gate, alpha_up, order, joint, eps, up_eps)
    if alpha_gate is None and alpha_up is None:
        return swiglu(z_gate, z_up)
    kind, up_eps = PLAIN if alpha_up is None else NORMED, eps if up_eps is None else up_eps
    return swiglu_op(z_gate, z_up, alpha_gate, alpha_up, kind, joint, eps, up_eps, order.experts_M, order.ends_E)[0]


def expert_swiglu_bare_up(z_gate, z_up, alpha_gate, alpha_up, order, *, eps) -> tuple[Tensor, Tensor]:
    """`sdd_swiglu_bare_up` of rows sorted by expert, with the alphas of their experts."""
    check_expert_swiglu(z_gate, z_up, alpha_gate, alpha_up, order)
    h, _, q = swiglu_op(z_gate, z_up, alpha_gate, alpha_up, BARE, False, eps, eps, order.experts_M, order.ends_E)
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
    """Write r and q of rows that take several blocks."""
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
    r[:, 0].add_(eps)  # as numbers: a tensor of them would be a copy that waits for the device
    r[:, 1].add_(up_eps)
    r.rsqrt_()
