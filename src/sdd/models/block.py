"""The block as its equations: attention and SwiGLU between the norms that a placement names.

With every absent norm left out,

    x = attn_post(mix(x, attn(attn_in(x))))        attn(h) = o(ctx(softmax(rope(q h) rope(k h)^T / sqrt(D)) v h))
    x = ffn_post(mix(x, ffn(ffn_in(x))))           ffn(h)  = down(silu(gate h) * up h)

where q, k, v, o, gate, up and down are SDD layers at sites that have a norm, and `mix(x, f) = x + f` unless the
placement names another residual rule. Learned scales without a norm (nGPT) multiply q and k after RoPE, gate, and up.
`sdd.models.lean` computes the same function faster.

Shape suffixes: B batch, T tokens, C d_model, H query heads, K key-value heads, D head_dim, F d_ff.
"""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from sdd import probe_points
from sdd.functional import apply_rope, cast_once, swiglu
from sdd.kernels import scaled_norm
from sdd.models.config import ModelConfig
from sdd.models.documents import Mask, as_dense, attend_in_blocks
from sdd.models.joint import call_jointly
from sdd.models.kv_cache import Extend
from sdd.models.moe import MoE, Routing
from sdd.models.sites import norm_at, projection_at, scale_at, scaled_by
from sdd.models.token_split import ALL_TOKENS, TokenSplit
from sdd.nn import SDDLinear
from sdd.placement import LEARNED_RESIDUAL, RESIDUALS, Norm, Site

#: Cosine and sine at the tokens' positions, `[T, D]`, or `[B, 1, T, D]` where rows stand at different ones.
Rope = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One block of a decoder, as the equations at the head of this module."""

    def __init__(self, config: ModelConfig, index: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        norms = config.placement.layer(index, config.n_layers)

        def norm(site: Site) -> nn.Module:
            return norm_at(norms.get(site), config, device, index + 1)

        self.attn_in = norm("attn_in")
        self.attn = Attention(config, norms, index + 1, device)
        self.attn_mix = mix_at(config, 2 * index + 1, device)
        self.attn_post = norm("attn_post")
        self.ffn_in = norm("ffn_in")
        self.ffn = feed_forward(config, norms, device)
        self.ffn_mix = mix_at(config, 2 * index + 2, device)
        self.ffn_post = norm("ffn_post")

    def forward(
        self, x_BTC: Tensor, rope: Rope, mask: Mask | None = None, extend: Extend | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The block's output, and the routing of a mixture of experts.

        Args:
            x_BTC: the residual stream.
            rope: cosine and sine at the tokens' positions.
            mask: bool `[B, 1, T, S]`, True where attention is allowed, or its blocks; None for causal.
            extend: puts the keys and values of earlier tokens before these, which makes T into S.

        Returns:
            `[B, T, C]`, and the routing; None in a dense model.
        """
        x_BTC = self.attn_post(self.attn_mix(x_BTC, self.attn(self.attn_in(x_BTC), rope, mask, extend)))
        y_BTC, routing = routed(self.ffn(self.ffn_in(x_BTC)))
        return self.ffn_post(self.ffn_mix(x_BTC, y_BTC)), routing


class Mix(nn.Module):
    """The residual rule of one sublayer, `mix(x, f) = c_x * x + c_f * f`; see `sdd.placement.RESIDUALS`.

    Args:
        config: gives the rule and the depth.
        sublayer: its number k, from 1; attention and feed-forward network alternate.
    """

    def __init__(self, config: ModelConfig, sublayer: int) -> None:
        super().__init__()
        self.c_x, self.c_f = RESIDUALS[config.placement.residual](sublayer, config.n_layers)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """`c_x * x + c_f * f`; a factor of 1 costs no pass over memory."""
        return (x if self.c_x == 1 else self.c_x * x) + (f if self.c_f == 1 else self.c_f * f)

    def extra_repr(self) -> str:
        """The two factors."""
        return f"{self.c_x:.4g} * x + {self.c_f:.4g} * f"


class LearnedMix(nn.Module):
    """The residual rule `mix(x, f) = x + |a| (f - x)`, with a rate a for each feature (arXiv 2410.01131)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rate = scale_at("mix", config.d_model, config, device)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """`x + |a| (f - x)`."""
        assert self.rate is not None
        return (x + self.rate().abs() * (f - x)).to(x.dtype)


def mix_at(config: ModelConfig, sublayer: int, device: torch.device | str | None) -> Mix | LearnedMix:
    """The residual rule of one sublayer, by its number from 1."""
    learned = config.placement.residual == LEARNED_RESIDUAL
    return LearnedMix(config, device) if learned else Mix(config, sublayer)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE, `o(ctx(softmax(q k^T / sqrt(D)) v))`.

    Attributes:
        split: how processes share the tokens that attend.
    """

    split: TokenSplit = ALL_TOKENS

    def __init__(
        self,
        config: ModelConfig,
        norms: dict[Site, Norm],
        layer: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        C, KD = config.d_model, config.kv_width
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.q_proj = projection_at(C, C, norms.get("q"), config, device)
        self.k_proj = projection_at(C, KD, norms.get("k"), config, device)
        self.v_proj = projection_at(C, KD, norms.get("v"), config, device)
        self.ctx = norm_at(norms.get("ctx"), config, device, layer)
        self.o_proj = projection_at(C, C, norms.get("attn_out"), config, device)
        self.qk_scale = scale_at("qk", C, config, device)

    def forward(self, x_BTC: Tensor, rope: Rope, mask: Mask | None = None, extend: Extend | None = None) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`; the arguments are those of `Block`."""
        x_BTC = cast_once(x_BTC)
        q_BHTD, k_BKTD, v_BKTD = (self.heads(layer(x_BTC)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q_BHTD, k_BKTD = self.scaled(apply_rope(q_BHTD, *rope)), apply_rope(k_BKTD, *rope)
        y_BTC = self.attend(q_BHTD, k_BKTD, v_BKTD, mask, extend)
        return self.o_proj(self.ctx(y_BTC))

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Mask | None, extend: Extend | None
    ) -> Tensor:
        """`softmax(q k^T / sqrt(D)) v`, `[B, T, C]`; q and k are rotated already."""
        if extend is not None:
            k_BKTD, v_BKTD = extend(k_BKTD, v_BKTD)
        elif self.split.attends:
            if probe_points.recording():
                self._show(q_BHTD, self.split.all_queries(k_BKTD), mask)
            return self.split.attend(q_BHTD, k_BKTD, v_BKTD).transpose(1, 2).flatten(2)
        else:
            k_BKTD, v_BKTD = self.split.attended(k_BKTD, v_BKTD)
            self._show(q_BHTD, k_BKTD, mask)
        if isinstance(mask, BlockMask):
            y_BHTD = attend_in_blocks(q_BHTD, k_BKTD, v_BKTD, mask)
        elif q_BHTD.shape[2] == 1 < k_BKTD.shape[2]:
            # One new token: the heads that share keys become the queries of one head, so that no key is repeated.
            q = q_BHTD.reshape(len(k_BKTD), k_BKTD.shape[1], -1, self.head_dim)
            y_BHTD = F.scaled_dot_product_attention(q, k_BKTD, v_BKTD, attn_mask=mask).reshape(q_BHTD.shape)
        else:
            y_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
            )
        return y_BHTD.transpose(1, 2).flatten(2)

    def _show(self, q_BHTD: Tensor, k_BKTD: Tensor, mask: Mask | None) -> None:
        if probe_points.recording():
            shown = as_dense(mask) if isinstance(mask, BlockMask) else mask
            shown = None if shown is None else self.split.all_queries(shown)
            probe_points.attention(self, self.split.all_queries(q_BHTD), k_BKTD, shown)

    def scaled(self, q_BHTD: Tensor) -> Tensor:
        """`s^2 q`, which is what s on both q and k gives; so keys, which heads may share, need no scale."""
        if self.qk_scale is None:
            return q_BHTD
        s_H1D = self.qk_scale().view(-1, 1, self.head_dim)
        return (s_H1D.square() * q_BHTD).to(q_BHTD.dtype)

    def heads(self, x_BTC: Tensor) -> Tensor:
        """The features of each head, `[B, heads, T, D]`."""
        return x_BTC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU, `down(silu(gate x) * up x)` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, norms: dict[Site, Norm], device: torch.device | str | None = None) -> None:
        super().__init__()
        C, F_ = config.d_model, config.d_ff
        self.joint = config.placement.joins_gate_up(norms)
        self.gate_proj = projection_at(C, F_, norms.get("gate"), config, device)
        self.up_proj = projection_at(C, F_, norms.get("up"), config, device)
        self.down_proj = projection_at(F_, C, norms.get("ffn_out"), config, device)
        self.gate_scale, self.up_scale = (scale_at(site, F_, config, device) for site in ("gate", "up"))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        x_BTC = cast_once(x_BTC)
        gate_BTF, up_BTF = self._joint(x_BTC) if self.joint else (self.gate_proj(x_BTC), self.up_proj(x_BTC))
        return self.down_proj(swiglu(scaled_by(gate_BTF, self.gate_scale), scaled_by(up_BTF, self.up_scale)))

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up with one norm over the concatenated vector (the released dense code)."""
        gate, up = cast(SDDLinear, self.gate_proj), cast(SDDLinear, self.up_proj)

        def compute(x_gate: Tensor, x_up: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.cat([F.linear(x_gate, gate.weight), F.linear(x_up, up.weight)], -1)
            y_gate, y_up = scaled_norm(z, torch.cat([gate.alpha, up.alpha]), eps=gate.eps).chunk(2, -1)
            probe_points.projection(gate, z, y_gate)
            probe_points.projection(up, z, y_up)
            return y_gate, y_up

        return call_jointly(gate, up, SDDLinear, compute, x)


def routed(output: Tensor | tuple[Tensor, Routing]) -> tuple[Tensor, Routing | None]:
    """The output of a feed-forward network or of a mixture of experts, with the routing if there is one."""
    return output if isinstance(output, tuple) else (output, None)


def feed_forward(
    config: ModelConfig, norms: dict[Site, Norm], device: torch.device | str | None = None
) -> FeedForward | MoE:
    """The feed-forward network of a block, or the mixture of experts in its place."""
    if config.moe is None:
        return FeedForward(config, norms, device)
    width = config.moe.d_shared
    shared = FeedForward(replace(config, d_ff=width), norms, device) if width else None
    return MoE(config, norms, shared, device)
