"""An output projection added to the residual stream: references `sdd.functional.residual_norm` and `residual_prenorm`.

    s = c*residual + alpha*n          n = r*z, or z itself without alpha          y = post_alpha * n2,   n2 = r2*s

    ds += r2 * (post_alpha*dy - n2*m2)                 m2 = mean(post_alpha*dy*n2)          dpost_alpha = sum of dy*n2
    dz  = r * (alpha*ds - n*m)                         m = mean(alpha*ds*n)                 dalpha = sum of ds*n
    dresidual = c*ds

Saved for backward: z and r; with a post-norm r2 and the residual, which is its producer's output and kept by whoever
else reads it, from which s is recomputed. Without alpha, s and r2 alone.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sdd import functional as sdd_F
from sdd.functional import Eps
from sdd.kernels.fused.common import (
    MAX_BLOCK,
    WIDE_BLOCK,
    dense,
    forbid_double_backward,
    jit,
    load_row,
    mean_square_kernel,
    n_programs,
    next_power_of_2,
    on_device,
    row_blocks,
    row_eps_of,
    rows,
    warps,
)
from sdd.kernels.fused.scaled_norm import scaled_norm, scaled_norm_backward_op

#: The widest row with both norms in one kernel; a wider one takes two.
MAX_FUSED = 8192


@jit
def forward_kernel(
    z_ptr,
    residual_ptr,
    alpha_ptr,
    eps_ptr,
    post_alpha_ptr,
    stream_ptr,
    y_ptr,
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
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, or (without post-norm) a block of columns of a row whose r is there already."""
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
        y = load_row(post_alpha_ptr, column, there) * (s * post_r)
        tl.store(y_ptr + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=there)


@jit
def backward_kernel(
    dy_ptr,
    ds_ptr,
    z_ptr,
    residual_ptr,
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
    ds_stride,
    z_stride,
    residual_stride,
    scale,
    HAS_DS: tl.constexpr,
    STORE_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every N_PROGRAMS-th row with both norms, so that each dalpha needs one partial sum a program."""
    program, N_PROGRAMS = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    alpha = load_row(alpha_ptr, column, there)
    post_alpha = load_row(post_alpha_ptr, column, there)
    dalpha = tl.full((BLOCK,), 0, tl.float32)
    dpost_alpha = tl.full((BLOCK,), 0, tl.float32)
    for i in range(tl.cdiv(N_ROWS - program, N_PROGRAMS)):
        row = program.to(tl.int64) + i * N_PROGRAMS
        r, post_r = tl.load(r_ptr + row), tl.load(post_r_ptr + row)
        n = load_row(z_ptr + row * z_stride, column, there) * r
        s = alpha * n + scale * load_row(residual_ptr + row * residual_stride, column, there)
        post_n = s * post_r
        dy = load_row(dy_ptr + row * dy_stride, column, there)
        dpost_alpha += dy * post_n
        dy *= post_alpha
        ds = post_r * (dy - post_n * (tl.sum(dy * post_n) / WIDTH))
        if HAS_DS:
            ds += load_row(ds_ptr + row * ds_stride, column, there)
        tl.store(dresidual_ptr + row * WIDTH + column, (scale * ds).to(dresidual_ptr.dtype.element_ty), mask=there)
        dalpha += ds * n
        ds *= alpha
        mean = tl.sum(ds * n) / WIDTH
        if STORE_MEAN:
            tl.store(mean_ptr + row, mean)
        dz = r * (ds - n * mean)
        tl.store(dz_ptr + row * WIDTH + column, dz.to(dz_ptr.dtype.element_ty), mask=there)
    tl.store(dalpha_ptr + program * WIDTH + column, dalpha, mask=there)
    tl.store(dpost_alpha_ptr + program * WIDTH + column, dpost_alpha, mask=there)


@torch.library.custom_op("sdd::residual_norm", mutates_args=())
def residual_norm_op(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    row_eps: Tensor | None,
    post_alpha: Tensor | None,
    scale: float,
    eps: float,
    post_eps: float,
    stream: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`s` (if `stream`) in the dtype of the residual, y in `dtype`, r and r2 `[...]`; empty where there is none."""
    s, y, r, post_r = _empty(z, residual, alpha, row_eps, post_alpha, scale, eps, post_eps, stream, dtype)
    z_rows, residual_rows = rows(z), rows(residual)
    n_rows, width = z_rows.shape
    if not n_rows:
        return s, y, r, post_r
    row_eps = None if row_eps is None else row_eps.reshape(-1).contiguous()
    with on_device(z):
        block, n_blocks = row_blocks(width, alpha is not None or post_alpha is not None, MAX_BLOCK)
        if n_blocks > 1 and alpha is not None:
            mean_square_kernel[(n_rows, 1)](z_rows, r, width, z_rows.stride(0), 1, BLOCK=WIDE_BLOCK, num_warps=8)
            r.view(-1).add_(eps if row_eps is None else row_eps).rsqrt_()
        forward_kernel[(n_rows, n_blocks)](
            z_rows, residual_rows, dense(alpha), row_eps, dense(post_alpha), s, y, r, post_r, width,
            z_rows.stride(0), residual_rows.stride(0), scale, eps, post_eps,
            ALPHA=alpha is not None, ROW_EPS=row_eps is not None, POST=post_alpha is not None, STREAM=stream,
            BY_COLUMN=n_blocks > 1, BLOCK=block, num_warps=warps(block, 16),
        )  # fmt: skip
    return s, y, r, post_r


@residual_norm_op.register_fake
def _empty(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    row_eps: Tensor | None,
    post_alpha: Tensor | None,
    scale: float,
    eps: float,
    post_eps: float,
    stream: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, none = z.shape[:-1], (0,)
    return (
        residual.new_empty(z.shape if stream else none),
        z.new_empty(none if post_alpha is None else z.shape, dtype=dtype),
        z.new_empty(none if alpha is None else shape, dtype=torch.float32),
        z.new_empty(none if post_alpha is None else shape, dtype=torch.float32),
    )


@torch.library.custom_op("sdd::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    dy: Tensor,
    ds: Tensor | None,
    z: Tensor,
    residual: Tensor,
    alpha: Tensor,
    post_alpha: Tensor,
    r: Tensor,
    post_r: Tensor,
    scale: float,
    row_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`dz`, `dresidual` in the dtypes of z and residual; dalpha, dpost_alpha and deps (or empty) in float32."""
    outputs = _empty_backward(dy, ds, z, residual, alpha, post_alpha, r, post_r, scale, row_eps)
    dz, dresidual, dalpha, dpost_alpha, deps = outputs
    dy_rows, z_rows, residual_rows = rows(dy), rows(z), rows(residual)
    ds_rows = None if ds is None else rows(ds)
    n_rows, width = z_rows.shape
    if not n_rows:
        return dz, dresidual, dalpha.zero_(), dpost_alpha.zero_(), deps
    with on_device(z):
        block = next_power_of_2(width)
        programs = n_programs(z, n_rows, block)
        partial = z.new_empty(2, programs, width, dtype=torch.float32)
        backward_kernel[(programs,)](
            dy_rows, ds_rows, z_rows, residual_rows, dense(alpha), dense(post_alpha), r, post_r, dz, dresidual,
            partial[0], partial[1], deps, n_rows, width, dy_rows.stride(0), 0 if ds_rows is None else ds_rows.stride(0),
            z_rows.stride(0), residual_rows.stride(0), scale,
            HAS_DS=ds is not None, STORE_MEAN=row_eps, BLOCK=block, num_warps=warps(block, 8),
        )  # fmt: skip
    dalpha, dpost_alpha = partial.sum(1).unbind()
    if row_eps:
        deps.mul_(r.square()).mul_(-width / 2)
    return dz, dresidual, dalpha.clone(), dpost_alpha.clone(), deps


@residual_norm_backward_op.register_fake
def _empty_backward(
    dy: Tensor,
    ds: Tensor | None,
    z: Tensor,
    residual: Tensor,
    alpha: Tensor,
    post_alpha: Tensor,
    r: Tensor,
    post_r: Tensor,
    scale: float,
    row_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz, dresidual = z.new_empty(z.shape), residual.new_empty(z.shape)
    dalpha, dpost_alpha = r.new_empty(z.shape[-1]), r.new_empty(z.shape[-1])
    return dz, dresidual, dalpha, dpost_alpha, r.new_empty(r.shape if row_eps else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, residual, alpha, _, post_alpha, ctx.scale, _, _, stream, _ = inputs
    s, y, r, post_r = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(r, post_r, *([y] if post_alpha is None else []), *([] if stream else [s]))
    ctx.dtype = z.dtype
    both = alpha is not None and post_alpha is not None
    kept = (None if alpha is None else z, residual if both else None, s if alpha is None else None)
    ctx.save_for_backward(*kept, alpha, post_alpha, r, post_r)


def _backward(ctx: Any, ds: Tensor | None, dy: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
    forbid_double_backward("residual_norm")
    z, residual, s, alpha, post_alpha, r, post_r = ctx.saved_tensors
    row_eps = ctx.needs_input_grad[3]
    dalpha: Tensor | None = None
    dpost_alpha: Tensor | None = None
    deps: Tensor | None = None
    if alpha is not None and post_alpha is not None:
        dy = z.new_zeros(z.shape) if dy is None else dy
        dz, dresidual, dalpha, dpost_alpha, deps = residual_norm_backward_op(
            dy, ds, z, residual, alpha, post_alpha, r, post_r, ctx.scale, row_eps
        )
    else:
        if post_alpha is not None and dy is not None:
            ds, dpost_alpha, _, _ = _norm_backward(dy, s, post_alpha, post_r, ds)
        assert ds is not None
        dz, dresidual = ds.to(ctx.dtype), ds if ctx.scale == 1 else ctx.scale * ds
        if alpha is not None:
            dz, dalpha, _, deps = _norm_backward(ds, z, alpha, r, None, row_eps)
    return (
        dz,
        dresidual,
        None if dalpha is None or alpha is None else dalpha.to(alpha.dtype),
        deps if row_eps else None,
        None if dpost_alpha is None or post_alpha is None else dpost_alpha.to(post_alpha.dtype),
        *[None] * 5,
    )


residual_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _norm_backward(
    dy: Tensor, z: Tensor, alpha: Tensor, r: Tensor, add: Tensor | None, row_eps: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of one norm of full width."""
    width = z.shape[-1]
    return scaled_norm_backward_op(dy, z, alpha, r.unsqueeze(-1), add, [width, width], False, row_eps)


def residual_norm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    post_alpha: Tensor | None = None,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    post_eps: float = 1e-6,
) -> Tensor:
    """`sdd.functional.residual_norm` by the kernels."""
    if post_alpha is None and alpha is None:
        return sdd_F.residual_norm(z, residual, None, residual_scale=residual_scale)
    scale, inner, dtype = float(residual_scale), row_eps_of(eps, z), residual.dtype
    sdd_F.check_shapes(z, residual, alpha, post_alpha)
    if post_alpha is not None and z.shape[-1] <= MAX_FUSED:
        stream = alpha is None  # then it is what the backward pass needs
        return residual_norm_op(z, residual, alpha, inner[0], post_alpha, scale, inner[1], post_eps, stream, dtype)[1]
    if alpha is None:
        stream = sdd_F.residual_norm(z, residual, None, residual_scale=residual_scale)
    else:
        stream = residual_norm_op(z, residual, alpha, inner[0], None, scale, inner[1], 0.0, True, dtype)[0]
    return stream if post_alpha is None else scaled_norm(stream, post_alpha, eps=post_eps)


def residual_prenorm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    norm_alpha: Tensor,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`sdd.functional.residual_prenorm` by the kernels."""
    sdd_F.check_shapes(z, residual, alpha, norm_alpha)
    if z.shape[-1] > MAX_FUSED:
        stream = residual_norm(z, residual, alpha, residual_scale=residual_scale, eps=eps)
        return stream, scaled_norm(stream, norm_alpha, eps=norm_eps, dtype=dtype)
    (row_eps, number), dtype = row_eps_of(eps, z), dtype or residual.dtype
    return residual_norm_op(
        z, residual, alpha, row_eps, norm_alpha, float(residual_scale), number, norm_eps, True, dtype
    )[:2]
