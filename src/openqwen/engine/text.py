"""A request's text as it grows: whole characters only, and nothing that a stop text may still take
back.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from openqwen.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text. However the text is cut into tokens, what was given is always a
    beginning of the whole.

    A character spread over tokens comes with its last byte. An end of the text that may be the
    beginning of a stop text is held back until the next characters decide. `stopped`: a stop text
    has come; it is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this id makes final, often none."""
        if self._tokenizer.is_hidden(token):
            return ""
        piece = self._decoder.decode(self._tokenizer.token_bytes(token))
        return self._rule(piece) if self._stops else piece

    def finish(self) -> str:
        """What is left: held text, and U+FFFD for an incomplete character.

        None after a stop text.
        """
        if self.stopped:
            return ""
        piece = self._decoder.decode(b"", final=True)
        final = self._rule(piece) if self._stops else piece
        rest, self._held = self._held, ""
        return final + rest

    def _rule(self, piece: str) -> str:
        """Add to the held text; give the part of it that no stop text can take any more."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that was complete first rules, as if the characters had come one by one
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
