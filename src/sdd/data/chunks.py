"""The units of work of tokenising: records of the inputs in, tokens out.

Where a chunk begins depends on where the one before ended and on nothing else, and its tokens on nothing but itself:
so the result is the same with any number of workers, and however often the work was interrupted.
"""

import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pydantic

from sdd.data.fields import BadRecord
from sdd.data.inputs import PART_BYTES, Input, Record, documents, place, records, text_of
from sdd.data.shards import SHARD_TOKENS, Counts, Position, Tokens
from sdd.data.text import PIECE_BYTES, SMALLEST_TAIL, Cut, Document, TailSplit
from sdd.data.token_file import DtypeName
from sdd.data.tokenizer import Tokenizer

_BATCH_PIECES = 4  # enough for one thread; the tokenizer's own records take some 100 times as much memory as the text
_THREADED_BATCH_PIECES = 32
_HELD_OUT_BYTES = 32 * SMALLEST_TAIL
FORMAT = 2  # to be raised when the same manifest gives other tokens
PLAIN_CUTS = 1  # the format in which long texts were cut without asking the tokenizer


class Manifest(pydantic.BaseModel, frozen=True):
    """All that the tokens depend on; manifest.json in a folder of tokens.

    Attributes:
        format: of the tokens, see `FORMAT`.
        tokenizer: the hash that identifies it.
        eos: the token after each document; None if there is none.
        dtype: of the tokens.
        text_field: field of JSON lines, column of parquet and of datasets that holds the text.
        validation_fraction: share of the bytes that is held out.
        skip_bad: pass over records that are no text, instead of refusing them.
        whole_documents: hold out one tail of each document, however long. Otherwise each chunk decides on its own, and
            a long text gives several tails.
        chunk_bytes: how much text makes a chunk.
        shard_tokens: a training file that has so many is followed by a new one.
        inputs: whose records the chunks consist of.
    """

    format: int = FORMAT
    tokenizer: str
    eos: int | None
    dtype: DtypeName
    text_field: str = "text"
    validation_fraction: float
    skip_bad: bool = False
    whole_documents: bool = False
    chunk_bytes: int = PART_BYTES
    shard_tokens: int = SHARD_TOKENS
    inputs: tuple[Input, ...]

    @property
    def held_out_by_name(self) -> bool:
        """Whether files are held out by their names; then nothing is held out of the others."""
        return any(source.held_out for source in self.inputs)

    @property
    def size(self) -> int:
        """The size of all inputs."""
        return sum(source.size for source in self.inputs)


@dataclass(frozen=True)
class Chunk:
    """Consecutive records, each with the number of its input, and the positions before and after them."""

    records: list[tuple[int, Record]]
    before: Position
    after: Position


@dataclass(frozen=True)
class ChunkTokens:
    """A chunk's tokens, to train on and held out.

    Attributes:
        train: to train on.
        validation: held out.
        skipped: why each record that is no text was passed over.
        without_text: records whose field is null or missing.
    """

    train: Tokens
    validation: Tokens
    skipped: list[str]
    without_text: int


def chunks(manifest: Manifest, start: Position, cut: Cut | None = None) -> Iterator[Chunk]:
    """All chunks after `start`; `cut` says where long texts are cut."""
    pending: list[tuple[int, Record]] = []
    before = after = start
    sizes = np.cumsum([0, *(source.size for source in manifest.inputs)]).tolist()
    for index, record in (_whole_documents if manifest.whole_documents else _records)(manifest, start, cut):
        pending.append((index, record))
        n_bytes = after.n_bytes + len(record.data)
        checksum = zlib.crc32(record.data, after.checksum if index == after.input else 0)
        after = Position(
            input=index,
            record=record.number,
            done=sizes[index] + record.done,
            n_bytes=n_bytes,
            checksum=checksum,
        )
        if n_bytes - before.n_bytes >= manifest.chunk_bytes:
            yield Chunk(pending, before, after)
            pending, before = [], after
    if pending:
        yield Chunk(pending, before, after)


def _records(manifest: Manifest, start: Position, cut: Cut | None) -> Iterator[tuple[int, Record]]:
    for index in range(start.input, len(manifest.inputs)):
        first = start.record if index == start.input else 0
        for record in records(manifest.inputs[index], manifest.text_field, first, cut):
            yield index, record


def _whole_documents(manifest: Manifest, start: Position, cut: Cut | None) -> Iterator[tuple[int, Record]]:
    """Pieces of documents as records, each to train on or held out.

    How much a document gives depends on all documents before it, so these are read even if the work on them is done.
    """
    split = TailSplit(manifest.validation_fraction, manifest.size)
    for index, source in enumerate(manifest.inputs):
        number = 0
        for done, document in documents(source, manifest.text_field):
            if document is None:
                number += 1
                yield index, Record(number, done, b"", held_out=False, missing=1)
                continue
            tail = _tail(manifest, split, index, document)
            for held_out, region in ((False, (0, tail)), (True, (tail, document.size))):
                continued = False
                for data, last in document.pieces(*region, cut):
                    number += 1
                    if (index, number) > (start.input, start.record):
                        yield index, Record(number, done, data, continued, goes_on=not last, held_out=held_out)
                    continued = True


def _tail(manifest: Manifest, split: TailSplit, index: int, document: Document) -> int:
    """Where the held-out part of a document of input `index` starts."""
    if not manifest.held_out_by_name:
        return split.cut(document)
    return 0 if manifest.inputs[index].held_out else document.size


class ChunkTokenizer:
    """Tokenise chunks; every worker has one.

    Held out is the tail of each document, or of each part of a long text, by `TailSplit`. An end-of-text token stands
    after every document, and where a tail was cut out of one.

    Args:
        tokenizer: the tokenizer.
        manifest: how text becomes tokens.
        threaded: encode so much at once that all threads of the tokenizer are busy.
    """

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest, *, threaded: bool = False) -> None:
        self._tokenizer = tokenizer
        self._manifest = manifest
        self._batch_bytes = PIECE_BYTES * (_THREADED_BATCH_PIECES if threaded else _BATCH_PIECES)

    def __call__(self, chunk: Chunk) -> ChunkTokens:
        """The tokens of a chunk.

        Raises:
            BadRecord: a record that is no text, unless those are to be skipped.
        """
        if self._manifest.whole_documents:
            sides = (
                [
                    _Piece(record.data, begins=not record.continued, ends=not record.goes_on)
                    for _, record in chunk.records
                    if record.held_out == side and not record.missing
                ]
                for side in (False, True)
            )
            missing = sum(record.missing for _, record in chunk.records)
            return ChunkTokens(*map(self._encoded, sides), skipped=[], without_text=missing)
        found, skipped, missing = self._documents(chunk)
        split = self._split(chunk, sum(document.size for _, document, _ in found))
        tails = [_tail(self._manifest, split, index, document) for index, document, _ in found]
        heads = (
            piece
            for (_, document, record), tail in zip(found, tails, strict=True)
            for piece in self._pieces(
                document, 0, tail, begins=not record.continued, ends=tail < document.size or not record.goes_on
            )
        )
        by_name = self._manifest.held_out_by_name  # a file that is held out goes on in the next part
        held_out = (
            piece
            for (_, document, record), tail in zip(found, tails, strict=True)
            for piece in self._pieces(
                document,
                tail,
                document.size,
                begins=not (by_name and record.continued),
                ends=not (by_name and record.goes_on),
            )
        )
        return ChunkTokens(self._encoded(heads), self._encoded(held_out), skipped, missing)

    def _pieces(self, document: Document, start: int, stop: int, *, begins: bool, ends: bool) -> Iterator["_Piece"]:
        """The text of bytes [start, stop), with whether a document begins and ends with it."""
        for data, last in document.pieces(start, stop, cut_of(self._tokenizer, self._manifest)):
            yield _Piece(data, begins, last and ends)
            begins = False

    def _documents(self, chunk: Chunk) -> tuple[list[tuple[int, Document, Record]], list[str], int]:
        """The documents with their inputs and records; why records are no text; how many have none."""
        found, skipped, missing = [], [], 0
        for index, record in chunk.records:
            source = self._manifest.inputs[index]
            try:
                data = text_of(source, record, self._manifest.text_field)
            except BadRecord as error:
                if not self._manifest.skip_bad:
                    raise
                skipped.append(str(error))
                continue
            if data is None:
                missing += record.missing or 1
            else:
                document = Document(place(source, record.number), io.BytesIO(data), len(data))
                found.append((index, document, record))
        return found, skipped, missing

    def _split(self, chunk: Chunk, text_bytes: int) -> TailSplit:
        """How this chunk is split: of a small fraction most chunks hold out nothing, the others whole tails."""
        fraction, stored = self._manifest.validation_fraction, chunk.after.n_bytes - chunk.before.n_bytes
        unit = max(1.0, min(_HELD_OUT_BYTES, fraction * self._manifest.size / 16))
        due = unit * (fraction * chunk.after.n_bytes // unit - fraction * chunk.before.n_bytes // unit)
        return TailSplit(min(1.0, due / max(1, stored)), text_bytes)

    def _encoded(self, pieces: Iterable["_Piece"]) -> Tokens:
        """The tokens of pieces of text, an end-of-text token after each that ends a document."""
        end = [] if self._manifest.eos is None else [self._manifest.eos]
        dtype = np.dtype(self._manifest.dtype).newbyteorder("<")
        counts, blocks = Counts(), []
        for batch in _batches(pieces, self._batch_bytes):
            texts = [piece.data.decode() for piece in batch]
            encoded = self._tokenizer.encode_batch(texts, [piece.begins for piece in batch])
            for piece, text, ids in zip(batch, texts, encoded, strict=True):
                ids += end * piece.ends
                blocks.append(np.array(ids, dtype).tobytes())
                lost = self._tokenizer.lost_bytes(text)
                counts.add(
                    Counts(n_tokens=len(ids), n_bytes=len(piece.data) - lost, n_documents=piece.ends, n_lost=lost)
                )
        return Tokens(b"".join(blocks), counts)


class _Piece(NamedTuple):
    """Text, and whether a document begins and ends with it."""

    data: bytes
    begins: bool
    ends: bool


def cut_of(tokenizer: Tokenizer, manifest: Manifest) -> Cut | None:
    """Where long texts are cut under a manifest, see `piece_end`."""
    return None if manifest.format <= PLAIN_CUTS else tokenizer.last_cut


def _batches(pieces: Iterable[_Piece], batch_bytes: int) -> Iterator[list[_Piece]]:
    """The pieces in lists of at least so many bytes; the last list may have less."""
    batch, n_bytes = [], 0
    for piece in pieces:
        batch.append(piece)
        n_bytes += len(piece.data)
        if n_bytes >= batch_bytes:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch
