import io
import time
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sdd.data import builtin_tokenizer, text
from sdd.data.text import SMALLEST_TAIL, Document, TailSplit, piece_end, split_point
from sdd.errors import UserError

words = st.text("abcAB'1.,é", min_size=1, max_size=8)
spaces = st.sampled_from([" ", " ", " ", "\n", "\n\n", "  ", " \n", "\r\n"])
prose = st.lists(st.tuples(words, spaces), min_size=1).map(lambda pairs: "".join(w + s for w, s in pairs))


def document(string: str) -> Document:
    data = string.encode()
    return Document("drawn", io.BytesIO(data), len(data))


@given(st.text() | prose, st.integers(0, 200), st.integers(4, 40))
def test_pieces_of_head_and_tail_are_the_document(string: str, tail: int, piece_bytes: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", piece_bytes)
        doc = document(string)
        cut = split_point(doc.file, doc.size, tail)
        pieces = [*doc.pieces(0, cut), *doc.pieces(cut, doc.size)]
    assert "".join(piece.decode() for piece, _ in pieces) == string
    assert [last for _, last in pieces].count(True) == (cut > 0) + (cut < doc.size)
    assert doc.size - cut <= tail
    assert doc.size - cut >= min(tail, doc.size) // 2 - 4


@given(prose)
def test_tokens_of_the_pieces_are_the_tokens_of_the_whole(string: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", 40)
        doc = document(string)
        pieces = [piece.decode() for piece, _ in doc.pieces(0, doc.size)]
    # Where 40 bytes have neither a space inside a line nor a line's end, the cut is anywhere: 64 KiB of text have.
    assume(all(piece.endswith("\n") or following[0].isspace() for piece, following in pairwise(pieces)))
    tokens = [token for piece in pieces for token in builtin_tokenizer().encode(piece)]
    assert tokens == builtin_tokenizer().encode(string)


def test_cuts_are_between_lines_before_sentences_before_words():
    assert split_point(io.BytesIO(b"One. Two\nthree. Four"), 20, 16) == len("One. Two\n")
    assert split_point(io.BytesIO(b"One. Two. Three four"), 20, 16) == len("One. Two.")
    assert split_point(io.BytesIO(b"one two three four x"), 20, 16) == len("one two")


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=60), st.sampled_from([0.05, 0.2]))
def test_the_held_out_share_is_kept_whatever_the_sizes(sizes: list[int], fraction: float):
    total = sum(sizes)
    split = TailSplit(fraction, total)
    tails = [size - split.cut(document("some words " * (size // 11) + "." * (size % 11))) for size in sizes]
    assert sum(tails) <= fraction * total
    assert sum(tails) >= fraction * total / 2 - SMALLEST_TAIL
    assert sum(tails) > 0 or fraction * total < 10


def test_large_documents_each_give_their_own_tail():
    split = TailSplit(0.05, 10**6)
    for _ in range(10):
        assert 94_000 < split.cut(document("word " * 20_000)) < 97_500


@pytest.mark.parametrize(
    "data",
    [b"word\n" * 13_000, b"word\t" * 13_000, b"x" * 65_000, b"\xe4\xb8\xad" * 21_000, b"  word" * 10_000],
    ids=["words in lines", "words between tabs", "one word", "Chinese", "double spaces"],
)
def test_cutting_takes_time_in_proportion_to_the_text(data: bytes):
    began = time.perf_counter()
    assert piece_end(data) > len(data) - 10
    assert time.perf_counter() - began < 1  # searching from every byte took a minute


def test_what_is_not_utf8_is_named_with_its_place():
    data = b"word " * 20_000 + "café".encode("latin1")
    latin = Document("latin1.txt", io.BytesIO(data), len(data))
    with pytest.raises(UserError, match=r"latin1\.txt is not UTF-8 text \(byte 100003\)"):
        list(latin.pieces(0, latin.size))
