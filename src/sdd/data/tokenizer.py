"""A thin wrapper around `tokenizers.Tokenizer`: exact round trips, the end-of-text token, bytes per token."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from sdd.errors import UserError

BUILTIN = Path(__file__).parent / "assets" / "classics-bpe.json"
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer:
    """A tokenizer read from the bytes of a Hugging Face `tokenizer.json`.

    Text is always text: a special token's name inside a text (`<|endoftext|>`) is encoded as its characters, never as
    the special token, and nothing is added around the text. So for a byte-level tokenizer without normaliser
    `decode(encode(text)) == text` for any text.

    Attributes:
        path: the file it came from.
        data: that file's content.
        sha256: hash of that file, which identifies the tokenizer.
        vocab_size: one more than the greatest token id.
        eos: id of the end-of-text token, or None where the vocabulary has none of the usual names.
    """

    path: Path
    data: bytes
    sha256: str
    vocab_size: int
    eos: int | None

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.data = data
        self._backend = tokenizers.Tokenizer.from_buffer(data)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos = next((vocabulary[name] for name in EOS_NAMES if name in vocabulary), None)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one inside a directory.

        Raises:
            UserError: no such file, or not a tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: expected a tokenizer.json of the Hugging Face tokenizers library")
        try:
            return cls(path, path.read_bytes())
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error

    def token_id(self, name: str) -> int | None:
        """Id of the token with this text, special ones included."""
        return self._backend.token_to_id(name)

    def save(self, path: Path) -> None:
        """Write the bytes that it was read from, so that the hash stays."""
        path.write_bytes(self.data)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, computed by several threads."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give no text, bytes that are not UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray | None:
        """Number of UTF-8 bytes that each token stands for, which makes bits per byte exact.

        Returns:
            int32 [vocab_size], 0 for special tokens; None where the tokenizer is not byte-level, so that a token's
            bytes depend on its neighbours.
        """
        spec = json.loads(self.data)
        decoder = spec.get("decoder") or {}
        if "ByteLevel" not in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}:
            return None
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(token)  # in the byte-level alphabet one character is one byte
        for index, added in self._backend.get_added_tokens_decoder().items():  # these are kept as plain text
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes


@functools.cache
def builtin_tokenizer() -> Tokenizer:
    """The byte-level BPE of 4096 tokens trained on the classics' training part; `<|endoftext|>` is token 0."""
    return Tokenizer.load(BUILTIN)


def _quiet_fork() -> None:
    """Make a later fork silent and safe.

    The library's threads do not survive a fork. By itself it prints a warning in the child and turns its threads off
    there. Turning them off beforehand, for the child only, has the same effect without the warning.
    """
    name = "TOKENIZERS_PARALLELISM"
    ours: list[bool] = []

    def before() -> None:
        ours.append(name not in os.environ)
        os.environ.setdefault(name, "false")

    def after_in_parent() -> None:
        if ours.pop():
            del os.environ[name]

    if hasattr(os, "register_at_fork"):  # absent where processes cannot fork
        os.register_at_fork(before=before, after_in_parent=after_in_parent)


_quiet_fork()
