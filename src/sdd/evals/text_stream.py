"""Text of tokens that arrive one by one: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Iterable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of new tokens after a prompt, piece by piece.

    All pieces together are the text of prompt and new tokens without the text of the prompt. A character whose bytes
    are spread over several tokens comes with the last of them. Text that may become a stop string is held back until
    it is known not to. The text ends before the first complete stop string, wherever the tokens cut it; if several end
    at the same character, before the longest.

    Args:
        decode: turns token ids into text, and incomplete characters into U+FFFD.
        prompt: token ids of the prompt; the text of the first new token may depend on them.
        stop: stop strings, none of them empty.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._given = list(prompt)  # tokens of the last piece: decoding may start here, since no character is cut
        self._given_text = decode(self._given)
        self._new: list[int] = []
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown now."""
        self._new.append(token)
        text = self._decode(self._given + self._new)
        if len(text) <= len(self._given_text) or text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._given_text) :]
        self._given, self._new = self._new, []
        self._given_text = self._decode(self._given)
        return self._without_stop(piece)

    def finish(self) -> str:
        """Return the rest of the text after the last token; a character that is still incomplete gives U+FFFD."""
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
