"""One block for every placement: attention and feed-forward network between the norms that the placement names.

On a GPU the sites of norms run as fused kernels (`sdd.kernels`), elsewhere as the modules that they are; the modules
run everywhere while a probe records, or if one of them was replaced or has hooks, as by an adapter.

Shape suffixes: B batch, T tokens, C d_model, H query heads, K key-value heads, D head_dim, F d_ff.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd import functional as sdd_F
from sdd import kernels, probe_points
from sdd.functional import Eps
from sdd.models.config import ModelConfig
from sdd.models.elimination import (
    Skipped,
    is_plain,
    mean_square,
    product_dtype,
    project,
    read,
    skip,
    superfluous_norms,
)
from sdd.models.kv_cache import Extend
from sdd.models.moe import MoE, Routing
from sdd.nn import RMSNorm, SDDLinear
from sdd.placement import SCALES, Norm, Site

Rope = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One block: `x = attn_post(c*x + attn(attn_in(x)))`, then the same with the feed-forward network."""

    def __init__(self, config: ModelConfig, index: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        norms = config.placement.layer(index, config.n_layers)
        self.residual_scale = SCALES[config.placement.residual_scale](config.n_layers)
        self.superfluous = eliminations(config, index)
        self.attn_in = norm_at(norms.get("attn_in"), config, config.d_model, device)
        self.attn = Attention(config, norms, self.superfluous, device)
        self.attn_post = norm_at(norms.get("attn_post"), config, config.d_model, device)
        self.ffn_in = norm_at(norms.get("ffn_in"), config, config.d_model, device)
        self.ffn = feed_forward(config, norms, self.superfluous, device)
        self.ffn_post = norm_at(norms.get("ffn_post"), config, config.d_model, device)

    def forward(
        self, x_BTC: Tensor, rope: Rope, mask: Tensor | None = None, extend: Extend | None = None
    ) -> tuple[Tensor, Routing | None]:
        """`[B, T, C]` to `[B, T, C]`, and how a mixture of experts routed the tokens."""
        attn, ffn = self.attn, self.ffn
        h_BTC, before = self._enter("attn_in", self.attn_in, x_BTC, attn.q_proj, attn.k_proj, attn.v_proj)
        y_BTC, before = attn(h_BTC, rope, mask, extend, before)
        x_BTC, h_BTC, before = self._between(x_BTC, _kept(x_BTC, h_BTC, self.attn_in), y_BTC, before)
        kept_BTC = _kept(x_BTC, h_BTC, self.ffn_in)
        if isinstance(ffn, MoE):
            y_BTC, routing = ffn(h_BTC)
            return self._add(x_BTC, kept_BTC, y_BTC, self.ffn_post), routing
        y_BTF, before = ffn(h_BTC, before)
        return self._leave(x_BTC, kept_BTC, y_BTF, before, ffn.down_proj, self.ffn_post), None

    def _enter(self, site: Site, norm: nn.Module, x: Tensor, *readers: nn.Module) -> tuple[Tensor, Skipped | None]:
        """`norm(x)`, or x if its readers make the norm superfluous; in the precision in which they multiply.

        (Autocast would cast it anew for each of them, and keep every copy.)
        """
        dtype = product_dtype(x)
        if site in self.superfluous and is_plain(norm, *readers):
            x, before = skip(norm, x)
            return x.to(dtype), before
        if isinstance(norm, RMSNorm) and _fuses(x, norm):
            return kernels.scaled_norm(x, norm.weight, group=norm.group, eps=norm.eps, dtype=dtype), None
        return norm(x).to(dtype), None

    def _between(
        self, x: Tensor, kept: Tensor, y: Tensor, before: Skipped | None
    ) -> tuple[Tensor, Tensor, Skipped | None]:
        """The stream after the attention, and what the feed-forward network reads of it: `_leave`, then `_enter`."""
        out, post, norm, ffn = self.attn.o_proj, self.attn_post, self.ffn_in, self.ffn
        readers = () if isinstance(ffn, MoE) else (ffn.gate_proj, ffn.up_proj)
        one_norm = isinstance(norm, RMSNorm) != isinstance(post, RMSNorm)
        if not one_norm or "ffn_in" in self.superfluous or not _fuses(x, out, post, norm):
            x = self._leave(x, kept, y, before, out, post)
            return x, *self._enter("ffn_in", norm, x, *readers)
        z, eps = project(out, y, before)
        options: dict[str, Any] = {"residual_scale": self.residual_scale, "eps": eps, "dtype": product_dtype(x)}
        if isinstance(norm, RMSNorm):
            return *kernels.residual_prenorm(z, x, _alpha(out), norm.weight, norm_eps=norm.eps, **options), None
        assert isinstance(post, RMSNorm)
        options |= {"post_eps": post.eps, "kept": kept}
        return *kernels.residual_postnorm(z, x, _alpha(out), post.weight, **options), None

    def _leave(
        self, x: Tensor, kept: Tensor, h: Tensor, before: Skipped | None, out: nn.Module, post: nn.Module
    ) -> Tensor:
        """`post(c*x + out(h))`."""
        if not _fuses(x, out, post):
            return post(torch.add(read(out, h, before), x, alpha=self.residual_scale))
        z, eps = project(out, h, before)
        return self._residual_norm(z, x, kept, _alpha(out), eps, post)

    def _add(self, x: Tensor, kept: Tensor, y: Tensor, post: nn.Module) -> Tensor:
        """`post(c*x + y)`."""
        if not _fuses(x, post):
            return post(torch.add(y, x, alpha=self.residual_scale))
        return self._residual_norm(y, x, kept, None, 0.0, post)

    def _residual_norm(
        self, z: Tensor, x: Tensor, kept: Tensor, alpha: Tensor | None, eps: Eps, post: nn.Module
    ) -> Tensor:
        return kernels.residual_norm(
            z,
            x,
            alpha,
            getattr(post, "weight", None),
            residual_scale=self.residual_scale,
            eps=eps,
            post_eps=getattr(post, "eps", 0.0),
            kept=kept,
        )


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE, `ctx(softmax(q k^T / sqrt(D)) v)`, and its output projection."""

    def __init__(
        self,
        config: ModelConfig,
        norms: dict[Site, Norm],
        superfluous: frozenset[Site] = frozenset(),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        C, KD = config.d_model, config.kv_width
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.superfluous = superfluous
        self.q_proj = projection_at(C, C, norms.get("q"), config, device)
        self.k_proj = projection_at(C, KD, norms.get("k"), config, device)
        self.v_proj = projection_at(C, KD, norms.get("v"), config, device)
        self.ctx = norm_at(norms.get("ctx"), config, C, device)
        self.o_proj = projection_at(C, C, norms.get("attn_out"), config, device)

    def forward(
        self,
        x_BTC: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        extend: Extend | None = None,
        before: Skipped | None = None,
    ) -> tuple[Tensor, Skipped | None]:
        """What the output projection reads.

        Args:
            x_BTC: the block's input, normed.
            rope: cosine and sine at the tokens' positions.
            mask: bool `[B, 1, T, S]`, True where attention is allowed; None for causal.
            extend: puts the keys and values of earlier tokens before these, which makes T into S.
            before: what is left of a norm of x that was skipped.

        Returns:
            `[B, T, C]`, and what is left of its norm if that was skipped.
        """
        q_BHTD = self._rotated(self.q_proj, x_BTC, rope, before)
        k_BKTD = self._rotated(self.k_proj, x_BTC, rope, before)
        v_BKTD = self._heads(read(self.v_proj, x_BTC, before))
        if extend is not None:
            k_BKTD, v_BKTD = extend(k_BKTD, v_BKTD)
        else:
            probe_points.attention(self, q_BHTD, k_BKTD, mask)
        y_BTC = self._attend(q_BHTD, k_BKTD, v_BKTD, mask).transpose(1, 2).flatten(2)
        if "ctx" in self.superfluous and is_plain(self.ctx, self.o_proj):
            return skip(self.ctx, y_BTC)
        return self.ctx(y_BTC), None

    def _rotated(self, layer: nn.Module, x: Tensor, rope: Rope, before: Skipped | None) -> Tensor:
        """Queries or keys, normed and rotated, `[B, heads, T, D]`."""
        if before is not None or rope[0].ndim != 2 or not _fuses(x, layer):
            return sdd_F.apply_rope(self._heads(read(layer, x, before)), *rope)
        z, _ = project(layer, x, None)
        group, eps = getattr(layer, "group", None), getattr(layer, "eps", 0.0)
        return kernels.qk_norm_rope(z, _alpha(layer), *rope, n_heads=z.shape[-1] // self.head_dim, group=group, eps=eps)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.shape[2] == 1 < k.shape[2]:
            # one new token: the heads that share keys become the queries of one head, so that no key is repeated
            together = q.reshape(len(k), k.shape[1], -1, self.head_dim)
            return F.scaled_dot_product_attention(together, k, v, attn_mask=mask).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU, `silu(gate x) * up x`, and its output projection."""

    def __init__(
        self,
        config: ModelConfig,
        norms: dict[Site, Norm],
        superfluous: frozenset[Site] = frozenset(),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        C, F_ = config.d_model, config.d_ff
        self.joint = config.placement.joint_gate_up and {"gate", "up"} <= norms.keys()
        self.superfluous = superfluous
        self.gate_proj = projection_at(C, F_, norms.get("gate"), config, device)
        self.up_proj = projection_at(C, F_, norms.get("up"), config, device)
        self.down_proj = projection_at(F_, C, norms.get("ffn_out"), config, device)

    def forward(self, x_BTC: Tensor, before: Skipped | None = None) -> tuple[Tensor, Skipped | None]:
        """What the down projection reads.

        Args:
            x_BTC: the stream, normed.
            before: what is left of a norm of x that was skipped.

        Returns:
            `[B, T, F]`, and what is left of the up projection's norm if that was skipped.
        """
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        without_up = "up" in self.superfluous and is_plain(up, down) and product_dtype(x_BTC) != torch.float16
        if before is None and _fuses(x_BTC, gate, up):
            return self._fused(x_BTC, without_up)
        if self.joint:
            return self._joint(x_BTC, before), None
        gated = read(gate, x_BTC, before)
        if without_up:
            return self._without_up_norm(gated, x_BTC, before)
        return sdd_F.swiglu(gated, read(up, x_BTC, before)), None

    def _fused(self, x: Tensor, without_up: bool) -> tuple[Tensor, Skipped | None]:
        gate, up = self.gate_proj, self.up_proj
        (z_gate, eps), (z_up, up_eps) = project(gate, x, None), project(up, x, None)
        if without_up:
            assert isinstance(up, SDDLinear)
            h, square = kernels.sdd_swiglu_bare_up(z_gate, z_up, _alpha(gate), up.alpha, eps=_number(eps))
            return h, Skipped(None, square + up_eps)
        return kernels.sdd_swiglu(
            z_gate,
            z_up,
            _alpha(gate),
            _alpha(up),
            joint=self.joint,
            eps=_number(eps),
            up_eps=None if self.joint else _number(up_eps),
        ), None

    def _joint(self, x: Tensor, before: Skipped | None) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        assert isinstance(gate, SDDLinear)
        assert isinstance(up, SDDLinear)
        (z_gate, eps), (z_up, _) = project(gate, x, before), project(up, x, before)
        y_gate, y_up = sdd_F.joint_scaled_norm(z_gate, z_up, gate.alpha, up.alpha, eps=eps)
        if probe_points.recording():
            z = torch.cat([z_gate, z_up], -1)
            probe_points.projection(gate, z, y_gate)
            probe_points.projection(up, z, y_up)
        return sdd_F.swiglu(y_gate, y_up)

    def _without_up_norm(self, gate: Tensor, x: Tensor, before: Skipped | None) -> tuple[Tensor, Skipped]:
        """`silu(gate) * alpha * z`, and what is left of the norm of z."""
        up = self.up_proj
        assert isinstance(up, SDDLinear)
        z, eps = project(up, x, before)
        return sdd_F.swiglu(gate, (up.alpha * z).to(z.dtype)), Skipped(None, mean_square(z) + eps)


def eliminations(config: ModelConfig, index: int) -> frozenset[Site]:
    """The norms of block `index` that are not computed, because their readers make them superfluous."""
    norms = config.placement.layer(index, config.n_layers)
    joint = config.placement.joint_gate_up and norms.keys() >= {"gate", "up"}
    router = config.moe is not None
    return superfluous_norms(norms, joint=joint, router=router) if config.eliminate_norms else frozenset()


def feed_forward(
    config: ModelConfig,
    norms: dict[Site, Norm],
    superfluous: frozenset[Site] = frozenset(),
    device: torch.device | str | None = None,
) -> FeedForward | MoE:
    """The feed-forward network of a block, or the mixture of experts in its place."""
    if config.moe is None:
        return FeedForward(config, norms, superfluous, device)
    width = config.moe.d_shared
    shared = FeedForward(replace(config, d_ff=width), norms, superfluous, device) if width else None
    return MoE(config, norms, shared, superfluous, device)


def _group(norm: Norm, config: ModelConfig) -> int | None:
    return config.head_dim if norm.group == "head" else None


def projection_at(
    in_features: int, out_features: int, norm: Norm | None, config: ModelConfig, device: torch.device | str | None
) -> nn.Linear | SDDLinear:
    """A plain Linear, or with a norm at its site an SDDLinear."""
    if norm is None:
        return nn.Linear(in_features, out_features, bias=False, device=device)
    return SDDLinear(
        in_features,
        out_features,
        bias=False,
        device=device,
        group=_group(norm, config),
        shared_alpha=norm.shared_alpha,
        alpha_init=norm.alpha(config.n_layers),
        eps=norm.eps,
    )


def norm_at(norm: Norm | None, config: ModelConfig, width: int, device: torch.device | str | None) -> nn.Module:
    """The norm of a site that is no projection; an absent one is the identity, which costs nothing."""
    if norm is None:
        return nn.Identity()
    width = config.head_dim if norm.shared_alpha else width
    return RMSNorm(width, norm.alpha(config.n_layers), norm.eps, device, group=_group(norm, config))


def _kept(x: Tensor, h: Tensor, norm: nn.Module) -> Tensor:
    """What the backward pass keeps of the stream x: h, as its readers do, where that is x in their precision."""
    return h if isinstance(norm, nn.Identity) and is_plain(norm) else x


def _fuses(x: Tensor, *modules: nn.Module) -> bool:
    """Whether fused kernels stand for these modules on x."""
    return kernels.path_of(x) == "triton" and is_plain(*modules)


def _alpha(layer: nn.Module) -> Tensor | None:
    return layer.alpha if isinstance(layer, SDDLinear) else None


def _number(eps: Eps) -> float:
    assert isinstance(eps, float | int)
    return float(eps)
