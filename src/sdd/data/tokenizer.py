"""A thin wrapper around `tokenizers.Tokenizer`: exact round trips, the end-of-text token, bytes per token."""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers

from sdd.data import tokenizer_spec as spec_of
from sdd.errors import UserError

BUILTIN = Path(__file__).parent / "assets" / "classics-bpe.json"
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_log = logging.getLogger(__name__)
_LOOK_AHEAD = 256  # characters: more than any token has
_NEAR = 4096
_MOST_CUTS = 8
# Places to cut a document, best first: before a single space inside a line, and after a line. Each pattern is matched
# once from the start of the text; searching would try every start, in quadratic time.
_CUTS = (re.compile(r"(?s).*\S(?= \S)"), re.compile(r"(?s).*\n(?=\S)"))


class Tokenizer:
    """A tokenizer read from the bytes of a Hugging Face `tokenizer.json`.

    Text is always text: the name of an added token inside a text (`<|endoftext|>`) is encoded as its characters,
    whatever the file says of that token, and nothing is added around the text. Only added tokens that are runs of white
    space are read from text. So `decode(encode(text)) == text` for any text, unless `remarks` says otherwise. One
    character is an exception: a tokenizer that writes a space as U+2581 gives that character back as a space.

    A space that the tokenizer puts before a text is put there only if decoding takes it away again.

    Attributes:
        path: the file it came from.
        data: that file's content.
        sha256: hash of that file, which identifies the tokenizer.
        vocab_size: one more than the greatest token id.
        eos: id of the end-of-text token, or None where the vocabulary has none of the usual names.
        rereads: whether it encodes some texts unlike earlier versions of this package did.
    """

    path: Path
    data: bytes
    sha256: str
    vocab_size: int
    eos: int | None
    rereads: bool

    def __init__(self, path: Path, data: bytes, eos: int | None = None) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.data = data
        self._backend = tokenizers.Tokenizer.from_buffer(data)
        self._spec: spec_of.Spec = json.loads(self._backend.to_str())
        if (exact := spec_of.exact_decoder(self._spec)) is not self._spec:
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(exact))
        self._ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        self._usual_eos = next((self._ids[name] for name in EOS_NAMES if name in self._ids), None)
        self.eos = self._usual_eos if eos is None else eos
        self._controls = spec_of.control_names(self._spec)
        self._controls |= {name for name, index in self._ids.items() if index == self.eos}
        self._text = tokenizers.Tokenizer.from_str(json.dumps(spec_of.text_only(self._spec, self._controls)))
        self._text.encode_special_tokens = True
        self._prefix = self._find_prefix()
        added = self._backend.get_added_tokens_decoder()
        self._special = [index for index, token in added.items() if token.special]
        pieces_only = self._spec["model"]["type"] == "BPE" and not self._spec["model"].get("ignore_merges")
        safe_before = pieces_only and {self._ids.get(name) for name in self._controls} <= {*self._special, None}
        self.rereads = not safe_before or spec_of.prepends(self._spec)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one inside a directory, and log what `remarks` says.

        Raises:
            UserError: no such file, or not a tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: expected a tokenizer.json of the Hugging Face tokenizers library")
        try:
            tokenizer = cls(path, path.read_bytes())
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
        if remarks := tokenizer.remarks():
            _log.warning("%s does not give every text back: %s", path, "; ".join(remarks))
        return tokenizer

    def ending_with(self, named: str | int | None, option: str) -> "Tokenizer":
        """The same tokenizer with an end-of-text token.

        Args:
            named: the token's text or id; None for the tokenizer's own.
            option: how the user names it, for the message.

        Raises:
            UserError: there is no such token, or text needs it.
        """
        if named is None:
            if self.eos is None:
                raise UserError(
                    f"{self.path} has none of the usual end-of-text tokens ({', '.join(EOS_NAMES)}): name its own "
                    f"with {option}"
                )
            return self
        name = str(named)
        found = int(name) if name.isdecimal() else self.token_id(name)  # nobody ends a text with a digit
        if found is None or found >= self.vocab_size:
            raise UserError(f"{self.path} has no token {name!r} to end a text with")
        ending = self.with_end(found)
        if ending.remarks() != self.remarks():
            raise UserError(f"{self.path}: text needs the token {name!r}, it cannot end a text: name another")
        return ending

    def with_end(self, eos: int | None) -> "Tokenizer":
        """The same tokenizer with this end of text; None, or an id that it does not have, leaves its own."""
        if eos is None or eos == self.eos or eos >= self.vocab_size:
            return self
        return Tokenizer(self.path, self.data, eos)

    @property
    def identity(self) -> str:
        """What the tokens of a text depend on; the file's hash alone where earlier versions gave the same tokens."""
        return self.sha256 + f" eos {self.eos}" * (self.eos != self._usual_eos) + " all text" * self.rereads

    def token_id(self, name: str) -> int | None:
        """Id of the token with this text, special ones included."""
        return self._backend.token_to_id(name)

    def save(self, path: Path) -> None:
        """Write the bytes that it was read from, so that the hash stays."""
        path.write_bytes(self.data)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], begins: Sequence[bool] | None = None) -> list[list[int]]:
        """Token ids of each text, computed by several threads.

        Args:
            texts: documents, or pieces of them that `last_cut` has cut.
            begins: for each text whether a document begins with it; by default it does.

        Raises:
            UserError: a text that the tokenizer refuses, having no token for what it does not know.
        """
        begins = begins or [True] * len(texts)
        whole = [self._prefix + text if text and first else text for text, first in zip(texts, begins, strict=True)]
        with self._refusing():
            return [encoding.ids for encoding in self._text.encode_batch_fast(whole, add_special_tokens=False)]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises plain Exception
            advice = "take a tokenizer with an unknown token, or a byte-level one"
            raise UserError(f"{self.path} cannot encode a text ({error}): {advice}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give no text, bytes that are not UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, vocab_size: int | None = None) -> np.ndarray | None:
        """Number of UTF-8 bytes that each token stands for, which makes bits per byte exact.

        Args:
            vocab_size: of the model, if it is larger than the tokenizer's own.

        Returns:
            int32 [vocab_size], 0 for special tokens, the end of text, the unknown token and ids that the tokenizer does
            not have; None where the tokenizer is not byte-level, so that a token's bytes depend on its neighbours.
        """
        if not spec_of.is_byte_level(self._spec):
            return None
        sizes = np.zeros(max(self.vocab_size, vocab_size or 0), np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(token)  # in the byte-level alphabet one character is one byte
        for index, added in self._backend.get_added_tokens_decoder().items():  # these are kept as plain text
            sizes[index] = 0 if added.special else len(added.content.encode())
        silent = (self.eos, self._ids.get(spec_of.unknown_token(self._spec["model"]) or ""))
        sizes[[index for index in silent if index is not None]] = 0
        return sizes

    def writable(self, vocab_size: int) -> np.ndarray:
        """Which ids of a model's vocabulary it may write, bool [vocab_size]: those with text, and the end of text.

        Special tokens have no text, nor have ids that the tokenizer does not have.
        """
        found = np.zeros(max(self.vocab_size, vocab_size), bool)
        found[list(self._ids.values())] = True
        found[self._special] = False
        if self.eos is not None:
            found[self.eos] = True
        return found[:vocab_size]

    def lost_bytes(self, text: str) -> int:
        """How many bytes of a text give no token at all, because a BPE without an unknown token lacks them."""
        known = self._known
        if known is None:
            return 0
        if spec_of.is_byte_level(self._spec):
            units, size = text.encode().decode("latin1"), len
        else:
            normalizer = self._text.normalizer
            units, size = normalizer.normalize_str(text) if normalizer else text, _utf8_size
        return sum(units.count(unit) * size(unit) for unit in set(units) - known)

    @functools.cached_property
    def _known(self) -> set[str] | None:
        return spec_of.known_units(self._spec, self._controls)

    def remarks(self) -> list[str]:
        """What encoding changes or leaves out of some texts, in a few words each; nothing for a lossless tokenizer."""
        said = []
        if names := spec_of.normalizers(self._spec):
            said.append(f"its normalizer changes text ({', '.join(names)})")
        if lacking := spec_of.lacking(self._spec, self._controls, self._known):
            said.append(lacking)
        letter = self._letter
        if letter and not spec_of.is_byte_level(self._spec) and not self._gives_back(f"{letter}  {letter}", ""):
            said.append("it does not keep white space as it is")
        return said

    @functools.cached_property
    def _letter(self) -> str | None:
        """A character that the tokenizer gives back."""
        found = [*"aetoxyAETO", *list(self._ids)[:1000]]
        return next((letter for letter in found if self._gives_back(letter, " ") or self._gives_back(letter, "")), None)

    def _gives_back(self, text: str, prefix: str) -> bool:
        try:
            ids = self._text.encode(prefix + text, add_special_tokens=False).ids
        except Exception:  # the library raises plain Exception where it lacks an unknown token
            return False
        return self.decode(ids) == text

    def _find_prefix(self) -> str:
        """A space, if the tokenizer puts one before a text and decoding takes it away again; else nothing."""
        letter = self._letter
        if letter is None:
            return ""
        for prefix in (" ", ""):
            if all(self._gives_back(space + letter, prefix) for space in ("", " ")):
                return prefix
        return " " if spec_of.prepends(self._spec) and self._gives_back(letter, " ") else ""

    def last_cut(self, text: str) -> int:
        """Where to cut a piece off a document that starts with `text` and goes on.

        Returns:
            The number of characters before a place, late in the text, where the tokens of both sides put together are
            the tokens of the whole; if there is none, all characters.
        """
        most = len(text) - min(_LOOK_AHEAD, len(text) // 4)
        for pattern in _CUTS:
            places = [found.end() for found in _last_matches(pattern, text[: most + 1])]
            if (place := next((place for place in places if self._may_cut(text, place)), None)) is not None:
                return place
        near = len(text) - _NEAR
        return (near > 0 and self._cut_in(text, near, most)) or self._cut_in(text, 0, most) or len(text)

    def _cut_in(self, text: str, start: int, most: int) -> int | None:
        """The last place to cut in a text from `start` on; None if its tokens depend on what is before `start`."""
        ids, places = self._with_places(text[start:])
        # Tokens that depend on where the text starts, as of digits in threes, differ if it starts one later.
        later_ids, later_places = self._with_places(text[start + 1 :]) if start else (ids, places)
        tried = 0
        for index in range(len(ids) - 1, 0, -1):
            place, others = start + places[index], later_ids[index - len(ids) :]
            if place > most or places[index] == places[index - 1]:  # of a character of several tokens
                continue
            tried += 1
            if tried > _MOST_CUTS:
                break
            same = others == ids[index:] and later_places[index - len(ids)] + (start > 0) == places[index]
            if same and ids[index:] == self._inner(text[place:]) and ids[:index] == self._inner(text[start:place]):
                return place
        return None

    def _with_places(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and the number of characters before each."""
        with self._refusing():
            encoding = self._text.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def _may_cut(self, text: str, place: int) -> bool:
        before, after = text[max(0, place - _LOOK_AHEAD) : place], text[place : place + _LOOK_AHEAD]
        return self._inner(before) + self._inner(after) == self._inner(before + after)

    def _inner(self, text: str) -> list[int]:
        with self._refusing():
            return self._text.encode(text, add_special_tokens=False).ids


def _utf8_size(text: str) -> int:
    return len(text.encode())


def _last_matches(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Up to a few matches of a pattern that starts with `.*`, the last one first, each in time linear in the text."""
    for _ in range(_MOST_CUTS):
        found = pattern.match(text)
        if found is None:
            return
        yield found
        text = text[: found.end()]


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
