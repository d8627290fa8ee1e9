"""Finds added tokens in text, with the flags and the results of Hugging Face's `tokenizers`."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

import regex

from openqwen.tokenizer.control import ControlToken
from openqwen.tokenizer.unicode import mask_newer_letters, normalize

_SPACES, _SPACES_BEFORE = regex.compile(r"\s*"), regex.compile(r"(?r)\s*")
_WORD = regex.compile(r"\w")
Span = tuple[int, int, int | None]  # start, end, id of an added token


class AddedTokens:
    """The added tokens of one vocabulary.

    tokens: the id of each. protected: ids that a user's text must never give.
    """

    def __init__(self, tokens: Mapping[ControlToken, int], protected: Iterable[int]):
        self.protected = frozenset(protected)
        raw, normalized = {}, {}
        for token, i in tokens.items():
            if token.normalized:
                normalized[normalize(token.content)] = (token, i)
            else:
                raw[token.content] = (token, i)
        self._raw = _Finder(raw, self.protected)
        self._normalized = _Finder(normalized, self.protected)

    def cut(
        self, text: str, as_text: Callable[[int], bool]
    ) -> Iterator[tuple[str, int | None, int]]:
        """Pieces of `text` in order: (text, id of the added token or None, where the piece ends).

        as_text: tells whether a protected token that begins at this character of `text` stays text.
        As in `tokenizers`, tokens that are not `normalized` are found first, in the text itself.
        The others are found in the NFC form of the rest; those pieces are then in NFC.
        """
        for start, end, i in self._raw.spans(text, as_text):
            if i is not None or not self._normalized:
                yield text[start:end], i, end
                continue
            piece = text[start:end]
            form = normalize(piece)
            place = _places(piece, form)

            def stays(n: int, start: int = start, place: Callable[[int], int] = place) -> bool:
                return as_text(start + place(n))

            for first, last, inner in self._normalized.spans(form, stays):
                yield form[first:last], inner, start + place(last)

    def guarded(self, text: str, guard: str) -> str:
        """`text` with `guard` after the first character of each possible protected token."""
        for finder in (self._raw, self._normalized):
            if finder.protected:
                text = normalize(text) if finder is self._normalized else text
                text = finder.protected.sub(rf"\1{guard}", text)
        return text


class _Finder:
    """Finds these contents in text: the leftmost match, and of several there the longest."""

    def __init__(self, tokens: Mapping[str, tuple[ControlToken, int]], protected: frozenset[int]):
        self._tokens, self._ids = tokens, protected
        self._pattern = re.compile(_expression(tokens)) if tokens else None
        forbidden = [content for content, (_, i) in tokens.items() if i in protected]
        behind = rf"(?=(?:{_expression(forbidden)}))(.)"
        self.protected = re.compile(behind, re.DOTALL) if forbidden else None

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def spans(self, text: str, as_text: Callable[[int], bool]) -> Iterator[Span]:
        """Adjacent spans that cover `text`. A match that its flags exclude is text."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, i = self._tokens[match[0]]
            start, end = match.span()
            if i in self._ids and as_text(start):
                continue
            if token.single_word and (_is_word(text[:start][-1:]) or _is_word(text[end : end + 1])):
                continue
            if token.lstrip:
                start = max(done, _SPACES_BEFORE.match(text, 0, start).start())
            if token.rstrip:
                end = _SPACES.match(text, end).end()
            if done < start:
                yield done, start, None
            yield start, end, i
            done = end
        if done < len(text) or not text:
            yield done, len(text), None


def _expression(contents: Iterable[str]) -> str:
    """A regular expression of these texts as a tree of common prefixes: fast for thousands."""
    branches = []
    for _, group in groupby(sorted(contents), key=lambda content: content[0]):
        same = list(group)
        shortest, last = same[0], same[-1]  # of sorted texts, these two differ first
        size = next((n for n, (a, b) in enumerate(zip(shortest, last)) if a != b), None)
        prefix = shortest[:size]
        rest = _expression(content[len(prefix) :] for content in same if content != prefix)
        optional = "?" if prefix in same else ""
        branches.append(re.escape(prefix) + (f"(?:{rest}){optional}" if rest else ""))
    return "|".join(branches)


def _is_word(character: str) -> bool:
    return _WORD.match(mask_newer_letters(character)) is not None


def _places(text: str, form: str) -> Callable[[int], int]:
    """A function from positions in `form`, the NFC form of `text`, to positions in `text`."""
    if text == form:
        return lambda n: n
    places = range(len(text))
    return lambda n: bisect_left(places, n, key=lambda place: len(normalize(text[:place])))
