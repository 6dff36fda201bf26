"""The tokens of batch number s: a pure function of the data, the seed and s.

There is no state to save and no list of samples to shuffle: the order of an epoch is a pseudo-random permutation that
is computed where it is needed. So a run resumes from its step alone, and may split the same rows over any hardware.
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch

from sdd.data.mixture import Interleaving, MixturePart
from sdd.data.token_file import TokenFile, check_length
from sdd.errors import UserError

_ROUNDS = 8
_PART_KEYS = 2**63  # apart from the numbers of epochs


class Loader:
    """Batches of windows of `context` + 1 tokens.

    The files are cut into windows at stride `context`, so that every token but a file's first is a target once an
    epoch. Sample i of the run is window permutation(seed, i // n_windows)[i % n_windows]; batch b holds samples
    [b * batch_size, (b + 1) * batch_size). Every epoch visits each window exactly once.

    Of a mixture, sample i is sample j of a source, both given by `Interleaving`; each source has epochs and an order
    of its own.

    Args:
        files: the training data, token files or the parts of a mixture; windows do not reach from one file into
            another.
        batch_size: rows of the global batch.
        context: tokens of input in a row.
        seed: of the order, any integer.
        rank: which of `world_size` equal, consecutive blocks of the global batch's rows to return; all ranks'
            blocks in order are the batch that a single process sees.
        world_size: how many blocks.
        skipped: batch numbers that are passed over, each later step taking the next batch instead. Appending a batch
            not yet reached, or the current one, leaves all earlier steps as they were.

    Raises:
        UserError: no file of a part has one full window, or `world_size` does not divide `batch_size`.
    """

    def __init__(
        self,
        files: Sequence[TokenFile] | Sequence[MixturePart],
        batch_size: int,
        context: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        skipped: Sequence[int] = (),
    ) -> None:
        if rest := batch_size % world_size:
            raise UserError(
                f"a batch of {batch_size} rows does not divide among {world_size} processes that train on different "
                f"rows: give another number, or in a new run --data.batch_size {batch_size + world_size - rest}"
            )
        self.parts = _parts(files)
        self.files = [file for part in self.parts for file in part.files]
        self.batch_size = batch_size
        self.context = context
        self.seed = seed
        self._first_window = _starts([file.n_windows(context) for file in self.files])
        for part in self.parts:
            check_length(part.name, part.files, context)
        self._part_windows = [sum(file.n_windows(context) for file in part.files) for part in self.parts]
        self._part_start = _starts(self._part_windows)
        self._interleaving = Interleaving([part.weight for part in self.parts])
        rows = batch_size // world_size
        self._rows = np.arange(rank * rows, (rank + 1) * rows, dtype=np.int64)
        self.pass_over(skipped)

    def pass_over(self, skipped: Sequence[int]) -> None:
        """Replace the list of skipped batch numbers."""
        passed = np.unique(np.asarray(skipped, np.int64))
        self._passed = passed - np.arange(len(passed))  # as many batches are used before the skipped one

    @property
    def n_windows(self) -> int:
        """The number of windows; without a mixture, these are the samples of an epoch."""
        return int(self._first_window[-1])

    def epoch(self, step: int) -> float:
        """The number of samples before a step, as a multiple of the number of windows."""
        return self.batch_index(step) * self.batch_size / self.n_windows

    def describe(self, steps: int) -> list[str]:
        """One line for each source of a mixture: its share, and its epochs in a run of so many steps."""
        if len(self.parts) == 1:
            return []
        taken = self._interleaving.taken(self.batch_index(steps) * self.batch_size)
        shares = self._interleaving.shares
        return [
            f"{part.name}: {share:.2%} of the tokens, {n / windows:.2g} epochs"
            for part, share, n, windows in zip(self.parts, shares, taken, self._part_windows, strict=True)
        ]

    def batch_index(self, step: int) -> int:
        """The batch that a step takes: the step's own number, moved on by the skipped ones up to it."""
        return step + int(np.searchsorted(self._passed, step, side="right"))

    def windows(self, step: int) -> np.ndarray:
        """Numbers of the windows in this rank's rows at a step, int64 [batch_size / world_size]."""
        samples = self.batch_index(step) * self.batch_size + self._rows
        sources, numbers = self._interleaving.assign(samples)
        windows = np.empty_like(samples)
        for part in np.unique(sources).tolist():
            of_part = sources == part
            windows[of_part] = self._part_start[part] + self._visited(part, numbers[of_part])
        return windows

    def _visited(self, part: int, numbers: np.ndarray) -> np.ndarray:
        """The windows of a part that its samples with these numbers are."""
        seed = self.seed
        if len(self.parts) > 1:  # else two sources of the same size would go in step
            seed = int(_keys(seed, np.array([_PART_KEYS + part], np.uint64))[0])
        n_windows = self._part_windows[part]
        epochs, places = np.divmod(numbers, n_windows)
        windows = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            (key,) = _keys(seed, np.array([epoch]))
            windows[of_epoch] = permute(places[of_epoch], n_windows, int(key))
        return windows

    def batch(self, step: int) -> torch.Tensor:
        """This rank's rows of a step's batch.

        Returns:
            int64 [batch_size / world_size, context + 1]: input is [:, :-1], target [:, 1:].

        Raises:
            BadData: a token id that the file's vocabulary does not have, or a file that was cut off meanwhile.
        """
        windows = self.windows(step)
        which = np.searchsorted(self._first_window, windows, side="right") - 1
        starts = (windows - self._first_window[which]) * self.context
        batch = np.empty((len(windows), self.context + 1), np.int64)
        for index in np.unique(which):
            rows = which == index
            batch[rows] = self.files[index].read(starts[rows], self.context + 1)
        return torch.from_numpy(batch)


def _parts(files: Sequence[TokenFile] | Sequence[MixturePart]) -> list[MixturePart]:
    parts = [item for item in files if isinstance(item, MixturePart)]
    return parts or [MixturePart("the data", tuple(item for item in files if isinstance(item, TokenFile)))]


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def eval_windows(file: TokenFile, n: int | None, context: int) -> torch.Tensor:
    """Fixed windows spread evenly over a file, no token a target twice.

    Args:
        file: where from.
        n: how many; None, or more than there are, means all.
        context: tokens of input in a row.

    Returns:
        int64 [n, context + 1]: input is [:, :-1], target [:, 1:].

    Raises:
        UserError: the file has no full window.
        BadData: a token id outside its vocabulary.
    """
    check_length(str(file.path), [file], context)
    count = file.n_windows(context)
    n = count if n is None else min(n, count)
    return torch.from_numpy(file.read(np.arange(n) * count // n * context, context + 1))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(n), evaluated at `index`, in memory proportional to `index` alone.

    A Feistel network: write i = left * b + right with a * b >= n, and add to each half in turn a hash of the other,
    which can be undone, so it permutes range(a * b). Where the image is not below n, walk on along the cycle until it
    is: a cycle through a point of range(n) comes back to range(n), and the walk can be undone as well.

    Args:
        index: integers in [0, n), any one-dimensional array.
        n: size of the permuted range, at least 1.
        key: which permutation, in [0, 2**64).

    Returns:
        int64, the shape of `index`.
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)  # so that a * b exceeds n by less than sqrt(n) + 1, and walks are rare
    out = _feistel(np.asarray(index).astype(np.uint64), a, b, key)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], a, b, key)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, a: int, b: int, key: int) -> np.ndarray:
    size_left, size_right = np.uint64(a), np.uint64(b)
    left, right = x // size_right, x % size_right
    keys = _keys(key, np.arange(_ROUNDS))
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right + even) % size_left) % size_left
        right = (right + _mix(left + odd) % size_right) % size_right
    return left * size_right + right


def _keys(key: int, numbers: np.ndarray) -> np.ndarray:
    """A family of 64-bit keys, one for each number: splitmix64 seeded by the mixed key, at those places."""
    seed = _mix(np.array([key % 2**64], np.uint64))
    return _mix(seed + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
