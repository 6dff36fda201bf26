"""Norms that their readers make superfluous.

An SDD projection does not see the scale of what it reads: for a number c > 0 a token, `norm(V (c h)) = norm(V h)` at
eps = 0. So where all readers of a norm are SDD, its 1/rms cancels and only its alpha is left:

    up       before an SDD down projection     h = silu(gate) * up is linear in up
    ctx      before an SDD output projection
    attn_in  if q, k and v are SDD
    ffn_in   if gate and up are SDD and no router reads it

What breaks it, and keeps the norm: several groups a token (per-head norms, or a joint gate|up group, whose statistic
the gate needs), a bias or another term beside the reader's V, a reader that is no SDD, and float16, whose range the
unnormed values leave (the smallest 1/rms reaches 2e4 against the factor of a gradient scaler).

With eps in the roots it stays exact if the reader's eps is taken on the scale of what it reads: with z the producer's
values, `h = z / s`, `s^2 = mean(z^2) + eps`, the reader gets z in place of h and `eps' = eps * s^2` in place of eps,

    V z / sqrt(mean((V z)^2) + eps * s^2) = V h / sqrt(mean((V h)^2) + eps),

gradients included, since s^2 is differentiated. A mere floor under the root would be cheaper by one number a token but
only agrees to eps / mean((V h)^2), which small init scales make large. The statistic is free where a kernel reads the
producer anyway.

Source: the observation is this project's own; see docs/design.md.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd import probe_points
from sdd.functional import Eps, statistics_dtype
from sdd.kernels import scaled_norm
from sdd.nn import ExpertLinear, RMSNorm, SDDExpertLinear, SDDLinear
from sdd.placement import Norm, Site

_PLAIN = (nn.Linear, SDDLinear, ExpertLinear, SDDExpertLinear, RMSNorm, nn.Identity)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Skipped(NamedTuple):
    """What is left of a norm whose readers make it superfluous: they read z in place of `gain * z / sqrt(square)`.

    Attributes:
        gain: the norm's alpha `[N]`, which the readers take into their columns; None if z has it already.
        square: `mean(z^2) + eps`, at least float32 `[...]`, one a row.
    """

    gain: Tensor | None
    square: Tensor


def superfluous_norms(norms: Mapping[Site, Norm], *, joint: bool, router: bool = False) -> frozenset[Site]:
    """The norms of a block that its SDD projections make superfluous; the conditions stand at the head of this module.

    Args:
        norms: the norms of one block.
        joint: whether gate and up have one norm group together.
        router: whether a router of experts reads what gate and up read.
    """
    found: set[Site] = set()
    if norms.keys() >= {"up", "ffn_out"} and not joint:
        found.add("up")
    if norms.keys() >= {"ctx", "attn_out"} and norms["ctx"].group == "full":
        found.add("ctx")
    if norms.keys() >= {"attn_in", "q", "k", "v"}:
        found.add("attn_in")
    if norms.keys() >= {"ffn_in", "gate", "up"} and not router:
        found.add("ffn_in")
    return frozenset(found)


def is_plain(*modules: nn.Module) -> bool:
    """Whether these can be computed around: linear layers and norms as they were built, and nobody looks at them.

    Adapters and hooks want the modules themselves, and so does a probe while it records.
    """
    return not probe_points.recording() and all(type(module) in _PLAIN and not _has_hooks(module) for module in modules)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def skip(norm: nn.Module, x: Tensor) -> tuple[Tensor, Skipped | None]:
    """A superfluous norm: x as it is and what its readers must know, or in float16 `norm(x)` and None."""
    assert isinstance(norm, RMSNorm)
    if product_dtype(x) == torch.float16:
        return norm(x), None
    return x, Skipped(norm.weight, mean_square(x) + norm.eps)


def project(layer: nn.Module, x: Tensor, before: Skipped | None) -> tuple[Tensor, Eps]:
    """`z = V x` and the eps of the norm of z (0 where none stands)."""
    assert isinstance(layer, (nn.Linear, SDDLinear))
    if before is None:
        return F.linear(x, layer.weight), layer.eps if isinstance(layer, SDDLinear) else 0.0
    assert isinstance(layer, SDDLinear)
    weight = layer.weight if before.gain is None else (layer.weight * before.gain).to(layer.weight.dtype)
    return F.linear(x, weight), layer.eps * before.square


def read(layer: nn.Module, x: Tensor, before: Skipped | None) -> Tensor:
    """`layer(x)`; or if the norm before it was skipped, what it would have given."""
    if before is None:
        return layer(x)
    z, eps = project(layer, x, before)
    assert isinstance(layer, SDDLinear)
    return scaled_norm(z, layer.alpha, group=layer.parts, eps=eps)


def mean_square(z: Tensor) -> Tensor:
    """`mean(z^2)` of each row, at least float32 `[...]`."""
    return z.to(statistics_dtype(z.dtype)).square().mean(-1)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: that of autocast where it is on."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype
