"""The language model: one Block for every placement.

Shape suffixes: B batch, T tokens, C d_model, H query heads, K key-value heads, D head_dim, F d_ff, V vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdd import functional as sdd_F
from sdd import points
from sdd.kernels import scaled_norm
from sdd.models.config import ModelConfig
from sdd.models.elimination import (
    Skipped,
    is_half,
    mean_square,
    project,
    read,
    show_projection,
    skip,
    superfluous_norms,
)
from sdd.models.init import init_weights
from sdd.models.kv_cache import Extend, KVCache
from sdd.nn import RMSNorm, SDDLinear
from sdd.placement import SCALES, Norm, Site

Rope = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One block: `x = attn_post(c*x + attn(attn_in(x)))`, then the same with the feed-forward network."""

    def __init__(self, config: ModelConfig, index: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        norms = config.placement.layer(index, config.n_layers)
        self.residual_scale = SCALES[config.placement.residual_scale](config.n_layers)
        self.superfluous = block_eliminations(config, index)
        self.attn_in = _norm(norms.get("attn_in"), config, config.d_model, device)
        self.attn = Attention(config, norms, device, self.superfluous)
        self.attn_post = _norm(norms.get("attn_post"), config, config.d_model, device)
        self.ffn_in = _norm(norms.get("ffn_in"), config, config.d_model, device)
        self.ffn = FeedForward(config, norms, device, self.superfluous)
        self.ffn_post = _norm(norms.get("ffn_post"), config, config.d_model, device)

    def forward(self, x_BTC: Tensor, rope: Rope, mask: Tensor | None = None, extend: Extend | None = None) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        h_BTC, before = self._enter(self.attn_in, "attn_in", x_BTC)
        x_BTC = self.attn_post(self._add(x_BTC, self.attn(h_BTC, rope, mask, extend, before)))
        h_BTC, before = self._enter(self.ffn_in, "ffn_in", x_BTC)
        return self.ffn_post(self._add(x_BTC, self.ffn(h_BTC, before)))

    def _enter(self, norm: nn.Module, site: Site, x: Tensor) -> tuple[Tensor, Skipped | None]:
        """`norm(x)`, or x if its readers make the norm superfluous."""
        return skip(norm, x) if site in self.superfluous else (norm(x), None)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        """`c*x + branch`, one operation whatever c."""
        return torch.add(branch, x, alpha=self.residual_scale)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE: `o_proj(ctx(softmax(q k^T / sqrt(D)) v))`."""

    def __init__(
        self,
        config: ModelConfig,
        norms: dict[Site, Norm],
        device: torch.device | str | None = None,
        superfluous: frozenset[Site] = frozenset(),
    ) -> None:
        super().__init__()
        C, KD = config.d_model, config.kv_width
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.q_proj = _projection(C, C, norms.get("q"), config, device)
        self.k_proj = _projection(C, KD, norms.get("k"), config, device)
        self.v_proj = _projection(C, KD, norms.get("v"), config, device)
        self.ctx = _norm(norms.get("ctx"), config, C, device)
        self.superfluous = superfluous
        self.o_proj = _projection(C, C, norms.get("attn_out"), config, device)

    def forward(
        self,
        x_BTC: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        extend: Extend | None = None,
        before: Skipped | None = None,
    ) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`.

        Mask `[B, 1, T, S]` is True where attention is allowed, None for causal; `extend` puts the keys and values of
        earlier tokens before these, which makes T into S; `before` is what is left of a skipped norm of x.
        """
        q_BHTD = sdd_F.apply_rope(self._heads(read(self.q_proj, x_BTC, before)), *rope)
        k_BKTD = sdd_F.apply_rope(self._heads(read(self.k_proj, x_BTC, before)), *rope)
        v_BKTD = self._heads(read(self.v_proj, x_BTC, before))
        if extend is not None:
            k_BKTD, v_BKTD = extend(k_BKTD, v_BKTD)
        else:
            points.attention(self, q_BHTD, k_BKTD, mask)
        y_BTC = self._attend(q_BHTD, k_BKTD, v_BKTD, mask).transpose(1, 2).flatten(2)
        if "ctx" in self.superfluous:
            return read(self.o_proj, *skip(self.ctx, y_BTC))
        return self.o_proj(self.ctx(y_BTC))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.shape[2] == 1 < k.shape[2]:
            # one new token: the heads that share keys become the queries of one head, so that no key is repeated
            together = q.reshape(len(k), k.shape[1], -1, self.head_dim)
            return F.scaled_dot_product_attention(together, k, v, attn_mask=mask).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate x) * up x)`."""

    def __init__(
        self,
        config: ModelConfig,
        norms: dict[Site, Norm],
        device: torch.device | str | None = None,
        superfluous: frozenset[Site] = frozenset(),
    ) -> None:
        super().__init__()
        C, F_ = config.d_model, config.d_ff
        self.superfluous = superfluous
        self.joint = config.placement.joint_gate_up and {"gate", "up"} <= norms.keys()
        self.gate_proj = _projection(C, F_, norms.get("gate"), config, device)
        self.up_proj = _projection(C, F_, norms.get("up"), config, device)
        self.down_proj = _projection(F_, C, norms.get("ffn_out"), config, device)

    def forward(self, x_BTC: Tensor, before: Skipped | None = None) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`; `before` is what is left of a skipped norm of x."""
        if self.joint:
            return self.down_proj(self._joint(x_BTC, before))
        gate = read(self.gate_proj, x_BTC, before)
        if "up" not in self.superfluous or is_half(gate):
            return self.down_proj(sdd_F.swiglu(gate, read(self.up_proj, x_BTC, before)))
        return read(self.down_proj, *self._without_up_norm(gate, x_BTC, before))

    def _joint(self, x: Tensor, before: Skipped | None) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        assert isinstance(gate, SDDLinear)
        assert isinstance(up, SDDLinear)
        (z_gate, eps), (z_up, _) = project(gate, x, before), project(up, x, before)
        if points.recording():
            y_gate, y_up = sdd_F.joint_scaled_norm(z_gate, z_up, gate.alpha, up.alpha, eps=eps)
            z = torch.cat([z_gate, z_up], -1)
            show_projection(gate, z, y_gate, before)
            show_projection(up, z, y_up, before)
            return sdd_F.swiglu(y_gate, y_up)
        return sdd_F.sdd_swiglu(z_gate, z_up, gate.alpha, up.alpha, joint=True, eps=eps)

    def _without_up_norm(self, gate: Tensor, x: Tensor, before: Skipped | None) -> tuple[Tensor, Skipped]:
        """`silu(gate) * alpha * z`, and what is left of the norm of z."""
        up = self.up_proj
        assert isinstance(up, SDDLinear)
        z, eps = project(up, x, before)
        square = mean_square(z) + eps
        if points.recording():
            with torch.no_grad():
                show_projection(up, z, scaled_norm(z, up.alpha, eps=eps), before)
        return sdd_F.swiglu(gate, (up.alpha * z).to(z.dtype)), Skipped(None, square)


class LanguageModel(nn.Module):
    """A decoder-only language model; where its norms stand is `config.placement`.

    Args:
        config: the shape and the placement.
        device: where parameters are made; on "meta" they have no storage and are not drawn (call `to_empty` and
            `init_weights` later).

    Attributes:
        checkpoint_blocks: recompute each block's activations in the backward pass instead of keeping them.
        chunked_loss: compute the loss without ever holding all logits, where torch has that (see `cross_entropy`).
    """

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.config = config
        self.checkpoint_blocks = False
        self.chunked_loss = False
        # without storage first: weights are drawn once, the same from one seed whether or not built on "meta"
        self.embed = nn.Embedding(config.vocab_size, config.d_model, device="meta")
        self.embed_norm = _norm(config.placement.norms.get("embed"), config, config.d_model, "meta")
        self.blocks = nn.ModuleList(Block(config, index, "meta") for index in range(config.n_layers))
        self.final_norm = _norm(config.placement.norms.get("final"), config, config.d_model, "meta")
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False, device="meta")
        )
        cos, sin = sdd_F.rope_tables(config.context, config.head_dim, config.rope_theta, "meta")
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    def init_weights(self) -> None:
        """Draw all parameters and fill the RoPE tables, e.g. after `to_empty`; see `sdd.models.init`."""
        device = self.embed.weight.device
        self.rope_cos, self.rope_sin = sdd_F.rope_tables(
            self.config.context, self.config.head_dim, self.config.rope_theta, device
        )
        init_weights(self)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        document_eos: int | None = None,
        z_loss: float = 0.0,
        reduction: str = "mean",
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits `[B, T, V]`, or the loss if targets are given.

        Args:
            tokens_BT: int64 `[B, T]`, T at most `config.context`.
            targets_BT: int64 `[B, T]`, the token after each.
            document_eos: the end-of-document token; if given, attention does not cross it.
            z_loss: weight of `logsumexp(logits)^2` (arXiv 2204.02311) added to the cross-entropy.
            reduction: "mean" or "none" (`[B, T]`); z_loss needs "mean".
            cache: the tokens come after those that it holds, and it holds them too afterwards.

        Returns:
            The logits, or cross-entropy in nats a token, in at least float32.

        Raises:
            ValueError: if the sequence is longer than the context, or document_eos is given with a cache.
        """
        if cache is not None and document_eos is not None:
            raise ValueError("document_eos needs all tokens at once: leave out document_eos or cache")
        T = tokens_BT.shape[1] + (max(cache.lengths) if cache is not None else 0)
        if self.config.context < T:
            raise ValueError(f"a sequence of {T} tokens was given, the model's context is {self.config.context}")
        mask = None if document_eos is None else document_mask(tokens_BT, document_eos)
        x_BTC = self.hidden(tokens_BT, mask, cache)
        if targets_BT is None:
            logits_BTV = F.linear(x_BTC, self.head_weight)
            points.output("logits", logits_BTV)
            return logits_BTV
        return cross_entropy(
            x_BTC, self.head_weight, targets_BT, z_loss=z_loss, reduction=reduction, chunked=self.chunked_loss
        )

    def hidden(self, tokens_BT: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """What the head reads: `[B, T]` to `[B, T, C]`; with a cache, which knows the mask, after what it holds."""
        positions = slice(tokens_BT.shape[1])
        if cache is not None:
            positions, mask = cache.grow(tokens_BT)
        rope = (self.rope_cos[positions], self.rope_sin[positions])
        x_BTC = self.embed_norm(self.embed(tokens_BT))
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                x_BTC = block(x_BTC, rope, mask, partial(cache.write, layer))
            elif self.checkpoint_blocks and torch.is_grad_enabled():
                x_BTC = checkpoint(block, x_BTC, rope, mask, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, rope, mask)
        return self.final_norm(x_BTC)

    @property
    def head_weight(self) -> Tensor:
        """The matrix that turns the last hidden state into logits, `[V, C]`."""
        return self.embed.weight if self.head is None else self.head.weight


def document_mask(tokens_BT: Tensor, eos: int) -> Tensor:
    """Causal attention within documents: bool `[B, 1, T, T]`, True where allowed; EOS closes its document."""
    ends = tokens_BT == eos
    document = ends.cumsum(-1) - ends.long()
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def cross_entropy(
    x_BTC: Tensor,
    head_weight: Tensor,
    targets_BT: Tensor,
    *,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunked: bool = False,
) -> Tensor:
    """Cross-entropy of `softmax(head x)` in nats a token, in at least float32.

    Args:
        x_BTC: the last hidden state.
        head_weight: `[V, C]`.
        targets_BT: int64.
        z_loss: weight of the mean `logsumexp(logits)^2` added to the loss (arXiv 2204.02311).
        reduction: "mean", or "none" for `[B, T]` (without z_loss).
        chunked: use torch's chunked `linear_cross_entropy` (torch >= 2.13), which never holds all logits. It knows
            no z_loss and no second derivative.

    Raises:
        ValueError: if z_loss is asked for together with reduction "none" or chunked.
    """
    if z_loss and (chunked or reduction != "mean"):
        raise ValueError("z_loss needs all logits and reduction='mean': leave out chunked and reduction='none'")
    x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
    if chunked and reduction == "mean":
        options = nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
        return F.linear_cross_entropy(x_NC, head_weight, targets_N, options=options)  # pyright: ignore[reportAttributeAccessIssue]
    logits_NV = F.linear(x_NC, head_weight)
    points.output("logits", logits_NV)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss = F.cross_entropy(logits_NV, targets_N, reduction=reduction)
    if z_loss:
        loss = loss + z_loss * logits_NV.logsumexp(-1).square().mean()
    return loss if reduction == "mean" else loss.view_as(targets_BT)


#: Whether this torch has the chunked loss.
HAS_CHUNKED_LOSS = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def block_eliminations(config: ModelConfig, index: int) -> frozenset[Site]:
    """The norms of block `index` that are not computed, because their readers make them superfluous."""
    norms = config.placement.layer(index, config.n_layers)
    joint = config.placement.joint_gate_up and norms.keys() >= {"gate", "up"}
    return superfluous_norms(norms, joint=joint) if config.eliminate_norms else frozenset()


def _group(norm: Norm, config: ModelConfig) -> int | None:
    return config.head_dim if norm.group == "head" else None


def _projection(
    in_features: int, out_features: int, norm: Norm | None, config: ModelConfig, device: torch.device | str | None
) -> nn.Linear:
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


def _norm(norm: Norm | None, config: ModelConfig, width: int, device: torch.device | str | None) -> nn.Module:
    """The norm of a site that is no projection; an absent one is the identity, which costs nothing."""
    if norm is None:
        return nn.Identity()
    width = config.head_dim if norm.shared_alpha else width
    return RMSNorm(width, norm.alpha(config.n_layers), norm.eps, device, group=_group(norm, config))
