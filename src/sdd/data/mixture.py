"""Mix several sources in given shares: the source of sample i is computed from i alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sdd.data.token_file import TokenFile, TokenInfo
from sdd.errors import UserError

LONGEST_CYCLE = 2**16
_VALIDATION_TOKENS = 2**24


@dataclass(frozen=True, eq=False)
class MixturePart:
    """One source of a mixture; data that are no mixture are a single part.

    Attributes:
        name: of the source, for messages.
        files: its token files. Each part has its own order of windows and its own epochs.
        weight: its share of the tokens, relative to the other parts'.
    """

    name: str
    files: tuple[TokenFile, ...]
    weight: Fraction = Fraction(1)


class Interleaving:
    """Assign sample i to a source, and to a sample of that source: a pure function of the weights and i.

    A cycle of `length` samples, in which each source has a whole number of places, repeats for ever. It follows
    Tijdeman (1980), "The chairman assignment problem": among the first n samples, the number of those from a source
    with share w differs from w * n by less than one; so among any n consecutive samples by less than two.

    Args:
        weights: of the sources, positive. Shares that have a common denominator up to `LONGEST_CYCLE` are kept
            exactly; others are rounded to multiples of 1 / LONGEST_CYCLE.

    Attributes:
        counts: samples of each source in a cycle, int64 [sources].

    Raises:
        UserError: a share that rounds to zero.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self.counts = _cycle_counts(weights)
        self._sources = _tijdeman(self.counts.tolist())
        self._before = np.empty(self.length, np.int64)  # samples of the same source earlier in the cycle
        for source, count in enumerate(self.counts):
            self._before[self._sources == source] = np.arange(count)

    @property
    def length(self) -> int:
        """Samples of a cycle."""
        return int(self.counts.sum())

    @property
    def shares(self) -> np.ndarray:
        """Share of each source, float64 [sources]."""
        return self.counts / self.length

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and number within that source of each sample, int64."""
        cycle, place = np.divmod(samples, self.length)
        sources = self._sources[place]
        return sources, cycle * self.counts[sources] + self._before[place]

    def taken(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples come from each source, int64 [sources]."""
        cycles, rest = divmod(samples, self.length)
        return cycles * self.counts + np.bincount(self._sources[:rest], minlength=len(self.counts))


def _cycle_counts(weights: Sequence[Fraction]) -> np.ndarray:
    shares = [weight / sum(weights) for weight in weights]
    length = min(math.lcm(*(share.denominator for share in shares)), LONGEST_CYCLE)
    counts = [math.floor(share * length) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * length)
    for k in by_remainder[: length - sum(counts)]:
        counts[k] += 1
    if not all(counts):
        raise UserError(
            f"weight number {counts.index(0) + 1} of the mixture is {float(min(shares)):.1e} of the whole: "
            f"at least 1/{LONGEST_CYCLE:,} is needed for a sample now and then"
        )
    return np.array(counts, np.int64)


def _tijdeman(counts: list[int]) -> np.ndarray:
    """The cycle: each place goes to the source whose next sample is due first, of those that may take the place."""
    length, slack = sum(counts), 2 * len(counts) - 2
    given = [0] * len(counts)
    cycle = np.zeros(length, np.int64)
    for place in range(length if slack else 0):  # a single source has them all
        best, due_first = 0, math.inf
        for k, count in enumerate(counts):
            owed = (count * (place + 1) - length * given[k]) * slack
            due = (length * (slack - 1) - owed) / count
            if owed >= length and due < due_first:
                best, due_first = k, due
        cycle[place] = best
        given[best] += 1
    return cycle


def mixed_validation(validations: Sequence[TokenFile], weights: Sequence[Fraction], context: int) -> TokenFile:
    """Held-out tokens in the shares of the mixture, as many as the scarcest source allows, in memory.

    The windows are the first ones of each source, at most 2**24 tokens in all. In these shares the loss on them is the
    loss on the mixture. The result has no byte count, and the path of the first source.
    """
    shares = [float(weight / sum(weights)) for weight in weights]
    windows = [file.n_windows(context) for file in validations]
    total = min(*(n / share for n, share in zip(windows, shares, strict=True)), _VALIDATION_TOKENS / context)
    taken = [max(1, math.floor(total * share)) * context for share in shares]
    tokens = [file.read([0], n)[0].astype(np.uint32) for file, n in zip(validations, taken, strict=True)]
    first, last = validations[0], validations[-1]
    tokens.append(last.read([taken[-1]], 1)[0].astype(np.uint32))  # the target of the last window's last token
    mixed = np.concatenate(tokens)
    info = TokenInfo(dtype="uint32", n_tokens=len(mixed), eos=first.eos, vocab_size=first.vocab_size)
    return TokenFile(first.path, mixed, info)
