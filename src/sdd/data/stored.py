"""Token ids in a file that is open for reading, safe against what happens to the file meanwhile.

A memory map of a file that has become shorter kills the process (SIGBUS); a read returns less than was asked for.
So batches are read, and only code that wants the whole array at once gets a map. A deleted file stays readable until
it is closed.
"""

import mmap
import os
from pathlib import Path

import numpy as np

from sdd.errors import RunFailed


class StoredTokens:
    """The tokens [start, stop) of a file.

    Args:
        path: the file.
        dtype: of a token on disk.
        offset: bytes before the first token.
        n_tokens: how many there are.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype, offset: int, n_tokens: int) -> None:
        self._file = _OpenFile(path, dtype, offset, n_tokens)
        self._start, self._stop = 0, n_tokens

    def __len__(self) -> int:
        return self._stop - self._start

    def part(self, start: int, stop: int) -> "StoredTokens":
        """The tokens [start, stop) of these, through the same descriptor."""
        part = object.__new__(StoredTokens)
        part._file, part._start, part._stop = self._file, self._start + start, self._start + stop
        return part

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens [start, stop), fewer where these end before `stop`.

        Raises:
            RunFailed: the file is no longer as long as it was when it was opened, or cannot be read any more.
        """
        return self._file.read(self._start + start, min(self._start + stop, self._stop))

    def mapped(self) -> np.ndarray:
        """All tokens as one memory-mapped, read-only array; not to be used where the file may be cut off meanwhile.

        Raises:
            RunFailed: see `read`.
        """
        return self._file.mapped()[self._start : self._stop]


class _OpenFile:
    def __init__(self, path: Path, dtype: np.dtype, offset: int, n_tokens: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._path, self._dtype, self._offset, self._n_tokens = path, dtype, offset, n_tokens
        self._map: np.ndarray | None = None

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        if not hasattr(os, "pread"):  # Windows, which does not let a mapped file be cut off
            return self.mapped()[start:stop]
        place, missing = self._offset + start * self._dtype.itemsize, (stop - start) * self._dtype.itemsize
        blocks: list[bytes] = []
        while missing > 0:
            try:
                block = os.pread(self._descriptor, missing, place)
            except OSError as error:
                raise RunFailed(f"cannot read {self._path} any more: {error.strerror}") from None
            if not block:
                raise self._cut_off()
            blocks.append(block)
            place, missing = place + len(block), missing - len(block)
        return np.frombuffer(blocks[0] if len(blocks) == 1 else b"".join(blocks), self._dtype)

    def mapped(self) -> np.ndarray:
        if os.fstat(self._descriptor).st_size < self._size:
            raise self._cut_off()
        if self._map is None:
            whole = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
            self._map = np.frombuffer(whole, self._dtype, self._n_tokens, self._offset)
        return self._map

    @property
    def _size(self) -> int:
        return self._offset + self._n_tokens * self._dtype.itemsize

    def _cut_off(self) -> RunFailed:
        return RunFailed(
            f"{self._path} was cut off while in use: it had {self._size:,} bytes, now it has "
            f"{os.fstat(self._descriptor).st_size:,}; bring the whole file back and go on from the last checkpoint"
        )
