"""An output projection added to the residual stream, and the norm after it.

References: `sdd.functional.residual_norm`, `residual_postnorm` and `residual_prenorm`.

    s = c*residual + alpha*n          n = r*z, or z itself without alpha          y = post_alpha * n2,   n2 = r2*s

    ds += r2 * (post_alpha*dy - n2*m2)                 m2 = mean(post_alpha*dy*n2)          dpost_alpha = sum of dy*n2
    dz  = r * (alpha*ds - n*m)                         m = mean(alpha*ds*n)                 dalpha = sum of ds*n
    dresidual = c*ds

Saved for backward: z and r for n, and r2 and one tensor for n2:

    post-norm   the residual, from which s is summed again. It is its producer's output, which its other readers keep
                too. Under autocast they keep a copy in bfloat16 (`kept`), and no other copy is needed
    pre-norm    s, which is an output; or n2 in the dtype of y, if that is narrower than the stream

n2 enters the gradients only where their radial part is taken out and where they are summed over rows: the error from
its rounding is below that from the rounding of dy.
"""

from typing import Any

import torch
from torch import Tensor

from sdd import functional as sdd_F
from sdd.functional import Eps
from sdd.kernels import recompute
from sdd.kernels.fused.common import (
    MAX_BLOCK,
    WIDE_BLOCK,
    cast,
    dense,
    forbid_double_backward,
    launched_as,
    mean_square_kernel,
    n_programs,
    row_blocks,
    row_eps_of,
    row_shape,
    rows,
    warps,
)
from sdd.kernels.fused.residual_norm_kernels import backward_kernel, forward_kernel
from sdd.kernels.fused.scaled_norm import narrower, scaled_norm, scaled_norm_backward_op

#: The widest row with both norms in one kernel; a wider one takes two.
MAX_FUSED = 8192


def _empty(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    row_eps: Tensor | None,
    post_alpha: Tensor | None,
    kept: Tensor | None,
    scale: float,
    eps: float,
    post_eps: float,
    stream: bool,
    dtype: torch.dtype,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, none = z.shape[:-1], (0,)
    return (
        residual.new_empty(z.shape if stream else none),
        z.new_empty(none if post_alpha is None else z.shape, dtype=dtype),
        z.new_empty(none if narrow is None else z.shape, dtype=narrow),
        z.new_empty(none if alpha is None else shape, dtype=torch.float32),
        z.new_empty(none if post_alpha is None else shape, dtype=torch.float32),
    )


@launched_as("residual_norm", _empty)
def residual_norm_op(
    outputs, z, residual, alpha, row_eps, post_alpha, kept, scale, eps, post_eps, stream, dtype, narrow
) -> None:
    """`s` (if `stream`) in the dtype of the residual, y in `dtype`, a second one in `narrow`, r and r2 `[...]`.

    Outputs that are not wanted are empty. The second one is of y, or with `stream` of n2. `kept` is saved in place of
    the residual.
    """
    r = outputs[3]
    z, residual, row_eps = rows(z), rows(residual), dense(row_eps)
    n_rows, width = z.shape
    block, n_blocks = row_blocks(width, alpha is not None or post_alpha is not None, MAX_BLOCK)
    if n_blocks > 1 and alpha is not None:
        mean_square_kernel[(n_rows, 1)](z, r, width, z.stride(0), 1, BLOCK=WIDE_BLOCK, num_warps=8)
        r.view(-1).add_(eps if row_eps is None else row_eps).rsqrt_()
    forward_kernel[(n_rows, n_blocks)](
        z, residual, dense(alpha), row_eps, dense(post_alpha), *outputs, width,
        z.stride(0), residual.stride(0), scale, eps, post_eps,
        ALPHA=alpha is not None, ROW_EPS=row_eps is not None, POST=post_alpha is not None, STREAM=stream,
        NARROW=narrow is not None, BY_COLUMN=n_blocks > 1, BLOCK=block, num_warps=warps(block, 16),
    )  # fmt: skip


def _empty_backward(
    dy: Tensor,
    dcopy: Tensor | None,
    ds: Tensor | None,
    z: Tensor | None,
    saved: Tensor,
    alpha: Tensor | None,
    post_alpha: Tensor,
    r: Tensor,
    post_r: Tensor,
    scale: float,
    row_eps: bool,
    saved_as: str,
    z_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width = dy.shape[-1]
    dz, dresidual = dy.new_empty(dy.shape, dtype=z_dtype), dy.new_empty(dy.shape, dtype=dtype)
    dalpha, dpost_alpha = r.new_empty(0 if alpha is None else width), r.new_empty(width)
    return dz, dresidual, dalpha, dpost_alpha, r.new_empty(r.shape if row_eps else (0,))


@launched_as("residual_norm_backward", _empty_backward)
def residual_norm_backward_op(
    outputs, dy, dcopy, ds, z, saved, alpha, post_alpha, r, post_r, scale, row_eps, saved_as, z_dtype, dtype
) -> None:
    """`dz` in `z_dtype` and `dresidual` in `dtype`; dalpha, dpost_alpha and deps in float32, empty if not wanted.

    `saved` is the "residual", the "stream" s or the "norm" n2. `dcopy` is added to dy.
    """
    dz, dresidual, dalpha, dpost_alpha, deps = outputs
    read = [None if x is None else rows(x) for x in (dy, dcopy, ds, z, saved)]
    n_rows, width = rows(dy).shape
    shape = row_shape(width, 1 if alpha is None else 2)
    programs = n_programs(dy, n_rows, shape)
    partial = dy.new_empty(1 if alpha is None else 2, programs, width, dtype=torch.float32)
    backward_kernel[(programs,)](
        *read, dense(alpha), dense(post_alpha), r, post_r, dz, dresidual, partial[-1], partial[0], deps,
        n_rows, width, *(0 if x is None else x.stride(0) for x in read), scale,
        ALPHA=alpha is not None, SAVED=saved_as, HAS_DCOPY=dcopy is not None, HAS_DS=ds is not None,
        STORE_MEAN=row_eps, **shape.options,
    )  # fmt: skip
    torch.sum(partial[0], 0, out=dpost_alpha)
    if alpha is not None:
        torch.sum(partial[1], 0, out=dalpha)
    if row_eps:
        deps.mul_(r.square()).mul_(-width / 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, residual, alpha, _, post_alpha, kept, ctx.scale, _, _, stream, _, narrow = inputs
    s, _, second, r, post_r = output
    ctx.set_materialize_grads(False)
    used = (stream, post_alpha is not None, narrow is not None and not stream, False, False)
    ctx.mark_non_differentiable(*(x for x, is_used in zip(output, used, strict=True) if not is_used))
    ctx.dtypes = z.dtype, residual.dtype
    saved: Tensor | None = None
    if post_alpha is None:
        ctx.saved_as = ""
    elif not stream:
        ctx.saved_as, saved = "residual", residual if kept is None else kept
    elif narrow is None:
        ctx.saved_as, saved = "stream", s
    else:
        ctx.saved_as, saved = "norm", second
    reads_z = alpha is not None or ctx.saved_as == "residual"
    ctx.save_for_backward(z if reads_z else None, saved, alpha, post_alpha, r, post_r)


def _backward(
    ctx: Any, ds: Tensor | None, dy: Tensor | None, dcopy: Tensor | None, *_statistics: None
) -> tuple[Tensor | None, ...]:
    forbid_double_backward("residual_norm")
    z, saved, alpha, post_alpha, r, post_r = ctx.saved_tensors
    row_eps, (z_dtype, dtype) = ctx.needs_input_grad[3], ctx.dtypes
    dpost_alpha: Tensor | None = None
    if saved is None:
        assert ds is not None
        width = z.shape[-1]
        dresidual = ds if ctx.scale == 1 else ctx.scale * ds
        dz, dalpha, _, deps = scaled_norm_backward_op(
            ds, z, alpha, r.unsqueeze(-1), [width, width], False, row_eps, False, z_dtype
        )
    else:
        if dy is None:  # only the other output was used
            dy, dcopy = dcopy if ds is None else torch.zeros_like(ds), None
        dz, dresidual, dalpha, dpost_alpha, deps = residual_norm_backward_op(
            dy, dcopy, ds, z, saved, alpha, post_alpha, r, post_r, ctx.scale, row_eps, ctx.saved_as, z_dtype, dtype
        )
    gradients = cast(dalpha, alpha), deps if row_eps else None, cast(dpost_alpha, post_alpha)
    return dz, dresidual, *gradients, *[None] * 7


residual_norm_op.register_autograd(_backward, setup_context=_setup_context)


def residual_norm(z, residual, alpha, post_alpha=None, *, residual_scale, eps, post_eps=0.0, kept=None) -> Tensor:
    """`s = c * residual + alpha * norm(z)`, or `post_alpha * norm(s)`; an addition alone is composed."""
    options = {"residual_scale": residual_scale, "eps": eps, "post_eps": post_eps, "kept": kept}
    if post_alpha is not None:
        return residual_postnorm(z, residual, alpha, post_alpha, dtype=None, **options)[0]
    if alpha is None:
        return recompute.residual_norm(z, residual, None, **options)
    sdd_F.check_shapes(z, residual, alpha)
    row_eps, eps = row_eps_of(eps, z)
    scale, dtype = float(residual_scale), residual.dtype
    return residual_norm_op(z, residual, alpha, row_eps, None, None, scale, eps, 0.0, True, dtype, None)[0]


def residual_postnorm(
    z, residual, alpha, post_alpha, *, residual_scale, eps, post_eps, kept, dtype
) -> tuple[Tensor, Tensor]:
    """`post_alpha * norm(s)`, and its copy in `dtype`."""
    sdd_F.check_shapes(z, residual, alpha, post_alpha)
    sdd_F.check_shapes(residual, residual if kept is None else kept)
    dtype = dtype or residual.dtype
    if z.shape[-1] > MAX_FUSED:
        stream = residual_norm(z, residual, alpha, residual_scale=residual_scale, eps=eps)
        y = scaled_norm(stream, post_alpha, eps=post_eps)
        return y, y.to(dtype)
    (row_eps, eps), narrow = _row_eps(eps, alpha, z), None if dtype == residual.dtype else dtype
    _, y, copy, *_ = residual_norm_op(
        z, residual, alpha, row_eps, post_alpha, kept, float(residual_scale), eps, post_eps, False,
        residual.dtype, narrow,
    )  # fmt: skip
    return y, y if narrow is None else copy


def residual_prenorm(z, residual, alpha, norm_alpha, *, residual_scale, eps, norm_eps, dtype) -> tuple[Tensor, Tensor]:
    """Return s and `norm_alpha * norm(s)`."""
    sdd_F.check_shapes(z, residual, alpha, norm_alpha)
    dtype = dtype or residual.dtype
    if z.shape[-1] > MAX_FUSED:
        stream = residual_norm(z, residual, alpha, residual_scale=residual_scale, eps=eps)
        return stream, scaled_norm(stream, norm_alpha, eps=norm_eps, dtype=dtype)
    (row_eps, eps), narrow = _row_eps(eps, alpha, z), dtype if narrower(dtype, residual.dtype) else None
    s, y, *_ = residual_norm_op(
        z, residual, alpha, row_eps, norm_alpha, None, float(residual_scale), eps, norm_eps, True, dtype, narrow
    )
    return s, y


def _row_eps(eps: Eps, alpha: Tensor | None, z: Tensor) -> tuple[Tensor | None, float]:
    return (None, 0.0) if alpha is None else row_eps_of(eps, z)  # no norm of z: its eps gets no gradient
