"""Any tokenizer.json: text is text, comes back, and is the same in pieces."""

import functools
import io
import json
import logging
import unicodedata
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers_tokenizers import ALL, BYTES, LOSSLESS, byte_level, metaspace, of_backend, of_spec, unigram
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from sdd.data import Tokenizer, builtin_tokenizer, text
from sdd.data.text import Document
from sdd.data.tokenizer_spec import byte_alphabet
from sdd.errors import UserError

SPELLINGS = ["</s>", "<unk>", "<s>", "[EOS]", "[UNK]", "<0x0A>", "<tool>", "<|endoftext|>"]
WORDS = [
    "It was",
    " the",
    "best ",
    "times,",
    "don't",
    "'s",
    "1941",
    "__init__",
    "中文没有空格",
    "，",
    "é",
    "e\u0301",
    "😀",
]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "    "]
drawn = st.lists(st.sampled_from([*WORDS, *SPACES, *SPELLINGS]) | st.text(max_size=3), max_size=60).map("".join)
kinds = st.sampled_from([*LOSSLESS])


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return of_backend(ALL[kind]())


@given(kinds, drawn)
def test_a_document_comes_back(kind: str, document: str):
    assume("▁" not in document)  # where it stands for a space
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(document)
    assert tokenizer.decode(ids) == document
    assert tokenizer.eos not in ids
    assert tokenizer.remarks() == []


@given(st.sampled_from([*ALL]), st.tuples(drawn, drawn).map("times, the best  of\n".join), st.integers(60, 300))
@settings(max_examples=60)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(kind: str, document: str, piece_bytes: int):
    tokenizer, data = tokenizer_of(kind), document.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", piece_bytes)
        found = [
            piece.decode()
            for piece, _ in Document("drawn", io.BytesIO(data), len(data)).pieces(0, len(data), tokenizer.last_cut)
        ]
    # Where no place is found, the cut is anywhere: a piece of 64 KiB has one.
    assume(all(tokenizer.last_cut(piece + after) <= len(piece) for piece, after in pairwise(found)))
    encoded = tokenizer.encode_batch(found, [True] + [False] * (len(found) - 1))
    assert [token for ids in encoded for token in ids] == tokenizer.encode(document)


@pytest.mark.parametrize("kind", [*LOSSLESS])
@pytest.mark.parametrize("unit", ["中文没有空格的文字", "314159", "word\n", "x", "QmFzZTY0", "\n"])
def test_a_long_text_of_any_script_is_cut_where_its_tokens_are(kind: str, unit: str):
    tokenizer, document = tokenizer_of(kind), unit * (6000 // len(unit))
    place = tokenizer.last_cut(document)
    assert 3000 < place < len(document)
    first, rest = tokenizer.encode_batch([document[:place], document[place:]], [True, False])
    assert first + rest == tokenizer.encode(document)


@given(drawn)
@settings(max_examples=30)
def test_spellings_are_text_whatever_the_file_says_of_a_token(document: str):
    flags = {"single_word": False, "lstrip": True, "rstrip": True}
    added = [
        {"id": 4096, "content": "<tool>", "special": False, "normalized": True, **flags},
        {"id": 4097, "content": "best", "special": False, "normalized": False, **flags},
        {"id": 4098, "content": "[EOS]", "special": True, "normalized": True, **flags},
    ]
    spec = json.loads(builtin_tokenizer().data)
    spec["added_tokens"][0].update(special=False, normalized=True)
    tokenizer = of_spec({**spec, "added_tokens": [*spec["added_tokens"], *added]})
    assert tokenizer.encode(document) == builtin_tokenizer().encode(document)
    assert (tokenizer.vocab_size, tokenizer.eos) == (4099, 0)


def test_words_and_pieces_of_the_model_itself_are_text_too():
    for kind in ALL:
        tokenizer = tokenizer_of(kind)
        for spelling in SPELLINGS:
            ids = tokenizer.encode(f"x {spelling} x {spelling}")
            assert tokenizer.eos not in ids
            assert kind not in LOSSLESS or tokenizer.decode(ids) == f"x {spelling} x {spelling}"


def test_runs_of_white_space_that_are_tokens_stay_so():
    backend = byte_level()
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tool>")])
    tokenizer = of_backend(backend)
    assert backend.token_to_id("    ") in tokenizer.encode("x:\n    y")
    assert backend.token_to_id("<tool>") not in tokenizer.encode("x:<tool>")
    assert tokenizer.decode(tokenizer.encode("x:\n    y<tool>")) == "x:\n    y<tool>"


@pytest.mark.parametrize("kind", ["metaspace, always", "metaspace, never", "Llama", "unigram, always"])
def test_plain_text_has_the_tokens_that_the_library_gives(kind: str):
    backend = LOSSLESS[kind]()
    for plain in ("It was the best of times", "héllo\nworld"):
        assert of_backend(backend).encode(plain) == backend.encode(plain, add_special_tokens=False).ids


def test_the_end_and_the_unknown_token_count_no_bytes():
    spec = json.loads(byte_level().to_str())
    spec["added_tokens"] = []  # so the end of text is an ordinary token of the model
    sizes = of_spec(spec).token_bytes(600)
    assert sizes is not None
    assert (sizes[0], len(sizes), sizes[500:].sum()) == (0, 600, 0)


@given(st.text(), st.sets(st.sampled_from("aetx \n中é😀"), min_size=1, max_size=4))
@settings(max_examples=20)
def test_bytes_without_a_token_are_named_and_do_not_count(document: str, gone: set[str]):
    spec, lost_bytes = single_bytes(), {byte for letter in gone for byte in letter.encode()}
    for byte in lost_bytes:
        del spec["model"]["vocab"][byte_alphabet()[byte]]
    tokenizer = of_spec(spec)
    data, sizes = (document + "".join(gone)).encode(), tokenizer.token_bytes()
    assert sizes is not None
    ids = tokenizer.encode(data.decode())
    assert tokenizer.lost_bytes(data.decode()) == sum(byte in lost_bytes for byte in data)
    assert sizes[ids].sum() + tokenizer.lost_bytes(data.decode()) == len(data)
    assert tokenizer.remarks() == [f"{len(lost_bytes)} of the 243 bytes that UTF-8 uses are left out"]


def single_bytes() -> dict[str, Any]:
    """A tokenizer whose tokens are bytes."""
    spec = json.loads(builtin_tokenizer().data)
    vocabulary = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    return {**spec, "added_tokens": [], "model": {**spec["model"], "merges": [], "vocab": {**vocabulary, "</s>": 256}}}


def test_what_is_lost_or_changed_is_said_at_load(tmp_path, caplog):
    def said(backend: Backend) -> str:
        caplog.clear()
        backend.save(str(tmp_path / "tokenizer.json"))
        with caplog.at_level(logging.WARNING):
            Tokenizer.load(tmp_path)
        assert len(caplog.messages) <= 1
        return "".join(caplog.messages)

    plain = byte_level()
    assert said(plain) == ""
    for changing, name in ((normalizers.NFC(), "NFC"), (normalizers.Lowercase(), "Lowercase")):
        plain.normalizer = normalizers.Sequence([changing])
        assert f"does not give every text back: its normalizer changes text ({name})" in said(plain)
    assert "become [UNK]" in said(ALL["WordLevel"]())
    assert "does not keep white space" in said(ALL["WordPiece"]())
    letters = Backend(models.BPE({"a": 0, "b": 1}, []))
    assert "the characters that its vocabulary lacks are left out" in said(letters)
    assert "are refused" in said(Backend(models.WordLevel({"a": 0})))


def test_characters_without_a_token_are_counted():
    letters = Backend(models.BPE({"a": 0, "b": 1, " ": 2}, []))
    letters.decoder = decoders.Fuse()
    tokenizer = of_backend(letters)
    assert tokenizer.decode(tokenizer.encode("ab éé a")) == "ab  a"
    assert tokenizer.lost_bytes("ab éé a") == 4
    assert of_backend(metaspace("always")).lost_bytes("😀") == 0


def test_a_tokenizer_that_refuses_text_is_named():
    words = of_backend(Backend(models.WordLevel({"a": 0})))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot encode a text \(.*UNK.*take a tokenizer with"):
        words.encode("b")


def test_an_end_that_text_needs_is_refused():
    tokenizer = of_spec(single_bytes())
    with pytest.raises(UserError, match=r"text needs the token '\.', it cannot end a text: name another"):
        tokenizer.ending_with(".", "--eos TOKEN")


def test_normalised_text_comes_back_normalised():
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    tokenizer = of_backend(backend)
    assert tokenizer.decode(tokenizer.encode("e\u0301 x")) == unicodedata.normalize("NFC", "e\u0301 x")


def test_only_ids_with_text_and_the_end_may_be_written():
    backend = unigram("always")
    backend.add_special_tokens(["<pad>"])
    writable = of_backend(backend).writable(700)
    names = backend.get_vocab(with_added_tokens=True)
    assert not np.flatnonzero(writable).max() >= len(names)
    silent = {name for name, index in names.items() if not writable[index]}
    assert silent == {"<unk>", "<pad>"}
    assert set(BYTES) <= names.keys()
