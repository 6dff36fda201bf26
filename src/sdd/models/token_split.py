"""How the processes that compute one loss together share the tokens of a sequence; a single process has all."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class TokenSplit:
    """All tokens on one process; a subclass shares them (`sdd.parallel`).

    The model asks for its own tokens where the residual stream begins, and joins what comes out at its end. In between,
    attention has the queries of some tokens and the keys and values of all; or the processes attend together.
    """

    @property
    def attends(self) -> bool:
        """Whether `attend` computes the attention of the forward pass under way."""
        return False

    def begin(self, n_tokens: int, cached: bool) -> None:
        """Decide how a forward pass shares its tokens.

        Args:
            n_tokens: tokens of each row.
            cached: whether they come after others, whose keys and values are kept.
        """

    def own(self, tokens_BT: Tensor) -> Tensor:
        """The tokens of this process, from those of all."""
        return tokens_BT

    def joined(self, x_BT: Tensor) -> Tensor:
        """`[B, T, ...]` of all tokens, from those of each process; afterwards the same on every process."""
        return x_BT

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all tokens, from that over the tokens of each process."""
        return value

    def positions(self, n_tokens: int, device: torch.device) -> Tensor | None:
        """The positions, int64 `[T]`, of the tokens whose queries this process has; None for all in their order."""

    def attended(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens `[B, K, S, D]`, from those of the tokens whose queries this process has."""
        return k_BKTD, v_BKTD

    def attend(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Causal `softmax(q k^T / sqrt(D)) v` of the tokens of all processes, `[B, H, T, D]` of those of this one."""
        grouped = q_BHTD.shape[1] != k_BKTD.shape[1]
        return scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=grouped)

    def all_queries(self, x_BHTD: Tensor) -> Tensor:
        """A row for each token, dimension 2, from those of the tokens whose queries this process has; no gradient."""
        return x_BHTD


#: One process has all tokens.
ALL_TOKENS = TokenSplit()
