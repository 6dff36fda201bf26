"""Statistics of attention computed from queries and keys themselves, whatever kernel attends."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Sampled query positions a sequence (evenly spread up to the last), and sampled sequences a forward pass.
ROWS = 16
SEQUENCES = 4

#: Receives query, key, attn_mask, is_causal and scale of a call.
Watcher = Callable[[Tensor, Tensor, Tensor | None, bool, float | None], None]

_attention = F.scaled_dot_product_attention


def sampled_attention(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit and entropy of the attention weights `p = softmax(s q k^T + mask)` on a sample of its rows.

    The sample is `ROWS` query positions `T*i/ROWS - 1`, i = 1..ROWS, of the first `SEQUENCES` sequences, all heads.

    Args:
        q: `[..., T, D]`, up to four dimensions: batch and heads before these two.
        k: `[..., S, D]`; with fewer heads than q, each serves a group of them.
        mask: bool (True where attended) or added to the logits, broadcast to `[..., T, S]`; or None.
        causal: position t attends to positions up to t only.
        scale: s; None for `1/sqrt(D)`.

    Returns:
        The largest logit; the sum of the rows' entropies `-sum(p ln p)` in nats; the number of rows, without those
        that may attend to nothing. All are float32 scalars.
    """
    q, k = (_four(t.detach())[:SEQUENCES] for t in (q, k))
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    n_rows = min(ROWS, T)
    rows = torch.arange(1, n_rows + 1, device=q.device) * T // n_rows - 1
    logits = _products(q.index_select(-2, rows).float(), k.float()) * (D**-0.5 if scale is None else scale)
    if causal:
        logits = logits.masked_fill(torch.arange(S, device=q.device) > rows[:, None], -torch.inf)
    if mask is not None:
        mask = _four(mask.detach())[:SEQUENCES]
        mask = mask.expand(*mask.shape[:-2], T, S).index_select(-2, rows)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    open_rows = logits.amax(-1) != -torch.inf
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return logits.amax(), entropy.where(open_rows, 0.0).sum(), open_rows.float().sum()


class AttentionCalls(TorchFunctionMode):
    """Show a watcher every call of `scaled_dot_product_attention` before it is made, while the mode is on."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass every call on."""
        kwargs = kwargs or {}
        if func is _attention:
            return self._shown(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # a mode does not see the calls inside this function
            F.scaled_dot_product_attention = self._shown
            try:
                return func(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = _attention
        return func(*args, **kwargs)

    def _shown(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **others: Any
    ) -> Tensor:
        self._watcher(query, key, attn_mask, is_causal, others.get("scale"))
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, **others)


def _four(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.ndim)] if tensor.ndim < 4 else tensor


def _products(q: Tensor, k: Tensor) -> Tensor:
    """`q k^T`, `[B, H, R, S]`, without repeating the keys of a group of heads."""
    B, H, R, _ = q.shape
    K, S = k.shape[1], k.shape[2]
    return (q.reshape(B, K, H // K * R, -1) @ k.transpose(-1, -2)).view(B, H, R, S)
