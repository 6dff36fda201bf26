"""How the processes that compute one loss together share the tokens of a sequence; a single process has all."""

from torch import Tensor


class TokenSplit:
    """All tokens on one process; a subclass shares them (`sdd.parallel`).

    The model asks for its own tokens where the residual stream begins, and joins what comes out at its end.
    """

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


#: One process has all tokens.
ALL_TOKENS = TokenSplit()
