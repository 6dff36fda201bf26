"""The units of work of `sdd tokenize`: records of the inputs in, tokens out.

Where a chunk begins depends on where the one before ended and on nothing else, and its tokens on nothing but itself:
so the result is the same with any number of workers, and however often the work was interrupted.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdd.data.encoder import Encoder
from sdd.data.inputs import Input, Record, place, records, text_of
from sdd.data.shards import Position, TokenBuffer
from sdd.data.text import SMALLEST_TAIL, Document, TailSplit, smallest_tail
from sdd.data.token_file import DtypeName
from sdd.data.tokenizer import Tokenizer
from sdd.errors import UserError

_BATCH_BYTES = 1 << 18
_HELD_OUT_BYTES = 32 * SMALLEST_TAIL


@dataclass(frozen=True)
class Chunk:
    """Consecutive records, each with the number of its input, and the positions before and after them."""

    records: list[tuple[int, Record]]
    before: Position
    after: Position


@dataclass(frozen=True)
class Tokens:
    """A chunk's tokens: what is trained on, what is held out, and how many records were no text."""

    train: TokenBuffer
    validation: TokenBuffer
    skipped: int


def chunks(inputs: Sequence[Input], field: str, start: Position, chunk_bytes: int) -> Iterator[Chunk]:
    """All chunks after `start`."""
    pending: list[tuple[int, Record]] = []
    size = sum(source.size for source in inputs[: start.input])
    before = after = start
    for index in range(start.input, len(inputs)):
        for record in records(inputs[index], field, start.record if index == start.input else 0):
            pending.append((index, record))
            n_bytes = after.n_bytes + len(record.data)
            after = Position(input=index, record=record.number, done=size + record.done, n_bytes=n_bytes)
            if n_bytes - before.n_bytes >= chunk_bytes:
                yield Chunk(pending, before, after)
                pending, before = [], after
        size += inputs[index].size
    if pending:
        yield Chunk(pending, before, after)


@dataclass(frozen=True)
class Rules:
    """How text becomes tokens.

    Attributes:
        inputs: what the chunks' records are of.
        field: that holds the text.
        dtype: of the tokens.
        eos: the token after each document.
        validation_fraction: share of the bytes that is held out.
        skip_bad: pass over records that are no text, instead of refusing them.
    """

    inputs: tuple[Input, ...]
    field: str
    dtype: DtypeName
    eos: int
    validation_fraction: float
    skip_bad: bool

    @property
    def size(self) -> int:
        """Of all inputs."""
        return sum(source.size for source in self.inputs)


class ChunkTokenizer:
    """Tokenises chunks; every worker has one.

    Held out is the tail of each document, or of each part of a long text, by `TailSplit`. An end-of-text token stands
    after every document, and where a tail was cut out of one.
    """

    def __init__(self, tokenizer: Tokenizer, rules: Rules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules

    def __call__(self, chunk: Chunk) -> Tokens:
        """The tokens of a chunk.

        Raises:
            UserError: a record that is no text, unless those are to be skipped.
        """
        rules = self._rules
        train, validation = TokenBuffer(rules.dtype, rules.eos), TokenBuffer(rules.dtype, rules.eos)
        heads = Encoder(self._tokenizer, train, _BATCH_BYTES)
        tails = Encoder(self._tokenizer, validation, _BATCH_BYTES)
        documents = [(self._document(index, record), record.goes_on) for index, record in chunk.records]
        found = [(document, goes_on) for document, goes_on in documents if document]
        split = self._split(chunk, sum(document.size for document, _ in found))
        for document, goes_on in found:
            cut = split.cut(document)
            heads.add(document.pieces(0, cut), ends=cut < document.size or not goes_on)
            tails.add(document.pieces(cut, document.size))
        heads.flush()
        tails.flush()
        return Tokens(train, validation, skipped=len(documents) - len(found))

    def _document(self, index: int, record: Record) -> Document | None:
        source = self._rules.inputs[index]
        try:
            data = text_of(source, record.number, record.data, self._rules.field)
        except UserError:
            if not self._rules.skip_bad:
                raise
            return None
        return Document(place(source, record.number), io.BytesIO(data), len(data))

    def _split(self, chunk: Chunk, text_bytes: int) -> TailSplit:
        """What this chunk holds out: with a small fraction most have nothing to, and the others whole tails."""
        fraction, stored = self._rules.validation_fraction, chunk.after.n_bytes - chunk.before.n_bytes
        unit = max(1.0, min(_HELD_OUT_BYTES, fraction * self._rules.size / 16))
        due = unit * (fraction * chunk.after.n_bytes // unit - fraction * chunk.before.n_bytes // unit)
        share = min(1.0, due / stored)
        return TailSplit(share, smallest_tail(share, text_bytes))
