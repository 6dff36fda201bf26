"""Text on disk as a stream of documents, each cut into a training head and a validation tail, each read in pieces.

Positions are bytes. All cuts lie between characters, so the pieces put together are the document.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from sdd.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.zst", ".json.gz")
TEXT_SUFFIXES = (".txt", ".md", *JSONL_SUFFIXES)
PIECE_BYTES = 1 << 16
SMALLEST_TAIL = 2048
_SEARCH_BYTES = 1 << 16
_ARCHIVE_BYTES = 1 << 18

# Where a document may be cut in two, best first: after a line, after a sentence, after a word, after a character.
_CUTS = (rb"\n(?=\S)", rb"[.!?](?= \S)", rb"\S(?= \S)", rb"(?=[\x00-\x7f\xc0-\xff])")
# Where a piece may end. Before a space inside a line, no pre-tokenizer of the GPT family has a token across the cut.
_ENDS = (rb"(?s).*\S(?= \S)", rb"(?s).*\n(?=\S)", rb"(?s).+(?=[\x00-\x7f\xc0-\xff])")


@dataclass(frozen=True)
class Document:
    """A text of `size` bytes, readable until the next one is asked for; `name` says in messages where it is from."""

    name: str
    file: BinaryIO
    size: int

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int]]:
        """The text of bytes [start, stop) in pieces of about 64 KiB, each with its number of bytes.

        Raises:
            UserError: bytes that are not UTF-8.
        """
        self.file.seek(start)
        rest = b""
        while data := rest + self.file.read(min(PIECE_BYTES, stop - start - len(rest))):
            end = len(data) if start + len(data) == stop else piece_end(data)
            yield self._decode(data[:end], start), end
            start, rest = start + end, data[end:]

    def _decode(self, data: bytes, start: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name} is not UTF-8 text (byte {start + error.start}): convert it, e.g. iconv -f latin1 -t utf-8"
            ) from error


def documents(path: Path) -> Iterator[Document]:
    """The documents of a file: every line's `text` of JSON lines (`JSONL_SUFFIXES`), the whole file otherwise.

    Raises:
        UserError: a line that is not a JSON object with a string `text`, or a damaged archive.
    """
    if not path.name.endswith(JSONL_SUFFIXES):
        with path.open("rb") as file:
            yield Document(str(path), file, path.stat().st_size)
        return
    with path.open("rb") as file:
        for number, line in enumerate(lines(path, file), start=1):
            if line.strip():
                name = f"{path}, line {number}"
                data = json_text(line, "text", name)
                yield Document(name, io.BytesIO(data), len(data))


def json_text(line: bytes, field: str, name: str) -> bytes:
    """The UTF-8 of a JSON object's text.

    Raises:
        UserError: no JSON object, or one without a string of that name.
    """
    try:
        return json.loads(line)[field].encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f'{name}: expected a JSON object with a string "{field}"') from None


def lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file, plain or compressed as its name says.

    Raises:
        UserError: a damaged archive.
    """
    unfinished: list[bytes] = []  # joined only once it is whole, so that a very long line is not copied for every block
    for block in blocks(path, file):
        first, *others = block.split(b"\n")
        unfinished.append(first)
        if others:
            yield b"".join(unfinished)
            yield from others[:-1]
            unfinished = [others[-1]]
    if last := b"".join(unfinished):
        yield last


def blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of an open file, plain or compressed as its name says, in moderate blocks.

    Raises:
        UserError: a damaged archive.
    """
    try:
        if path.suffix == ".zst":
            yield from _zstd_blocks(file)
        else:
            stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            while block := stream.read(_ARCHIVE_BYTES):
                yield block
    except (zstandard.ZstdError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """One or more zstandard frames; zstandard's own stream takes a file that is cut off for a whole one."""
    data = file.read(_ARCHIVE_BYTES)
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not data:
                raise EOFError("it is cut off")
            yield frame.decompress(data)
            data = file.read(_ARCHIVE_BYTES)
        data = frame.unused_data + data


def smallest_tail(fraction: float, total: int) -> int:
    """`SMALLEST_TAIL`, or less where roughly `total` bytes are all the text there is: then small tails must do."""
    return max(1, min(SMALLEST_TAIL, int(fraction * total / 4)))


class TailSplit:
    """Which tail of each document is held out: `fraction` of its bytes, cut at the end of a line or sentence.

    Documents may differ in size by orders of magnitude. Large ones each give their own tail, so that every source and
    every part of an ordered corpus is held out alike. Tails of small ones would be scraps without context; what they
    owe is added up, and the document that brings it to the smallest tail pays for all of them, if need be as a
    whole.
    """

    def __init__(self, fraction: float, smallest: float) -> None:
        """`smallest` is the least that is held out at once, see `smallest_tail`."""
        self._fraction = fraction
        self._smallest = max(1, smallest)
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
    return size - tail + _first_cut(_CUTS, window, default=len(window))


def piece_end(data: bytes) -> int:
    """Where to end a piece of a text that starts with `data` and goes on: late, and where no token is cut in two."""
    return _first_cut(_ENDS, data, default=len(data))


def _first_cut(patterns: tuple[bytes, ...], data: bytes, default: int) -> int:
    return next((m.end() for pattern in patterns if (m := re.search(pattern, data))), default)
