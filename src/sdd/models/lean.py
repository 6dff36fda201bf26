"""The block's function with less work: norms that their readers cancel are left out, the others are fused.

`LeanBlock` is what models are made of. Its forward pass is `lean` wherever the fused kernels run, and the equations of
`Block` everywhere else: `runs_lean` alone decides. Parameters, checkpoints and the function are the same.

    read      what a projection reads: a tensor, and what is left of the norm before it if that was left out
    product   z = V x, before its norm: fused operations norm it where they use it

Which norms are left out, and why that is exact, stands at the head of `sdd.models.elimination`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd import kernels, probe_points
from sdd.functional import Eps, cast_once, product_dtype, statistics_dtype
from sdd.kernels.experts import Order, by_row, collect, dispatch
from sdd.models.block import Block, FeedForward, LearnedMix, Mix, Rope
from sdd.models.config import ModelConfig
from sdd.models.documents import Mask
from sdd.models.elimination import left_out_norms
from sdd.models.joint import has_global_hooks, has_hooks
from sdd.models.kv_cache import Extend
from sdd.models.moe import MoE, Routing
from sdd.nn import LearnedScale, RMSNorm, SDDExpertLinear, SDDLinear


class LeanBlock(Block):
    """A block that runs as `lean` where that pays, and as the equations of `Block` elsewhere.

    Attributes:
        left_out: sites whose norms `lean` does not compute.
        force_lean: run `lean` on every device, as tests do; modules that it does not know still prevent it.
        built: every module with its name and class, as they were built.
    """

    def __init__(self, config: ModelConfig, index: int, device: torch.device | str | None = None) -> None:
        super().__init__(config, index, device)
        self.left_out = left_out_norms(config, index)
        self.force_lean = False
        self.built = tuple((name, module, type(module)) for name, module in self.named_modules() if name)

    def forward(
        self, x_BTC: Tensor, rope: Rope, mask: Mask | None = None, extend: Extend | None = None
    ) -> tuple[Tensor, Routing | None]:
        """As `Block.forward`."""
        if runs_lean(self, x_BTC):
            return lean(self, x_BTC, rope, mask, extend)
        return super().forward(x_BTC, rope, mask, extend)


def runs_lean(block: LeanBlock, x: Tensor) -> bool:
    """Whether `lean` takes the place of the block's equations: the one place that decides.

    The equations run where no kernel does (a CPU, a small tensor, a forced path), while a probe records, in float16
    (whose range the values of left-out norms leave), and if anything in the block is not as it was built: an adapter, a
    hook, a replaced module, a norm without a scale, a scale without a norm (a learned residual rate is one).
    """
    if not (block.force_lean or kernels.path_of(x) == "triton") or product_dtype(x) == torch.float16:
        return False
    return not probe_points.recording() and _is_as_built(block)


def _is_as_built(block: LeanBlock) -> bool:
    """Whether the block holds the modules that it was built with, each known to `lean`, and nothing looks at them."""
    if has_global_hooks():
        return False
    now = {name: module for name, module in block.named_modules() if name}
    return len(now) == len(block.built) and all(
        now.get(name) is module and type(module) is kind and _is_known(module) for name, module, kind in block.built
    )


def _is_known(module: nn.Module) -> bool:
    """Whether `lean` computes what this module does: it has no hook, no bias and no `forward` of its own."""
    if has_hooks(module) or "forward" in vars(module):
        return False
    if isinstance(module, RMSNorm):
        return module.weight is not None
    if isinstance(module, LearnedScale):  # one in every rule and sublayer that has learned scales
        return False
    return module._parameters.get("bias") is None


class Read(NamedTuple):
    """The input `gain * x / s` of projections, factor by factor: they fold gain into V, s^2 into eps.

    Attributes:
        x: `[..., N]`; with a norm that was left out, its input.
        gain: alpha `[N]` of the norm that was left out, which the readers take into their columns; None if x has it.
        s2: `s^2 = mean(z^2) + eps` of the norm that was left out, at least float32 `[...]`; None if none was.
    """

    x: Tensor
    gain: Tensor | None = None
    s2: Tensor | None = None


class Product(NamedTuple):
    """A projection before its norm.

    Attributes:
        z: `V x`.
        layer: the projection, if it has a norm.
        eps: of its norm: a number, or one for each row if the norm before the projection was left out.
    """

    z: Tensor
    layer: SDDLinear | None = None
    eps: Eps = 0.0

    @property
    def alpha(self) -> Tensor | None:
        """The scale after the norm; None without a norm."""
        return None if self.layer is None else self.layer.alpha


def lean(
    block: LeanBlock, x: Tensor, rope: Rope, mask: Mask | None, extend: Extend | None
) -> tuple[Tensor, Routing | None]:
    """`Block.forward`, one operation a line."""
    attn, ffn, out = block.attn, block.ffn, block.left_out
    h = normed(block.attn_in, x, "attn_in" in out)
    q, k = (rotated(product(layer, h), rope, attn.head_dim) for layer in (attn.q_proj, attn.k_proj))
    v = attn.heads(scaled(product(attn.v_proj, h)))
    y = normed(attn.ctx, attn.attend(q, k, v, mask, extend), "ctx" in out)
    x, h = between(product(attn.o_proj, y), x, kept(h, x, block.attn_in), block, "ffn_in" in out)
    stream = kept(h, x, block.ffn_in)
    if isinstance(ffn, MoE):
        y, routing = mixture(ffn, h.x, "up" in out)
        return added(Product(y), x, stream, block.ffn_mix, block.ffn_post), routing
    y = gated(product(ffn.gate_proj, h), product(ffn.up_proj, h), ffn.joint, "up" in out)
    return added(product(ffn.down_proj, y), x, stream, block.ffn_mix, block.ffn_post), None


def normed(norm: nn.Module, x: Tensor, left_out: bool) -> Read:
    """`norm(x)`; or if the norm is left out, x with the gain and the s^2 that its readers need."""
    if left_out:
        assert isinstance(norm, RMSNorm)
        return Read(cast_once(x), weight_of(norm), mean_square(x) + norm.eps)
    if isinstance(norm, RMSNorm):
        return Read(kernels.scaled_norm(x, weight_of(norm), group=norm.group, eps=norm.eps, dtype=product_dtype(x)))
    return Read(cast_once(x))


def product(layer: nn.Module, read: Read) -> Product:
    """`z = V x`; the gain of a norm that was left out goes into V's columns, its s^2 into eps."""
    assert isinstance(layer, nn.Linear | SDDLinear)
    weight = layer.weight if read.gain is None else (layer.weight * read.gain).to(layer.weight.dtype)
    z = F.linear(read.x, weight)
    if not isinstance(layer, SDDLinear):
        assert read.s2 is None, "a norm before a plain layer cannot be left out"
        return Product(z)
    return Product(z, layer, layer.eps if read.s2 is None else layer.eps * read.s2)


def scaled(p: Product) -> Tensor:
    """`alpha * norm(z)`."""
    return p.z if p.layer is None else kernels.scaled_norm(p.z, p.layer.alpha, group=p.layer.parts, eps=p.eps)


def rotated(p: Product, rope: Rope, head_dim: int) -> Tensor:
    """`rope(alpha * norm(z))`, `[B, heads, T, D]`."""
    group = head_dim if p.layer is not None and p.layer.group == head_dim else None
    return kernels.qk_norm_rope(p.z, p.alpha, *rope, n_heads=p.z.shape[-1] // head_dim, group=group, eps=p.eps)


def gated(gate: Product, up: Product, joint: bool, left_out: bool) -> Read:
    """`silu(alpha_g * norm(z_g)) * (alpha_u * norm(z_u))`, the norm of z_u left out or not."""
    if left_out:
        assert up.alpha is not None
        h, mean_square_up = kernels.sdd_swiglu_bare_up(gate.z, up.z, gate.alpha, up.alpha, eps=gate.eps)
        return Read(h, None, mean_square_up + up.eps)
    up_eps = None if joint else up.eps
    return Read(kernels.sdd_swiglu(gate.z, up.z, gate.alpha, up.alpha, joint=joint, eps=gate.eps, up_eps=up_eps))


def between(p: Product, x: Tensor, stream: Tensor, block: LeanBlock, left_out: bool) -> tuple[Tensor, Read]:
    """The stream after the attention, `attn_post(mix(x, alpha * norm(z)))`, and what the feed-forward network reads."""
    mix, post, then = block.attn_mix, block.attn_post, block.ffn_in
    assert isinstance(mix, Mix)
    options: dict[str, Any] = {"residual_scale": mix.c_x, "eps": p.eps, "dtype": product_dtype(x)}
    if isinstance(post, nn.Identity) and isinstance(then, RMSNorm) and not left_out:
        z, alpha = branch(p, mix)
        x, h = kernels.residual_prenorm(z, x, alpha, weight_of(then), norm_eps=then.eps, **options)
        return x, Read(h)
    if isinstance(post, RMSNorm) and isinstance(then, nn.Identity):
        z, alpha = branch(p, mix)
        x, h = kernels.residual_postnorm(z, x, alpha, weight_of(post), post_eps=post.eps, kept=stream, **options)
        return x, Read(h)
    x = added(p, x, stream, mix, post)
    return x, normed(then, x, left_out)


def added(p: Product, x: Tensor, stream: Tensor, mix: Mix | LearnedMix, post: nn.Module) -> Tensor:
    """`post(mix(x, alpha * norm(z)))`."""
    assert isinstance(mix, Mix)
    z, alpha = branch(p, mix)
    norm = {"post_alpha": weight_of(post), "post_eps": post.eps} if isinstance(post, RMSNorm) else {}
    return kernels.residual_norm(z, x, alpha, residual_scale=mix.c_x, eps=p.eps, kept=stream, **norm)


def branch(p: Product, mix: Mix) -> tuple[Tensor, Tensor | None]:
    """Of `c_f * alpha * norm(z)`, z and alpha: alpha takes c_f, or z where there is no norm."""
    if mix.c_f == 1:
        return p.z, p.alpha
    return (mix.c_f * p.z, None) if p.alpha is None else (p.z, mix.c_f * p.alpha)


def kept(h: Read, x: Tensor, norm: nn.Module) -> Tensor:
    """The copy of the stream x that the backward pass keeps anyway: h, where no norm stands between the two."""
    return h.x if isinstance(norm, nn.Identity) else x


def mixture(moe: MoE, x_BTC: Tensor, left_out: bool) -> tuple[Tensor, Routing]:
    """`MoE.forward`, its experts with fused operations."""
    x_NC = x_BTC.flatten(0, -2)
    weights_NK, order, routing = moe.route(x_NC)
    weights_M = by_row(weights_NK, order)
    y_MC = experts(moe, dispatch(x_NC, order), weights_M, order, left_out)
    y_BTC = collect(y_MC, order).to(x_BTC.dtype).view_as(x_BTC)
    if moe.shared is not None:
        ffn, h = moe.shared, Read(x_BTC)
        assert isinstance(ffn, FeedForward)
        y = gated(product(ffn.gate_proj, h), product(ffn.up_proj, h), ffn.joint, left_out)
        y_BTC = y_BTC + scaled(product(ffn.down_proj, y))
    return y_BTC, routing


def experts(moe: MoE, x_MC: Tensor, weights_M: Tensor, order: Order, left_out: bool) -> Tensor:
    """Each row through its expert, times the router's weight: `[M, C]` to `[M, C]`."""
    gate, up, down = moe.gate_proj, moe.up_proj, moe.down_proj
    z_gate, z_up = gate.product(x_MC, order), up.product(x_MC, order)
    alpha_gate, alpha_up = (layer.alpha if isinstance(layer, SDDExpertLinear) else None for layer in (gate, up))
    eps, up_eps = (layer.eps if isinstance(layer, SDDExpertLinear) else 0.0 for layer in (gate, up))
    down_eps = None
    if left_out:
        assert alpha_up is not None
        assert isinstance(down, SDDExpertLinear)
        h_MF, mean_square_M = kernels.expert_swiglu_bare_up(z_gate, z_up, alpha_gate, alpha_up, order, eps=eps)
        down_eps = down.eps * (mean_square_M + up_eps)
    else:
        norms = {"joint": moe.joint, "eps": eps, "up_eps": None if moe.joint else up_eps}
        h_MF = kernels.expert_swiglu(z_gate, z_up, alpha_gate, alpha_up, order, **norms)
    y_MC = down.product(h_MF, order)
    if isinstance(down, SDDExpertLinear):
        return down.scale(y_MC, order, weights_M, down_eps)
    return y_MC * weights_M.unsqueeze(1)


def weight_of(norm: RMSNorm) -> Tensor:
    """The scale of a norm that has one, as `runs_lean` has seen to, times its factor."""
    assert norm.weight is not None
    return norm.weight if norm.factor == 1 else norm.factor * norm.weight


def mean_square(z: Tensor) -> Tensor:
    """`mean(z^2)` of each row, at least float32 `[...]`."""
    return z.to(statistics_dtype(z.dtype)).square().mean(-1)
