"""Plain PyTorch operations whose backward passes are written out, for any device and dtype: the path of a CPU.

Where autograd saves every intermediate, the norm saves z and r = 1/sqrt(mean(z^2) + eps) and reads memory less often:
on a CPU, forward and backward together are two to three times faster (benchmarks/results/kernels_cpu.json). The
equations are those of the kernels. An operation that was measured to be no faster than the composed one (SwiGLU,
additions) is composed.

Signatures stand at the references in `sdd.functional`; `sdd.kernels.dispatch` fills in their defaults.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdd import functional as sdd_F
from sdd.functional import Eps, statistics_dtype
from sdd.norm_groups import resolve_group, split_alpha


def scaled_norm(z, alpha, bias=None, *, eps, group=None, dtype=None) -> Tensor:
    """`alpha * norm(z) + b`."""
    parts, dtype = resolve_group(group, z.shape[-1]), dtype or z.dtype
    alphas = split_alpha(alpha, parts)
    if len(parts) == 1 and parts[0][1]:
        return _norm(z, alpha, bias, eps, parts[0][1], dtype)
    widths = [width for width, _ in parts]
    biases = [None] * len(parts) if bias is None else bias.split(widths)
    pieces = zip(z.split(widths, -1), alphas, biases, parts, strict=True)
    return torch.cat(
        [
            _norm(part, alpha, bias, eps, group, dtype) if group else (part if bias is None else part + bias).to(dtype)
            for part, alpha, bias, (_, group) in pieces
        ],
        -1,
    )


def sdd_swiglu(z_gate, z_up, alpha_gate, alpha_up, *, joint, eps, up_eps) -> Tensor:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * norm(z_u))`."""
    sdd_F.check_swiglu(z_gate, z_up, alpha_gate, alpha_up, joint, eps, up_eps)
    return sdd_F.swiglu(*gate_and_up(scaled_norm, z_gate, z_up, alpha_gate, alpha_up, joint, eps, up_eps))


def sdd_swiglu_bare_up(z_gate, z_up, alpha_gate, alpha_up, *, eps) -> tuple[Tensor, Tensor]:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * z_u)`, and `mean(z_u^2)`."""
    gate = z_gate if alpha_gate is None else scaled_norm(z_gate, alpha_gate, eps=eps)
    return sdd_F.sdd_swiglu_bare_up(gate, z_up, None, alpha_up)


def residual_norm(z, residual, alpha, post_alpha=None, *, residual_scale, eps, post_eps, kept) -> Tensor:
    """`s = c * residual + alpha * norm(z)`, or `post_alpha * norm(s)`."""
    if kept is not None:
        sdd_F.check_shapes(residual, kept)
    stream = _stream(z, residual, alpha, residual_scale, eps)
    if post_alpha is None:
        return stream.to(residual.dtype)
    return scaled_norm(stream, post_alpha, eps=post_eps, dtype=residual.dtype)


def residual_postnorm(z, residual, alpha, post_alpha, *, dtype, **options) -> tuple[Tensor, Tensor]:
    """`post_alpha * norm(s)`, and its copy in `dtype`."""
    y = residual_norm(z, residual, alpha, post_alpha, **options)
    return y, y.to(dtype or y.dtype)


def residual_prenorm(z, residual, alpha, norm_alpha, *, residual_scale, eps, norm_eps, dtype) -> tuple[Tensor, Tensor]:
    """Return s and `norm_alpha * norm(s)`."""
    stream = _stream(z, residual, alpha, residual_scale, eps)
    return stream.to(residual.dtype), scaled_norm(stream, norm_alpha, eps=norm_eps, dtype=dtype or residual.dtype)


def qk_norm_rope(z, alpha, cos, sin, *, n_heads, group, eps) -> Tensor:
    """`rope(alpha * norm(z))`."""
    y = z.to(statistics_dtype(z.dtype))
    if alpha is not None:
        y = scaled_norm(y, alpha, group=group, eps=eps)
    return _Rope.apply(y.unflatten(-1, (n_heads, -1)).transpose(-3, -2), cos, sin).to(z.dtype)


def gate_and_up(scaled_norm, z_gate, z_up, alpha_gate, alpha_up, joint, eps, up_eps) -> tuple[Tensor, Tensor]:
    """`alpha_g * norm(z_g)` and `alpha_u * norm(z_u)` by a given `scaled_norm`, for a SwiGLU without norms."""
    if joint:
        z, alpha = torch.cat([z_gate, z_up], -1), torch.cat([alpha_gate, alpha_up])
        gate, up = scaled_norm(z, alpha, eps=eps).chunk(2, -1)
        return gate, up
    gate = z_gate if alpha_gate is None else scaled_norm(z_gate, alpha_gate, eps=eps)
    return gate, z_up if alpha_up is None else scaled_norm(z_up, alpha_up, eps=eps if up_eps is None else up_eps)


def differentiate_again(
    composed: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[object], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of `composed(*inputs)`, which can be differentiated again: for create_graph=True.

    Returns:
        One for each input; None for an input that is not a tensor or needs no gradient.
    """
    with torch.enable_grad():
        outputs = composed(*inputs)
    pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, gradients, strict=True)
    wanted = [(output, gradient) for output, gradient in pairs if gradient is not None]
    needed = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in wanted],
        needed,
        [gradient for _, gradient in wanted],
        create_graph=True,
        allow_unused=True,
    )
    by_input = {id(x): gradient for x, gradient in zip(needed, found, strict=True)}
    return [by_input.get(id(x)) for x in inputs]


def _stream(z: Tensor, residual: Tensor, alpha: Tensor | None, c: float, eps: Eps) -> Tensor:
    """`c * residual + alpha * norm(z)` in at least float32."""
    sdd_F.check_shapes(z, residual, alpha)
    wide = statistics_dtype(z.dtype)
    branch = z.to(wide) if alpha is None else scaled_norm(z, alpha, eps=eps, dtype=wide)
    return torch.add(branch, residual, alpha=c)  # `c * residual + branch` in one pass over memory


class _Rope(torch.autograd.Function):
    """`x * cos + rotate_half(x) * sin` and its transpose, in four passes instead of seven."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = x * cos
        (x1, x2), (y1, y2), (sin1, sin2) = (a.chunk(2, -1) for a in (x, y, sin))
        y1.addcmul_(x2, sin1, value=-1)
        y2.addcmul_(x1, sin2)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        cos, sin = ctx.saved_tensors
        dx = dy * cos
        (dx1, dx2), (dy1, dy2), (sin1, sin2) = (a.chunk(2, -1) for a in (dx, dy, sin))
        dx1.addcmul_(dy2, sin2)
        dx2.addcmul_(dy1, sin1, value=-1)
        return dx, None, None


def _norm(z: Tensor, alpha: Tensor, bias: Tensor | None, eps: Eps, group: int, dtype: torch.dtype) -> Tensor:
    row_eps, number = (eps.expand(z.shape[:-1]), 0.0) if isinstance(eps, Tensor) else (None, eps)
    return _ScaledNorm.apply(z, alpha, bias, row_eps, number, group, dtype)


class _ScaledNorm(torch.autograd.Function):
    """`alpha * norm(z) + b` with groups of one width."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        row_eps: Tensor | None,
        eps: float,
        group: int,
        dtype: torch.dtype,
    ) -> Tensor:
        z_tiles = _tiles(z, group)
        r = torch.linalg.vector_norm(z_tiles, dim=-1).square_().div_(group)
        r.add_(eps if row_eps is None else row_eps.reshape(-1, 1)).rsqrt_()
        ctx.save_for_backward(z, alpha, bias, row_eps, r)
        ctx.eps, ctx.group, ctx.dtype = eps, group, dtype
        # Allocated in its own shape: autograd forbids changing a view in place, as nn.ReLU(inplace=True) does.
        y = torch.empty(z.shape, dtype=r.dtype, device=z.device)
        torch.mul(z_tiles, r.unsqueeze(-1), out=_tiles(y, group)).mul_(alpha.reshape(-1, group))
        if bias is not None:
            y.add_(bias)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        z, alpha, bias, row_eps, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*differentiate_again(_composed(ctx), (z, alpha, bias, row_eps), [dy]), None, None, None)
        dz, dalpha, mean = _differentiate(dy, z, alpha, r, ctx.group)
        dbias = None if bias is None else dy.reshape(-1, dy.shape[-1]).sum(0, dtype=r.dtype).to(bias.dtype)
        deps = None
        if row_eps is not None:
            deps = (mean * r.square()).sum(-1).mul_(-ctx.group / 2).view(row_eps.shape).to(row_eps.dtype)
        return dz, dalpha, dbias, deps, None, None, None


def _differentiate(dy: Tensor, z: Tensor, alpha: Tensor, r: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dalpha and mean(alpha*dy*n) `[rows, heads]`; sums over features or rows are matrix-vector products."""
    dy_tiles, z_tiles = _tiles(dy, group), _tiles(z, group)
    n_rows, heads = r.shape
    wide = alpha.to(r.dtype)
    product = dy_tiles * z_tiles
    if alpha.shape[0] == group:  # one group, or one alpha for all
        product = product.reshape(-1, group)
        mean = torch.mv(product, wide).view(n_rows, heads)
        dalpha = torch.mv(product.t(), r.view(-1))
    else:
        mean = (product * wide.view(heads, group)).sum(-1)
        dalpha = torch.mv(product.mul_(r.unsqueeze(-1)).reshape(n_rows, heads * group).t(), r.new_ones(n_rows))
    mean.mul_(r).div_(group)
    dz = (dy_tiles * r.unsqueeze(-1)).mul_(wide.view(-1, group))
    dz.addcmul_(z_tiles, (mean * r.square()).unsqueeze(-1), value=-1)
    return dz.reshape(z.shape).to(z.dtype), dalpha.to(alpha.dtype), mean


def _tiles(x: Tensor, group: int) -> Tensor:
    """`[..., N]` as `[rows, N/group, group]` in at least float32."""
    x = x.to(statistics_dtype(x.dtype))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] // group, group)


def _composed(ctx: Any) -> Callable[..., Tensor]:
    def composed(z: Tensor, alpha: Tensor, bias: Tensor | None, row_eps: Tensor | None) -> Tensor:
        eps = ctx.eps if row_eps is None else row_eps
        return sdd_F.scaled_norm(z, alpha, bias, group=ctx.group, eps=eps, dtype=ctx.dtype)

    return composed
