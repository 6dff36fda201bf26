"""From text files to token files, in bounded memory."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from sdd.data.cache import Notify, cached
from sdd.data.encoder import Encoder
from sdd.data.text import JSONL_SUFFIXES, PIECE_BYTES, TailSplit, documents, smallest_tail
from sdd.data.token_file import TokenFile, TokenizerRef, TokenWriter
from sdd.data.tokenizer import Tokenizer
from sdd.errors import UserError

VALIDATION_FRACTION = 0.05
_CACHE_FORMAT = 1  # to be raised when the same text and tokenizer give other token files
_BATCH_BYTES = 32 * PIECE_BYTES  # enough for all threads; the tokenizer's own records take some 100 times as much


def tokenize_files(
    files: Sequence[Path], out: Path, tokenizer: Tokenizer, validation_fraction: float = VALIDATION_FRACTION
) -> None:
    """Tokenise text files into `out`: train.npy, validation.npy, a json beside each, and tokenizer.json.

    The validation part is the tail of the documents (see `TailSplit`), so no text is in both. Documents are read in
    pieces, at most a few MB at a time; .jsonl ones one by one.

    Args:
        files: texts, in the order to write; see `sdd.data.text.documents` for the formats.
        out: an existing directory.
        tokenizer: the tokenizer; a copy is kept in `out`.
        validation_fraction: share of the bytes that is held out; 0 writes no validation.npy.

    Raises:
        UserError: a file that is not UTF-8 or not in its format, or too little text.
    """
    tokenizer.save(out / "tokenizer.json")
    size = sum(file.stat().st_size for file in files)  # compressed ones are larger, which does no harm
    split = TailSplit(validation_fraction, smallest_tail(validation_fraction, size))
    with _writer(out / "train.npy", tokenizer) as train, _writer(out / "validation.npy", tokenizer) as validation:
        heads = Encoder(tokenizer, train, _BATCH_BYTES)
        tails = Encoder(tokenizer, validation, _BATCH_BYTES)
        for file in files:
            for document in documents(file):
                cut = split.cut(document)
                heads.add(document.pieces(0, cut))
                tails.add(document.pieces(cut, document.size))
        heads.flush()
        tails.flush()
        if not train.n_tokens or (validation_fraction and not validation.n_tokens):
            raise UserError(f"{files[0]}{' ...' * (len(files) > 1)}: too little text to train on and hold out a part")


def cached_token_files(
    name: str, files: Sequence[Path], tokenizer: Tokenizer, notify: Notify | None = None
) -> tuple[TokenFile, TokenFile]:
    """The training and validation tokens of text files, tokenised on first use and kept in the cache.

    Args:
        name: starts the name of the cache's entry and stands in the notice.
        files: see `tokenize_files`; the entry is found by a hash of their contents and of the tokenizer.
        tokenizer: the tokenizer.
        notify: receives one line before work that takes a while; by default it is logged.

    Raises:
        UserError: see `tokenize_files`.
    """
    notify = notify or logging.getLogger(__name__).info

    def build(directory: Path) -> None:
        size = sum(file.stat().st_size for file in files) / 1e6
        notify(f"tokenising {name} ({size:.1f} MB on disk) into {directory.parent}, once")
        tokenize_files(files, directory, tokenizer)

    def load(directory: Path) -> tuple[TokenFile, TokenFile]:
        return TokenFile.open(directory / "train.npy"), TokenFile.open(directory / "validation.npy")

    key = hashlib.sha256(f"{_CACHE_FORMAT} {VALIDATION_FRACTION} {tokenizer.sha256}".encode())
    for file in files:
        how_read = next(filter(file.name.endswith, JSONL_SUFFIXES), "text")
        with file.open("rb") as stream:
            key.update(f"{how_read} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return cached(f"{name}-{key.hexdigest()[:16]}", build, load, notify)


def _writer(path: Path, tokenizer: Tokenizer) -> TokenWriter:
    reference = TokenizerRef(sha256=tokenizer.sha256, file="tokenizer.json")
    return TokenWriter(path, tokenizer.vocab_size, tokenizer.eos, reference)
