"""Context parallelism: each process has a part of every sequence, and attends to all of it.

A sequence of T tokens is cut into 2P equal pieces, and process i of P has the pieces i and 2P-1-i, in that order. A
token attends to those before it, so an early and a late piece together are as much work on every process.

    stream      each process has its T/P tokens: embedding, norms, feed-forward networks, experts, head and loss
    q           of its own tokens, rotated by their positions in the sequence
    k v         of its own tokens, rotated, then gathered over the processes and put in order, once a layer
    mask        the rows of the causal or document mask at the positions of its queries

The backward pass adds up the gradients of k and v, and each process gets that of its own tokens (reduce-scatter). With
tensor parallelism, the processes of a tensor group share the T/P tokens in turn. Instead of gathering, the processes
may attend by torch's ring, without a mask (`sdd.parallel.ring`).

Tokens that 2P does not divide, and those after a cache, are on all processes instead: for generation, without
gradients.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sdd.models import LanguageModel
from sdd.models.block import Block
from sdd.models.token_split import TokenSplit
from sdd.parallel.exchange import gathered, joined, summed
from sdd.parallel.ring import RingAttention


def share_sequences(model: LanguageModel, mesh: DeviceMesh, *, ring: bool = False) -> LanguageModel:
    """Share the sequences of a model, in place; it takes the same tokens on every process and gives the same results.

    Gradients of parameters are summands: add them up over the processes of the mesh, as `sdd train` does.

    Args:
        model: with weights or on "meta"; may be cut by `parallelize` before. The `sum_counts` of a mixture must sum
            over these processes too.
        mesh: of the P processes, one dimension.
        ring: attend by torch's ring; see `sdd.parallel.ring`.

    Raises:
        UserError: if this torch has no ring.
    """
    model.split = ContextSplit(mesh, model.split, RingAttention(mesh) if ring else None)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.split = model.split
    return model


class ContextSplit(TokenSplit):
    """Each process has two pieces of every sequence, see the head of this module.

    Args:
        mesh: of the P processes.
        within: how the tokens of one process are shared in turn.
        ring: attends over the processes; None to gather keys and values.

    Attributes:
        spread: whether the forward pass under way does so; else every process has all tokens.
    """

    def __init__(self, mesh: DeviceMesh, within: TokenSplit, ring: RingAttention | None = None) -> None:
        self.mesh, self.within, self.ring = mesh, within, ring
        self.spread = True

    @property
    def attends(self) -> bool:
        """Whether the ring attends: if there is one, and the tokens are spread."""
        return self.ring is not None and self.spread

    def begin(self, n_tokens: int, cached: bool) -> None:
        """Spread the tokens if they divide; see `TokenSplit.begin`.

        Raises:
            ValueError: if they do not, and gradients are asked for.
        """
        P = self.mesh.size()
        self.spread = not cached and n_tokens % (2 * P) == 0
        if not self.spread and torch.is_grad_enabled():
            raise ValueError(f"2 * {P} processes do not divide {n_tokens} tokens: call it under no_grad")
        self.within.begin(n_tokens // P if self.spread else n_tokens, cached)

    def own(self, tokens_BT: Tensor) -> Tensor:
        """This process's tokens."""
        return self.within.own(self._pieces(tokens_BT, 1) if self.spread else tokens_BT)

    def joined(self, x_BT: Tensor) -> Tensor:
        """All tokens, in order."""
        x_BT = self.within.joined(x_BT)
        return self._in_order(joined(x_BT, self.mesh, 1), 1) if self.spread else x_BT

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.within.mean(summed(value, self.mesh) / self.mesh.size() if self.spread else value)

    def positions(self, n_tokens: int, device: torch.device) -> Tensor | None:
        """Where the two pieces stand."""
        return self._pieces(torch.arange(n_tokens, device=device), 0) if self.spread else None

    def attended(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, by one exchange."""
        if not self.spread:
            return k_BKTD, v_BKTD
        both = self._in_order(gathered(torch.cat([k_BKTD, v_BKTD], 1), self.mesh, 2), 2)
        k_BKSD, v_BKSD = both.chunk(2, 1)
        return k_BKSD, v_BKSD

    def attend(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Causal attention by the ring, uncompiled (a graph break)."""
        assert self.ring is not None
        return torch.compiler.disable(self.ring)(q_BHTD, k_BKTD, v_BKTD)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def all_queries(self, x_BHTD: Tensor) -> Tensor:
        """One row for each token, in order."""
        if not self.spread:
            return x_BHTD
        x = x_BHTD.byte() if x_BHTD.dtype == torch.bool else x_BHTD
        return self._in_order(joined(x.detach(), self.mesh, 2), 2).to(x_BHTD.dtype)

    def _pieces(self, x: Tensor, dim: int) -> Tensor:
        """The two pieces of this process, from a tensor of all tokens."""
        pieces, i = x.chunk(2 * self.mesh.size(), dim), self.mesh.get_local_rank()
        return torch.cat([pieces[i], pieces[-1 - i]], dim)

    def _in_order(self, x: Tensor, dim: int) -> Tensor:
        """The pieces of all processes, which follow each other, in the order of the sequence."""
        pieces = x.chunk(2 * self.mesh.size(), dim)
        return torch.cat([*pieces[::2], *pieces[::-2]], dim)
