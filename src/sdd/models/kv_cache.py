"""The keys and values of the tokens that a model has read, so that each is computed once.

Shape suffixes: B rows, T new tokens, S tokens held, K key-value heads, D head_dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdd.models.config import ModelConfig

#: Takes the keys and values of new tokens, `[B, K, T, D]`; gives those of all tokens so far, `[B, K, S, D]`.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KVCache:
    """Keys (normed and rotated) and values of each block, for reading on without gradients.

    Calling the model with a cache reads tokens after those that it holds:

        cache = KVCache(model.config, rows=len(prompt_BT))
        logits_BTV = model(prompt_BT, cache=cache)
        logits_B1V = model(next_B1, cache=cache)

    Rows may hold different numbers of tokens. A row's tokens stand at positions 0, 1, ... whatever the others hold, so
    that a row is computed as it would be alone.

    Args:
        config: the model's.
        rows: B.
        length: the largest number of tokens that a row will hold; None for the model's context.

    Attributes:
        keys: a tensor `[B, K, length, D]` for each block, allocated when the first tokens are read, in the dtype in
            which the model computes (autocast's, where it is on).
        values: the same.
        lengths: how many tokens each row holds; lowering one forgets that row's last tokens.
    """

    def __init__(self, config: ModelConfig, rows: int, length: int | None = None) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths = [0] * rows
        self._length = config.context if length is None else length
        self._positions: slice | Tensor = slice(0)

    def grow(self, tokens_BT: Tensor) -> tuple[slice | Tensor, Tensor | None]:
        """Make room for new tokens in each row, which the blocks fill by `write`.

        Returns:
            The new tokens' positions, which index RoPE's tables: a slice, or int64 `[B, 1, T]`. And the attention mask,
            bool `[B, 1, T, S]`, or None where plain causal attention does: for one new token in each row, or for the
            first tokens of all rows.

        Raises:
            ValueError: if the cache has another number of rows, or no room.
        """
        (B, T), before = tokens_BT.shape, self.lengths
        if len(before) != B:
            raise ValueError(f"tokens of {B} rows were given, the cache has {len(before)} rows")
        if max(before) + T > self._length:
            raise ValueError(f"{T} tokens after {max(before)} were given, the cache has room for {self._length}")
        self.lengths = [length + T for length in before]
        if len(set(before)) == 1 and (T == 1 or before[0] == 0):
            self._positions = slice(before[0], before[0] + T)
            return self._positions, None
        starts_B1 = torch.tensor(before, device=tokens_BT.device)[:, None]
        self._positions = starts_B1 + torch.arange(T, device=tokens_BT.device)
        positions_B1T = self._positions[:, None]
        held_S = torch.arange(max(self.lengths), device=tokens_BT.device)
        return positions_B1T, held_S <= positions_B1T[..., None]

    def write(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's keys and values where `grow` made room, and return all so far, `[B, K, S, D]`."""
        if layer == len(self.keys):
            B, K, _, D = k_BKTD.shape
            self.keys.append(k_BKTD.new_zeros(B, K, self._length, D))
            self.values.append(v_BKTD.new_zeros(B, K, self._length, D))
        keys, values, at = self.keys[layer], self.values[layer], self._positions
        if isinstance(at, slice):
            keys[:, :, at], values[:, :, at] = k_BKTD, v_BKTD
        else:
            rows_B1 = torch.arange(len(at), device=at.device)[:, None]
            keys[rows_B1, :, at], values[rows_B1, :, at] = k_BKTD.transpose(1, 2), v_BKTD.transpose(1, 2)
        held = max(self.lengths)
        return keys[:, :, :held], values[:, :, :held]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be left out or repeated."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.keys = [keys[list(rows)] for keys in self.keys]
        self.values = [values[list(rows)] for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]

    def put(self, rows: Sequence[int], other: "KVCache") -> None:
        """Replace the contents of these rows by those of another cache."""
        held = max(other.lengths)
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=bool(held)):
            mine[list(rows), :, :held] = theirs[:, :, :held]
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length
