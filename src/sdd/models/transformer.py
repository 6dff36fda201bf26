"""The language model: embedding, blocks, head and loss.

Shape suffixes: B batch, T tokens, C d_model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdd import functional as sdd_F
from sdd import probe_points
from sdd.kernels import use
from sdd.models.config import ModelConfig
from sdd.models.documents import Mask, attention_mask
from sdd.models.init import init_weights
from sdd.models.kv_cache import KVCache
from sdd.models.lean import LeanBlock
from sdd.models.moe import Routing, auxiliary_losses
from sdd.models.sites import norm_at, scale_at
from sdd.models.token_split import ALL_TOKENS
from sdd.norm_precision import statistics_in
from sdd.parameters import whole


class TrainingLoss(NamedTuple):
    """The loss of a training step, and its parts.

    Attributes:
        total: with gradient.
        cross_entropy: `total` without the z-loss and the auxiliary losses of a mixture of experts, detached.
        routing: of all layers, detached; None of a dense model, and in evaluation mode.
    """

    total: Tensor
    cross_entropy: Tensor
    routing: Routing | None


class LanguageModel(nn.Module):
    """A decoder-only language model; where its norms stand is `config.placement`.

    Args:
        config: the shape and the placement.
        device: where parameters are made; on "meta" they have no storage and are not drawn (call `to_empty` and
            `init_weights` later).

    Attributes:
        checkpoint_blocks: recompute each block's activations in the backward pass instead of keeping them.
        chunked_loss: compute the loss without ever holding all logits, if this torch can (see `cross_entropy`).
        sum_counts: sums a tensor over the processes that train a mixture of experts together; None for one process.
        split: how the processes that compute one loss together share the tokens of a sequence.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.config = config
        self.checkpoint_blocks = False
        self.chunked_loss = False
        self.sum_counts: Callable[[Tensor], Tensor] | None = None
        self.split = ALL_TOKENS
        # Built without storage first: weights are then drawn once, and alike whether or not the model stays on "meta".
        self.embed = nn.Embedding(config.vocab_size, config.d_model, device="meta")
        self.embed_norm = norm_at(config.placement.norms.get("embed"), config, "meta")
        self.blocks = nn.ModuleList(LeanBlock(config, index, "meta") for index in range(config.n_layers))
        self.final_norm = norm_at(config.placement.norms.get("final"), config, "meta")
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False, device="meta")
        )
        self.logit_scale = scale_at("logits", config.vocab_size, config, "meta")
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
        init_weights(self, self.config)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        document_eos: int | None = None,
        z_loss: float = 0.0,
        reduction: str = "mean",
        cache: KVCache | None = None,
        detailed: bool = False,
    ) -> Tensor | TrainingLoss:
        """Logits `[B, T, V]`, or the loss if targets are given.

        Args:
            tokens_BT: int64 `[B, T]`, T at most `config.context`.
            targets_BT: int64 `[B, T]`, the token after each.
            document_eos: the end-of-document token; if given, attention does not cross it.
            z_loss: weight of `logsumexp(logits)^2` (arXiv 2204.02311) added to the cross-entropy.
            reduction: "mean" or "none" (`[B, T]`); z_loss needs "mean".
            cache: the tokens come after those that it holds, and it holds them too afterwards.
            detailed: return the loss as a `TrainingLoss`; needs "mean".

        Returns:
            The logits, or cross-entropy in nats a token, in at least float32. In training mode, the mean has the
            auxiliary losses of a mixture of experts in it.

        Raises:
            ValueError: if the sequence is longer than the context, or document_eos is given with a cache or with ring
                attention.
        """
        if cache is not None and document_eos is not None:
            raise ValueError("document_eos needs all tokens at once: leave out document_eos or cache")
        T = tokens_BT.shape[1] + (max(cache.lengths) if cache is not None else 0)
        if self.config.context < T:
            raise ValueError(f"a sequence of {T} tokens was given, the model's context is {self.config.context}")
        layers: list[Routing] = []
        x_BTC = self._own_hidden(tokens_BT, document_eos, cache, layers)
        if targets_BT is None:
            logits_BTV = F.linear(x_BTC, self.head_weight)
            probe_points.output("logits", logits_BTV)
            return self.split.joined(logits_BTV)
        targets_BT = self.split.own(targets_BT)
        loss, penalty = cross_entropy(
            x_BTC, self.head_weight, targets_BT, z_loss=z_loss, reduction=reduction, chunked=self.chunked_loss
        )
        loss = self.split.mean(loss) if reduction == "mean" else self.split.joined(loss)
        total, routing = loss if penalty is None else loss + self.split.mean(penalty), None
        if self.config.moe is not None and self.training and reduction == "mean":
            auxiliary, routing = auxiliary_losses(layers, self.config.moe, self.sum_counts, self.split.mean)
            total = total + auxiliary
        return TrainingLoss(total, loss.detach(), routing) if detailed else total

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """The last hidden state, which the head reads: `[B, T]` to `[B, T, C]`.

        Args:
            tokens_BT: int64.
            cache: the tokens come after those that it holds.
        """
        return self.split.joined(self._own_hidden(tokens_BT, None, cache, []))

    def _own_hidden(
        self, tokens_BT: Tensor, document_eos: int | None, cache: KVCache | None, layers: list[Routing]
    ) -> Tensor:
        """`hidden` of this process's tokens; `layers` receives the routing of each mixture of experts."""
        self.split.begin(tokens_BT.shape[1], cache is not None)
        positions, mask = self._attended(tokens_BT, document_eos) if cache is None else cache.grow(tokens_BT)
        if self.config.statistics == "float32":
            return self._hidden(tokens_BT, positions, mask, cache, layers)
        with use("composed"), statistics_in(torch.bfloat16):
            return self._hidden(tokens_BT, positions, mask, cache, layers)

    def _attended(self, tokens_BT: Tensor, document_eos: int | None) -> tuple[slice | Tensor, Mask | None]:
        """The positions of the tokens whose queries this process has, and their mask; None for causal."""
        positions = self.split.positions(tokens_BT.shape[1], tokens_BT.device)
        if self.split.attends and document_eos is not None:
            raise ValueError("document_eos needs a mask, and ring attention has none")
        if document_eos is None and (positions is None or self.split.attends):
            return slice(tokens_BT.shape[1]) if positions is None else positions, None
        dtype = sdd_F.product_dtype(self.embed.weight)
        mask = attention_mask(tokens_BT, document_eos, self.config.head_dim, dtype, positions)
        return slice(tokens_BT.shape[1]) if positions is None else positions, mask

    def _hidden(
        self,
        tokens_BT: Tensor,
        positions: slice | Tensor,
        mask: Mask | None,
        cache: KVCache | None,
        layers: list[Routing],
    ) -> Tensor:
        rope = (self.rope_cos[positions], self.rope_sin[positions])
        x_BTC = self.embed_norm(self.embed(self.split.own(tokens_BT)))
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                x_BTC, routing = block(x_BTC, rope, mask, partial(cache.write, layer))
            elif self.checkpoint_blocks and torch.is_grad_enabled():
                x_BTC, routing = checkpoint(block, x_BTC, rope, mask, use_reentrant=False)
            else:
                x_BTC, routing = block(x_BTC, rope, mask)
            if routing is not None:
                layers.append(routing)
        return self.final_norm(x_BTC)

    @property
    def head_weight(self) -> Tensor:
        """The matrix that turns the last hidden state into logits, `[V, C]`; a scale of the logits is in its rows."""
        weight_VC = whole(self.embed.weight if self.head is None else self.head.weight)
        if self.logit_scale is None:
            return weight_VC
        return (self.logit_scale()[:, None] * weight_VC).to(weight_VC.dtype)


def cross_entropy(
    x_BTC: Tensor,
    head_weight: Tensor,
    targets_BT: Tensor,
    *,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunked: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of `softmax(head x)` in nats a token, and the z-loss, both in at least float32.

    Args:
        x_BTC: the last hidden state.
        head_weight: `[V, C]`.
        targets_BT: int64.
        z_loss: weight of the z-loss, the mean of `logsumexp(logits)^2` (arXiv 2204.02311).
        reduction: "mean", or "none" for `[B, T]` (without z_loss).
        chunked: use torch's chunked `linear_cross_entropy` (torch >= 2.13), which never holds all logits. It has
            neither z_loss nor a second derivative.

    Returns:
        The cross-entropy, and the z-loss times its weight, which a training step adds; None where the weight is 0.

    Raises:
        ValueError: if z_loss is given with reduction "none" or with chunked.
    """
    if z_loss and (chunked or reduction != "mean"):
        raise ValueError("z_loss needs all logits and reduction='mean': leave out chunked and reduction='none'")
    x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
    if chunked and reduction == "mean":
        options = nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
        loss = F.linear_cross_entropy(x_NC, head_weight, targets_N, options=options)  # pyright: ignore[reportAttributeAccessIssue]
        return loss, None
    logits_NV = F.linear(x_NC, head_weight)
    probe_points.output("logits", logits_NV)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss = F.cross_entropy(logits_NV, targets_N, reduction=reduction)
    penalty = z_loss * logits_NV.logsumexp(-1).square().mean() if z_loss else None
    return (loss if reduction == "mean" else loss.view_as(targets_BT)), penalty


#: Whether this torch has the chunked loss.
HAS_CHUNKED_LOSS = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")
