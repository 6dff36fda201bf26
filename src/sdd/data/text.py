"""Documents as bytes: where to hold out a tail, and where to cut into pieces.

Positions are bytes. All cuts lie between characters, so the pieces of a document put together are the document.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sdd.errors import UserError

#: Where to cut a piece off a text that goes on, in characters: `Tokenizer.last_cut`.
Cut = Callable[[str], int]
PIECE_BYTES = 1 << 16
SMALLEST_TAIL = 2048
_SEARCH_BYTES = 1 << 16

# Where to start a held-out tail, best first: after a line, after a sentence, after a word, after a character.
_TAIL_STARTS = (rb"\n(?=\S)", rb"[.!?](?= \S)", rb"\S(?= \S)", rb"(?=[\x00-\x7f\xc0-\xff])")
# Where to end a piece. Before a single space inside a line, no pre-tokenizer of the GPT family has a token across the
# cut. Each pattern is matched once from the start of the text; searching would try every start, in quadratic time.
_PIECE_ENDS = (rb"(?s).*\S(?= \S)", rb"(?s).*\n(?=\S)", rb"(?s).+(?=[\x00-\x7f\xc0-\xff])")


@dataclass(frozen=True)
class Document:
    """A text of `size` bytes in an open file, to be read before the next document; `name` identifies it in messages."""

    name: str
    file: BinaryIO
    size: int

    def pieces(self, start: int, stop: int, cut: Cut | None = None) -> Iterator[tuple[bytes, bool]]:
        """The text of bytes [start, stop) in pieces of about 64 KiB, each with whether it is the last.

        Args:
            start: first byte.
            stop: byte after the last.
            cut: see `piece_end`.

        Raises:
            UserError: bytes that are not UTF-8.
        """
        self.file.seek(start)
        rest = b""
        while data := rest + self.file.read(min(PIECE_BYTES, stop - start - len(rest))):
            last = start + len(data) == stop
            end = len(data) if last else piece_end(data, cut)
            check_utf8(data[:end], self.name, start)
            yield data[:end], last
            start, rest = start + end, data[end:]


def check_utf8(data: bytes, name: str, start: int = 0) -> None:
    """Raise UserError unless `data`, which begins at byte `start` of the text called `name`, is UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {start + error.start}): convert it, e.g. iconv -f latin1 -t utf-8"
        ) from None


class TailSplit:
    """Decide which tail of each document is held out: `fraction` of its bytes, cut at the end of a line or sentence.

    Documents may differ in size by orders of magnitude. Large ones each give their own tail, so that every source and
    every part of an ordered corpus is held out alike. Tails of small ones would be scraps without context. So their
    shares are added up until they make a tail of at least `SMALLEST_TAIL` bytes, which the next document gives for all
    of them, if need be as a whole.

    Args:
        fraction: share of the bytes to hold out.
        total: roughly the bytes of all text. If it is small, tails below `SMALLEST_TAIL` must do.
    """

    def __init__(self, fraction: float, total: int) -> None:
        self._fraction = fraction
        self._smallest = max(1, min(SMALLEST_TAIL, int(fraction * total / 4)))
        self._owed = 0.0

    def cut(self, document: Document) -> int:
        """Where the document's validation tail starts; its size if none is held out."""
        self._owed += self._fraction * document.size
        if self._owed < self._smallest:
            return document.size
        cut = split_point(document.file, document.size, int(self._owed))
        self._owed -= document.size - cut
        return cut


def split_point(file: BinaryIO, size: int, tail: int) -> int:
    """The best place to cut at least half a `tail`, and at most a whole one, off the end of a text of `size` bytes."""
    if tail >= size:
        return 0
    file.seek(size - tail)
    window = file.read(min(max(4, tail // 2), _SEARCH_BYTES))  # 4: the longest character
    found = next((found.end() for pattern in _TAIL_STARTS if (found := re.search(pattern, window))), len(window))
    return size - tail + found


def piece_end(data: bytes, cut: Cut | None = None) -> int:
    """Where to end a piece of a text that starts with `data` and goes on: late, and where no token is cut in two.

    Without `cut` that holds for pre-tokenizers of the GPT family, if spaces or lines' ends stand near the end. With it,
    the place is looked for in the last 64 KiB of `data`, as far as they are UTF-8.
    """
    if cut is None:
        return next((found.end() for pattern in _PIECE_ENDS if (found := re.match(pattern, data))), len(data))
    first = max(0, len(data) - PIECE_BYTES)
    while first > 0 and data[first] & 0xC0 == 0x80:  # not in the middle of a character
        first -= 1
    last = _whole_characters(data[first:])
    try:
        text = last.decode()
    except UnicodeDecodeError:  # told with its place when the text is read
        return piece_end(data)
    return first + len(text[: cut(text)].encode())


def _whole_characters(data: bytes) -> bytes:
    """The beginning of a text without its last character, which may go on."""
    found = re.match(rb"(?s).+(?=[\x00-\x7f\xc0-\xff])", data)
    return data[: found.end()] if found else data
