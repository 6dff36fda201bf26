"""Tokens as text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Iterable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a row's new tokens, piece by piece.

    All pieces together are the text of prompt and new tokens without that of the prompt. A character whose bytes are
    spread over tokens comes with the last of them, text that may turn out to be a stop string when it is known not to
    be. The text ends before the stop string that is complete first, however tokens cut it (of several that end at
    one character, the longest).

    Args:
        decode: the text of token ids; incomplete characters give U+FFFD.
        prompt: token ids of the prompt, on which the text of the first new token may depend.
        stop: stop strings, not empty.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._given = list(prompt)  # tokens before the next piece's, from where characters are whole
        self._given_text = decode(self._given)
        self._new: list[int] = []
        self._held = ""  # the beginning of a stop string, perhaps

    def push(self, token: int) -> str:
        """Take a token; returns the text that can be shown now."""
        self._new.append(token)
        text = self._decode(self._given + self._new)
        if len(text) <= len(self._given_text) or text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._given_text) :]
        self._given, self._new = self._new, []
        self._given_text = self._decode(self._given)
        return self._without_stop(piece)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come; a character that stayed incomplete gives U+FFFD."""
        if self.stopped:
            return ""
        text = self._without_stop(self._decode(self._given + self._new)[len(self._given_text) :])
        self._new = []
        held, self._held = self._held, ""
        return text + held

    def _without_stop(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            _, start = min(found)
            return text[:start]
        beginnings = (stop[:size] for stop in self._stop for size in range(1, len(stop)))
        size = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]
