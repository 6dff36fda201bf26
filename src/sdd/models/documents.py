"""Attention that stops at the end of a document, `allowed[t, s] = s <= t and document[t] == document[s]`.

A bool mask `[B, 1, T, T]` says it everywhere. It rules out flash attention, and with grouped heads a GPU then holds the
weights of all heads. So on a GPU the fused kernels of flex attention (arXiv 2412.05496) attend, and skip blocks of
`BLOCK` x `BLOCK` positions between documents. Either mask is made once for all blocks of the model, on the device, and
nothing waits for it.

Processes that share the tokens of a sequence (`sdd.parallel.context`) have the queries of some and the keys of all: the
rows of the mask at the positions of their queries.

Shape suffixes: B batch, T tokens, L queries, N blocks of tokens, M blocks of queries, H query heads, K key-value heads,
D head_dim.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from sdd import probe_points
from sdd.kernels.dispatch import HAS_TRITON, may_run

#: Bool `[B, 1, T, S]`, True where attention is allowed; or its blocks, for flex attention.
Mask = Tensor | BlockMask

#: Positions on each side of a block of flex attention.
BLOCK = 128
_SMALLEST_HEAD = 16  # of flex attention's kernels


def attention_mask(
    tokens_BT: Tensor, eos: int | None, head_dim: int, dtype: torch.dtype, positions_L: Tensor | None = None
) -> Mask:
    """The mask of attention within documents; EOS closes its document.

    Args:
        tokens_BT: int64.
        eos: the end-of-document token; None for one document a row.
        head_dim: of the model.
        dtype: of queries, keys and values.
        positions_L: the ascending positions of the queries; None for those of all tokens.
    """
    document_BT = torch.zeros_like(tokens_BT) if eos is None else documents(tokens_BT, eos)
    queries = tokens_BT.shape[1] if positions_L is None else len(positions_L)
    if tokens_BT.is_cuda and may_run() and flex_attends(queries, head_dim, dtype):
        return block_mask(document_BT, positions_L)
    return dense_mask(document_BT[:1] if eos is None else document_BT, positions_L)


def flex_attends(queries: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a GPU attends within documents by flex attention: what its kernels take, longer than one block."""
    return HAS_TRITON and queries > BLOCK and head_dim >= _SMALLEST_HEAD and dtype != torch.float64


def documents(tokens_BT: Tensor, eos: int) -> Tensor:
    """The number of each token's document in its row, from 0: int64 `[B, T]`. EOS belongs to the document it closes."""
    ends = tokens_BT == eos
    return ends.cumsum(-1) - ends.long()


def dense_mask(document_BT: Tensor, positions_L: Tensor | None = None) -> Tensor:
    """The mask itself, bool `[B, 1, T, T]`, or `[B, 1, L, T]` with the rows at these positions."""
    if positions_L is None:
        same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
        return same.tril()
    before = torch.arange(document_BT.shape[1], device=document_BT.device) <= positions_L[:, None]
    return before & (document_BT[:, None, positions_L, None] == document_BT[:, None, None, :])


def block_mask(document_BT: Tensor, positions_L: Tensor | None = None) -> BlockMask:
    """The mask as blocks, from the documents at their borders alone: no `[T, T]` tensor is made.

    Documents are numbered in order. So some token of block j stands in a document of a later block i if j's last
    document is i's first, or after it; and all of them stand in one document if i's last is j's first. A block of
    queries may lie in two pieces of a sequence; then some blocks are computed of which nothing is allowed.

    Args:
        document_BT: the number of each token's document.
        positions_L: the ascending positions of the queries; None for those of all tokens.
    """
    T = document_BT.shape[1]
    at_L = torch.arange(T, device=document_BT.device) if positions_L is None else positions_L
    queries_BL = document_BT if positions_L is None else document_BT[:, positions_L]
    first_BM, last_BM = _borders(queries_BL)
    first_BN, last_BN = _borders(document_BT)
    earliest_1M, latest_1M = _borders(at_L[None])
    M, N = first_BM.shape[1], first_BN.shape[1]
    start_N = BLOCK * torch.arange(N, device=document_BT.device)
    some = (first_BM[:, :, None] <= last_BN[:, None, :]) & (start_N <= latest_1M[..., None])
    every = (last_BM[:, :, None] == first_BN[:, None, :]) & (start_N + BLOCK <= earliest_1M[..., None])
    if len(at_L) % BLOCK:
        every &= torch.arange(M, device=document_BT.device)[:, None] < M - 1  # the last rows are not all there

    def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        at = t if positions_L is None else positions_L[t]
        return (s <= at) & (document_BT[b, at] == document_BT[b, s])

    return BlockMask.from_kv_blocks(
        *_indices(some & ~every), *_indices(every), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(len(at_L), T)
    )


def _borders(values_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last value of each block of a row, `[B, N]` both; the last block may be shorter."""
    B, T = values_BT.shape
    N = -(-T // BLOCK)
    padding = values_BT[:, -1:].expand(B, N * BLOCK - T)
    borders_BNP = torch.cat([values_BT, padding], 1).unflatten(1, (N, BLOCK))
    return borders_BNP[..., 0], borders_BNP[..., -1]


def _indices(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, int32 `[B, 1, N]`, and their columns, before all others, `[B, 1, N, N]`."""
    marked = blocks_BNN[:, None].int()
    columns = marked.argsort(dim=-1, descending=True, stable=True)
    return marked.sum(-1, dtype=torch.int32), columns.int()


def as_dense(mask: BlockMask) -> Tensor:
    """The mask that the blocks stand for, bool `[B, 1, T, T]`."""
    B, _, T, S = mask.shape
    return create_mask(mask.mask_mod, B, 1, T, S, mask.kv_num_blocks.device)


def attend_in_blocks(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: BlockMask) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` by flex attention, `[B, H, T, D]`."""
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": q_BHTD.shape[1] != k_BKTD.shape[1]}
    if torch.compiler.is_compiling():
        return flex_attention(q_BHTD, k_BKTD, v_BKTD, **options)
    if not probe_points.recording():
        return _compiled()(q_BHTD, k_BKTD, v_BKTD, **options)
    with torch.compiler.set_stance("default"):  # a probe runs the model eagerly, but this operation is slow so
        return _compiled()(q_BHTD, k_BKTD, v_BKTD, **options)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)  # importing torch's compiler takes seconds
