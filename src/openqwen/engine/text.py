"""The text of an answer while it grows."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from openqwen.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text that does not change later, however the text is cut into tokens.

    A character that is spread over tokens is returned with its last byte. An end of the text that
    can be the beginning of a stop text is held back until the next characters decide.

    stopped: whether a stop text has come; it is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token completes; often it is empty."""
        if self._tokenizer.is_hidden(token):
            return ""
        piece = self._decoder.decode(self._tokenizer.token_bytes(token))
        return self._before_stop(piece) if self._stops else piece

    def finish(self) -> str:
        """The rest: held text, and U+FFFD for an incomplete character; empty after a stop text."""
        if self.stopped:
            return ""
        piece = self._decoder.decode(b"", final=True)
        text = self._before_stop(piece) if self._stops else piece
        rest, self._held = self._held, ""
        return text + rest

    def _before_stop(self, piece: str) -> str:
        """Add to the held text; return the part that cannot belong to a stop text."""
        text = self._held + piece
        ends = []
        for stop in self._stops:
            if (start := text.find(stop)) >= 0:
                ends.append((start + len(stop), start))
        if ends:  # the stop text that ends first counts, as if the characters had come one by one
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
