"""Text of tokens that arrive one by one: whole characters, and nothing of a stop string, wherever tokens cut it."""

from collections.abc import Iterable

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from sdd.data import builtin_tokenizer
from sdd.evals.text_stream import TextStream

BUILTIN = builtin_tokenizer()
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def of_bytes(ids: Iterable[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, by trying every beginning of the text."""
    for end in range(len(text) + 1):
        found = [word for word in stop if text[:end].endswith(word)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def pieces(stream: TextStream, tokens: Iterable[int]) -> list[str]:
    shown = []
    for token in tokens:
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()]


@given(st.lists(st.text("ab", max_size=5), max_size=8), stops)
@example(["a", "bc"], ["b", "abc"])
def test_text_ends_before_the_first_complete_stop_string(words: list[str], stop: list[str]):
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), [], stop)
    shown = pieces(stream, range(len(words)))
    text, stopped = cut("".join(words), stop)
    assert ("".join(shown), stream.stopped) == (text, stopped)
    for count in range(len(shown)):  # nothing was shown that had to be taken back, and no more held than needed
        seen = "".join(words[: count + 1])
        held = seen[len("".join(shown[: count + 1])) :]
        assert stopped or held == "" or any(word.startswith(held) for word in stop)


@given(st.text(max_size=10), st.text(max_size=20), stops)
def test_characters_of_many_bytes_come_whole(prompt: str, text: str, stop: list[str]):
    stream = TextStream(of_bytes, list(prompt.encode()), stop)
    shown = pieces(stream, text.encode())
    assert "".join(shown) == cut(text, stop)[0]
    if not stop:
        sizes = [size for character in text for size in [0] * (len(character.encode()) - 1) + [1]]
        waits = "\N{REPLACEMENT CHARACTER}" in text  # it looks like an incomplete one
        assert waits or list(map(len, shown)) == [*sizes, 0]


@given(st.text(max_size=10), st.lists(st.integers(0, 4095), max_size=20))
def test_any_tokens_give_the_text_that_all_at_once_give(prompt: str, tokens: list[int]):
    ids = BUILTIN.encode(prompt)
    whole = BUILTIN.decode(ids + tokens)
    assert prompt + "".join(pieces(TextStream(BUILTIN.decode, ids), tokens)) == whole


@given(st.text("ab é€", max_size=8), st.text("ab é€", max_size=8))
def test_a_tokenizer_that_drops_the_first_space_keeps_that_between_prompt_and_text(prompt: str, text: str):
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    letters = {" ": [256], "a": [257], "b": [258]}
    before, after = ([i for letter in part for i in letters.get(letter, letter.encode())] for part in (prompt, text))
    assert "".join(pieces(TextStream(backend.decode, [256, *before]), after)) == text


def test_an_incomplete_character_at_the_end_is_shown_as_such():
    stream = TextStream(of_bytes, b"x")
    assert pieces(stream, "é€".encode()[:-1]) == ["", "é", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("tokens", [b"\xff\xfea", b"\xe2\x82a", b"\xe2\xe2\x82\xac"])
def test_bytes_that_are_no_text_do_not_hold_up_what_comes_after(tokens: bytes):
    stream = TextStream(of_bytes, b"")
    assert "".join(stream.push(token) for token in tokens) == tokens.decode(errors="replace")
