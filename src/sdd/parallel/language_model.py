"""Tensor parallelism for our language models: every matrix of the blocks cut, and the tokens in between.

    tokens      each process looks up its own T/P tokens of a sequence, in the whole embedding
    q k v       by rows: all T tokens are gathered before them, once; a process has the heads that its rows give
    gate up     likewise: a process has F/P features
    o down      by columns: the summands are added up, and each process keeps the sum of its own tokens (reduce-scatter)
    norms       attn_out, ffn_out, and all norms of the residual stream see whole rows of own tokens: no exchange.
                q, k, v and ctx by heads: none. q, k, v, ctx, gate and up of full width: `sdd.parallel.norms`
    head        each process computes the logits and the loss of its own tokens, with the whole head

    mixture     each process routes its own tokens, and the experts are shared, see `sdd.parallel.experts`

Embedding, head and routers are kept in parts, and gathered where they are used. A gathered matrix is smaller than the
logits of a batch, and every loss (chunked, z-loss, tied embeddings, scaled logits) stays what it is.

Tokens that do not divide by P, and those after a cache, are on all processes instead: for generation, without
gradients.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sdd.functional import cast_once
from sdd.models import LanguageModel
from sdd.models.block import Attention, Block, FeedForward
from sdd.models.moe import MoE
from sdd.models.token_split import TokenSplit
from sdd.nn import LearnedScale, RMSNorm
from sdd.parallel.exchange import gathered, joined, part_of, scattered, summed
from sdd.parallel.layers import CutEmbedding, CutFeedForward, CutRouter, CutScale, cut_matrix
from sdd.parallel.styles import cut_colwise, cut_norm, cut_rowwise


def parallelize(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """Cut a language model, in place; it takes the same tokens on every process and gives the same results.

    The experts of a mixture are left whole; `sdd.parallel.experts.cut_experts` shares them.

    Gradients of matrices (DTensors) are complete after the backward pass. Those of vectors (alphas, scales of norms)
    are summands: add them up over the processes of the mesh, as `sdd train` does for all at once.

    Args:
        model: with weights or on "meta".
        mesh: of the processes, one dimension; must divide the heads, the key-value heads and d_ff, see
            `sdd.parallel.layout.problems`.

    Raises:
        UserError: if it does not divide them.
    """
    split = StreamSplit(mesh)
    model.split = split
    _become(model.embed, CutEmbedding, mesh)
    cut_matrix(model.embed, mesh, 0)
    if model.head is not None:
        cut_matrix(model.head, mesh, 0)
    for block in model.blocks:
        assert isinstance(block, Block)
        _cut_attention(block.attn, split)
        if isinstance(block.ffn, MoE):
            _cut_mixture(block.ffn, split)
        else:
            _cut_feed_forward(block.ffn, split)
    return model


class StreamSplit(TokenSplit):
    """Each process has T/P consecutive tokens of the residual stream.

    Args:
        mesh: of the P processes.

    Attributes:
        spread: whether the forward pass under way does so; else every process has all tokens.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.spread = True

    def begin(self, n_tokens: int, cached: bool) -> None:
        """Spread the tokens if they divide; see `TokenSplit.begin`.

        Raises:
            ValueError: if they do not, and gradients are asked for.
        """
        self.spread = not cached and n_tokens % self.mesh.size() == 0
        if not self.spread and torch.is_grad_enabled():
            raise ValueError(f"{self.mesh.size()} processes do not divide {n_tokens} tokens: call it under no_grad")

    def own(self, tokens_BT: Tensor) -> Tensor:
        """This process's tokens."""
        return part_of(tokens_BT, self.mesh, 1) if self.spread else tokens_BT

    def joined(self, x_BT: Tensor) -> Tensor:
        """All tokens."""
        return joined(x_BT, self.mesh, 1) if self.spread else x_BT

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return summed(value, self.mesh) / self.mesh.size() if self.spread else value

    def gather(self, x_BTC: Tensor) -> Tensor:
        """All tokens, before a product by rows."""
        return gathered(cast_once(x_BTC), self.mesh, 1) if self.spread else x_BTC

    def add(self, x_BTC: Tensor) -> Tensor:
        """The sum of own tokens, after a product by columns."""
        return scattered(x_BTC, self.mesh, 1) if self.spread else summed(x_BTC, self.mesh)


def _cut_attention(attn: Attention, split: StreamSplit) -> None:
    mesh = split.mesh
    for layer in (attn.q_proj, attn.k_proj, attn.v_proj):
        cut_colwise(layer, mesh, _as_it_is, adds_up=False)
    if isinstance(attn.ctx, RMSNorm):
        cut_norm(attn.ctx, mesh, adds_up=False)
    cut_rowwise(attn.o_proj, mesh, split.add, adds_up=False)
    _cut_scale(attn.qk_scale, mesh)
    attn.register_forward_pre_hook(partial(_gather_first, split))


def _cut_feed_forward(ffn: FeedForward, split: StreamSplit) -> None:
    mesh = split.mesh
    for layer in (ffn.gate_proj, ffn.up_proj):
        cut_colwise(layer, mesh, _as_it_is, adds_up=False)
    cut_rowwise(ffn.down_proj, mesh, split.add, adds_up=False)
    _cut_scale(ffn.gate_scale, mesh)
    _cut_scale(ffn.up_scale, mesh)
    ffn.__class__ = CutFeedForward
    ffn.register_forward_pre_hook(partial(_gather_first, split))


def _cut_mixture(moe: MoE, split: StreamSplit) -> None:
    """Each process routes its own tokens; the shared network is cut like that of a dense model."""
    _become(moe.router, CutRouter, split.mesh)
    cut_matrix(moe.router, split.mesh, 0)
    if isinstance(moe.shared, FeedForward):
        _cut_feed_forward(moe.shared, split)


def _cut_scale(scale: LearnedScale | None, mesh: DeviceMesh) -> None:
    if scale is not None:
        _become(scale, CutScale, mesh)


def _become(module: nn.Module, kind: type[nn.Module], mesh: DeviceMesh) -> None:
    vars(module).update(mesh=mesh, adds_up=False)
    object.__setattr__(module, "__class__", kind)


def _gather_first(split: StreamSplit, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook: the first argument with all tokens."""
    return (split.gather(args[0]), *args[1:])


def _as_it_is(x: Tensor) -> Tensor:
    return x
