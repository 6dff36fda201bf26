"""From pieces of text to token ids, many pieces at once."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from sdd.data.tokenizer import Tokenizer


class Sink(Protocol):
    """Where tokens go, such as a `TokenWriter`."""

    def write(self, ids: Sequence[int] | np.ndarray, n_bytes: int | None = None) -> None:
        """Take tokens that stand for `n_bytes` of UTF-8."""
        ...

    def end_document(self) -> None:
        """Close the document."""
        ...


class Encoder:
    """Collects pieces of documents and encodes many at once, so that the tokenizer's threads are busy.

    Args:
        tokenizer: the tokenizer.
        sink: receives the tokens, in the order of the text.
        batch_bytes: about how much text to collect; the tokenizer's own records take some 100 times as much.
    """

    def __init__(self, tokenizer: Tokenizer, sink: Sink, batch_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._sink = sink
        self._batch_bytes = batch_bytes
        self._pending: list[tuple[str, int, bool]] = []
        self._pending_bytes = 0

    def add(self, pieces: Iterable[tuple[str, int]], *, ends: bool = True) -> None:
        """Take one document, or the part of one; `ends` closes it if it is not empty."""
        last = None
        for piece in pieces:
            if last:
                self._queue(*last, ends_document=False)
            last = piece
        if last:
            self._queue(*last, ends_document=ends)

    def flush(self) -> None:
        """Encode and hand on what is pending."""
        ids = self._tokenizer.encode_batch([text for text, _, _ in self._pending])
        for (_, n_bytes, ends_document), piece_ids in zip(self._pending, ids, strict=True):
            self._sink.write(piece_ids, n_bytes)
            if ends_document:
                self._sink.end_document()
        self._pending.clear()
        self._pending_bytes = 0

    def _queue(self, text: str, n_bytes: int, ends_document: bool) -> None:
        self._pending.append((text, n_bytes, ends_document))
        self._pending_bytes += n_bytes
        if self._pending_bytes >= self._batch_bytes:
            self.flush()
