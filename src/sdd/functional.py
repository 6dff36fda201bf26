"""The mathematics in plain PyTorch, each function beside its equation.

This file is the reference: every fused kernel is tested for equality with it.

Notation (arXiv 2502.15499, section 3): `z = V x`, `norm(z) = z / sqrt(mean(z^2) + eps)`, `y = alpha * norm(z) + b`.
Statistics, alpha and bias are applied in at least float32 whatever the dtype of the activations; float64 stays float64.
Every statistic is taken along the last dimension, so tokens never mix.

Shape suffixes: N features, G width of a norm group, T tokens, H heads, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# re-exported: these belong to the arguments of the functions below
from sdd.norm_groups import Group as Group
from sdd.norm_groups import Parts as Parts
from sdd.norm_groups import alpha_size as alpha_size
from sdd.norm_groups import resolve_group as resolve_group
from sdd.norm_groups import split_alpha as split_alpha
from sdd.norm_precision import statistics_dtype as statistics_dtype

#: Added to the mean square inside the root: a number, or a tensor `[...]` with one value for each row of z `[..., N]`.
Eps = float | Tensor


def norm(z: Tensor, eps: Eps = 1e-6, group: int | None = None) -> Tensor:
    r"""Root-mean-square normalisation, `norm(z) = z / sqrt(mean(z^2) + eps)`.

    Args:
        z: `[..., N]`, any floating dtype.
        eps: added to the mean square, inside the root; a number, or `[...]` with one value for each row.
        group: width G of the groups along the last dimension over which the mean is taken; None for one group.

    Returns:
        `[..., N]` in at least float32 (float64 stays float64).
    """
    z = z.to(statistics_dtype(z.dtype))
    if isinstance(eps, Tensor):
        eps = eps.unsqueeze(-1)
    if group is not None and group != z.shape[-1]:
        return norm(z.unflatten(-1, (-1, group)), eps).flatten(-2)
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)


def scaled_norm(
    z: Tensor,
    alpha: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    eps: Eps = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The part of SDD after the matrix product, `y = alpha * norm(z) + b`; with one group, also RMSNorm.

    Args:
        z: `[..., N]`, any floating dtype.
        alpha: `[N_normed]`, one scale for each normed feature; or one group width for each normed part, shared by its
            groups.
        bias: `[N]` or None, added after the scale.
        group: see `resolve_group`.
        eps: added to the mean square, inside the root; a number, or `[...]` with one value for each row.
        dtype: dtype of the result; None for that of z.

    Returns:
        `[..., N]`; alpha and bias are applied in at least float32 before the cast.

    Raises:
        ValueError: if alpha has neither of the two sizes that the groups allow.
    """
    parts = resolve_group(group, z.shape[-1])
    if len(parts) == 1 and parts[0][1]:
        y = _scale_part(z, alpha, parts[0][1], eps)
    else:
        widths = [width for width, _ in parts]
        alphas = split_alpha(alpha, parts)
        y = torch.cat(
            [
                _scale_part(part, part_alpha, group_width, eps) if group_width else part.to(statistics_dtype(z.dtype))
                for part, part_alpha, (_, group_width) in zip(z.split(widths, -1), alphas, parts, strict=True)
            ],
            -1,
        )
    if bias is not None:
        y = y + bias
    return y.to(dtype or z.dtype)


def sdd_linear(
    x: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None = None, *, group: Group = None, eps: float = 1e-6
) -> Tensor:
    r"""A fully-connected layer with Scale-Distribution Decoupling, `y = alpha * norm(V x) + b`.

    With z = V x, n = norm(z), r = 1/sqrt(mean(z^2) + eps) and the incoming gradient dy, autograd gives

        dalpha = sum over tokens of dy * n
        dz     = r * (alpha*dy - n * mean(alpha*dy * n))
        dV     = dz^T x,   dx = dz V

    so that at eps = 0 the layer does not see the scale of V: V -> c V leaves y unchanged and divides dV by c.

    Args:
        x: `[..., in_features]` (one to any number of dimensions).
        weight: V, `[out_features, in_features]`.
        alpha: one scale for each normed output feature; or one group width for each normed part, shared by its groups.
        bias: `[out_features]` or None, added after the scale: `alpha * norm(V x) + b`, not `alpha * norm(V x + b)`.
        group: norm groups along the output features: None one group; int groups of that width (heads); a list of
            `(width, group_width)` consecutive parts, e.g. fused q|k|v `[(2048, 64), (512, 64), (512, 0)]`, where
            group_width 0 is a plain part with neither norm nor alpha.
        eps: added to the mean square, inside the root.

    Returns:
        `[..., out_features]` in the dtype of `V x`; statistics, alpha and bias in at least float32 before that cast.

    Raises:
        ValueError: if group does not fit out_features or alpha does not fit group.

    Source: arXiv 2502.15499, equations 3 and 4.
    """
    return scaled_norm(F.linear(x, weight), alpha, bias, group=group, eps=eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated linear unit with SiLU, `silu(gate) * up` (arXiv 2002.05202); all `[..., d_ff]`."""
    return F.silu(gate) * up


def sdd_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    *,
    joint: bool = False,
    eps: Eps = 1e-6,
    up_eps: Eps | None = None,
) -> Tensor:
    """SwiGLU of two SDD projections, `silu(alpha_g * norm(z_g)) * (alpha_u * norm(z_u))`.

    Args:
        z_gate: `V_gate x`, `[..., d_ff]`.
        z_up: `V_up x`, `[..., d_ff]`.
        alpha_gate: `[d_ff]`, or None if the gate projection has no norm.
        alpha_up: `[d_ff]`, or None if the up projection has no norm.
        joint: one norm group over the concatenated `z_gate | z_up` (the released dense code) instead of one each.
        eps: added to the mean square, inside the root; a number, or `[...]` with one value for each row.
        up_eps: the same for the norm of the up projection; None for eps.

    Returns:
        `[..., d_ff]` in the dtype of z_gate.

    Raises:
        ValueError: if shapes do not fit, or a joint group lacks an alpha or has two eps.
    """
    check_swiglu(z_gate, z_up, alpha_gate, alpha_up, joint, eps, up_eps)
    if alpha_gate is not None and alpha_up is not None and joint:
        return swiglu(*joint_scaled_norm(z_gate, z_up, alpha_gate, alpha_up, eps=eps))
    gate = z_gate if alpha_gate is None else scaled_norm(z_gate, alpha_gate, eps=eps)
    up = z_up if alpha_up is None else scaled_norm(z_up, alpha_up, eps=eps if up_eps is None else up_eps)
    return swiglu(gate, up)


def joint_scaled_norm(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor, alpha_up: Tensor, *, eps: Eps = 1e-6
) -> tuple[Tensor, Tensor]:
    """Two SDD projections with one norm, `alpha_g * n_g, alpha_u * n_u` with `n_g | n_u = norm(z_g | z_u)`.

    Shapes as in `sdd_swiglu`; each output in the dtype of its z.
    """
    gate, up = norm(torch.cat([z_gate, z_up], -1), eps).chunk(2, -1)
    return (alpha_gate * gate).to(z_gate.dtype), (alpha_up * up).to(z_up.dtype)


def sdd_swiglu_bare_up(
    z_gate: Tensor, z_up: Tensor, alpha_gate: Tensor | None, alpha_up: Tensor, *, eps: Eps = 1e-6
) -> tuple[Tensor, Tensor]:
    """SwiGLU whose up norm is left out, `h = silu(alpha_g * norm(z_g)) * (alpha_u * z_u)`.

    An SDD layer that reads h gives the same without it: with q = mean(z_u^2), `sdd_linear(h, V)` with eps' equals
    `sdd_linear(h / sqrt(q + eps), V)` with eps exactly if `eps' = eps * (q + eps)`, since norm(V (c h)) = norm(V h)
    but for eps.

    Args:
        z_gate: `V_gate x`, `[..., d_ff]`.
        z_up: `V_up x`, `[..., d_ff]`.
        alpha_gate: `[d_ff]`, or None if the gate projection has no norm.
        alpha_up: `[d_ff]`.
        eps: of the gate's norm; a number, or `[...]` with one value for each row.

    Returns:
        h `[..., d_ff]` in the dtype of z_gate, and q `[...]` in at least float32.
    """
    check_shapes(z_gate, z_up, alpha_gate, alpha_up)
    gate = z_gate if alpha_gate is None else scaled_norm(z_gate, alpha_gate, eps=eps)
    wide = z_up.to(statistics_dtype(z_up.dtype))
    return swiglu(gate, (alpha_up * wide).to(z_up.dtype)), wide.square().mean(-1)


def check_swiglu(
    z_gate: Tensor,
    z_up: Tensor,
    alpha_gate: Tensor | None,
    alpha_up: Tensor | None,
    joint: bool,
    eps: Eps,
    up_eps: Eps | None,
) -> None:
    """Raise ValueError if shapes do not fit, or a joint group lacks an alpha or has two eps."""
    check_shapes(z_gate, z_up, alpha_gate, alpha_up)
    by_row = isinstance(eps, Tensor) or isinstance(up_eps, Tensor)
    two_eps = up_eps is not None and up_eps is not eps and (by_row or up_eps != eps)
    if joint and (alpha_gate is None or alpha_up is None or two_eps):
        raise ValueError("joint=True is one norm over gate and up: give alpha_gate and alpha_up, and one eps")


def check_shapes(z: Tensor, other: Tensor, *alphas: Tensor | None) -> None:
    """Raise ValueError if the two tensors differ in shape, or an alpha does not have one element per feature."""
    if z.shape != other.shape:
        raise ValueError(f"tensors of shapes {list(z.shape)} and {list(other.shape)} were given, expected one shape")
    for alpha in alphas:
        if alpha is not None and alpha.shape != z.shape[-1:]:
            raise ValueError(f"alpha has shape {list(alpha.shape)}, expected {list(z.shape[-1:])}")


def rope_tables(
    length: int, head_dim: int, theta: float = 500_000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary position embedding (arXiv 2104.09864), both `[length, head_dim]`, float32.

    Position t rotates the pair (i, i + head_dim/2) by the angle `t * theta^(-2i/head_dim)`.
    """
    # float64 keeps the angles of late positions exact to float32
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float64), frequency).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[..., T, D]` by position, `x * cos + rotate_half(x) * sin`.

    The tables are `[T, D]` as from `rope_tables`, or `[B, 1, T, D]` for an x `[B, H, T, D]` whose rows stand at
    positions of their own.
    """
    first, second = x.chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return (x * cos + rotated * sin).to(x.dtype)


def residual_norm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    post_alpha: Tensor | None = None,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    post_eps: float = 1e-6,
    kept: Tensor | None = None,
) -> Tensor:
    """An output projection added to the residual stream, with or without the post-norm.

    With c = residual_scale, `s = c * residual + alpha * norm(z)`, and `post_alpha * norm(s)` if post_alpha is given.
    Everything is in at least float32 until the one cast at the end.

    Args:
        z: `V x` of the output projection, `[..., d_model]`.
        residual: the residual stream, `[..., d_model]`.
        alpha: `[d_model]`, or None if the projection has no norm (`s = c * residual + z`).
        post_alpha: `[d_model]` or None for no post-norm.
        residual_scale: c, DeepNorm's factor on the stream; 1 elsewhere.
        eps: of the projection's norm; a number, or `[...]` with one value for each row.
        post_eps: of the post-norm.
        kept: a copy of the residual stream in lower precision that the backward pass keeps anyway, because matrix
            products read it. The kernels then keep no other copy: with a post-norm their gradients have the rounding
            of this one. Values never depend on it, nor do the gradients of this reference.

    Returns:
        `[..., d_model]` in the dtype of the residual stream.
    """
    if kept is not None:
        check_shapes(residual, kept)
    stream = _stream(z, residual, alpha, residual_scale, eps)
    return (stream if post_alpha is None else norm(stream, post_eps) * post_alpha).to(residual.dtype)


def residual_postnorm(
    z: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    post_alpha: Tensor,
    *,
    residual_scale: float = 1.0,
    eps: Eps = 1e-6,
    post_eps: float = 1e-6,
    kept: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual_norm` with a post-norm, and the copy that the next branch's matrix products read (Post-Norm).

    Args as in `residual_norm`, and `dtype`: of the copy; None for that of the residual stream.

    Returns:
        y in the dtype of the residual stream, and y in `dtype`, both `[..., d_model]`.
    """
    y = residual_norm(
        z, residual, alpha, post_alpha, residual_scale=residual_scale, eps=eps, post_eps=post_eps, kept=kept
    )
    return y, y.to(dtype or y.dtype)


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
    """An output projection added to the residual stream, and the norm that the next branch reads (Pre-Norm, Peri-LN).

    With c = residual_scale, `s = c * residual + alpha * norm(z)` and `norm_alpha * norm(s)`, of s before its cast.

    Args:
        z: `V x` of the output projection, `[..., d_model]`.
        residual: the residual stream, `[..., d_model]`.
        alpha: `[d_model]`, or None if the projection has no norm.
        norm_alpha: `[d_model]`.
        residual_scale: c, DeepNorm's factor on the stream; 1 elsewhere.
        eps: of the projection's norm; a number, or `[...]` with one value for each row.
        norm_eps: of the norm of s.
        dtype: of norm(s); None for that of the residual stream.

    Returns:
        s in the dtype of the residual stream and its scaled norm, both `[..., d_model]`.
    """
    stream = _stream(z, residual, alpha, residual_scale, eps)
    return stream.to(residual.dtype), (norm(stream, norm_eps) * norm_alpha).to(dtype or residual.dtype)


def qk_norm_rope(
    z: Tensor,
    alpha: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    group: int | None = None,
    eps: Eps = 1e-6,
) -> Tensor:
    """Normed queries or keys, rotated: `rope(alpha * norm(z))`, in at least float32 until the one cast at the end.

    Args:
        z: `V x` of the q or k projection, `[B, T, H*D]`.
        alpha: `[H*D]`, or `[D]` shared by the heads; None for no norm, `rope(z)`.
        cos: `[T, D]`, or `[B, 1, T, D]` where rows stand at positions of their own.
        sin: the same.
        n_heads: H.
        group: D for a norm per head, None for full width.
        eps: added to the mean square, inside the root; a number, or `[B, T]` with one value for each row.

    Returns:
        `[B, H, T, D]` in the dtype of z.
    """
    y = z.to(statistics_dtype(z.dtype))
    if alpha is not None:
        y = scaled_norm(y, alpha, group=group, eps=eps)
    return apply_rope(y.unflatten(-1, (n_heads, -1)).transpose(-3, -2), cos, sin).to(z.dtype)


def _stream(z: Tensor, residual: Tensor, alpha: Tensor | None, c: float, eps: Eps) -> Tensor:
    """`c * residual + alpha * norm(z)` in at least float32."""
    check_shapes(z, residual, alpha)
    branch = z.to(statistics_dtype(z.dtype))
    if alpha is not None:
        branch = scaled_norm(branch, alpha, eps=eps)
    return c * residual.to(statistics_dtype(residual.dtype)) + branch


def _scale_part(z: Tensor, alpha: Tensor, group: int, eps: Eps) -> Tensor:
    """`alpha * norm(z)` in the statistics dtype; alpha holds one scale a feature, or one group shared by all."""
    width = z.shape[-1]
    if alpha.shape == (width,):
        return norm(z, eps, group) * alpha
    if alpha.shape != (group,):
        raise ValueError(
            f"alpha has shape {list(alpha.shape)}, expected [{width}] (one scale a feature) "
            f"or [{group}] (shared by all groups of width {group})"
        )
    if isinstance(eps, Tensor):
        eps = eps.unsqueeze(-1)
    return (norm(z.unflatten(-1, (-1, group)), eps) * alpha).flatten(-2)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes x: that of autocast where it is on."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """Cast `x` once for all products that read it; autocast would make, and keep, one copy for each of them."""
    return x.to(product_dtype(x))
