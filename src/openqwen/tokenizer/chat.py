"""A chat to ids, with a mask of what the assistant wrote; no message can forge a special token.

Special tokens are found in text, and the template writes them as text, so `<|im_end|>` typed by a
user would end the turn. Therefore, before rendering, a guard is put into each special token that a
message contains: a character that the chat does not contain. In the rendered text, no special token
is found where a guard is; the guards are removed before the text is encoded. Added tokens that are
not special (tool calls, words that somebody added) are found everywhere.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.template import Message, render
from openqwen.tokenizer.unicode import normalize

if TYPE_CHECKING:
    from openqwen.tokenizer.tokenizer import Tokenizer

_HEADER = "assistant\n"
Span = tuple[int, int]  # begin and end in the text of a chat
Piece = tuple[str, int | None, int]  # text, id of an added token, where it ends in the text


class _Rendered(NamedTuple):
    """A chat as text, where special tokens in messages begin, and its `{% generation %}` blocks."""

    text: str
    forged: Container[int]
    marked: list[Span]


class ChatEncoder:
    """Encodes one chat; the arguments are those of `Tokenizer.encode_chat`."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        template: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
    ):
        self._tokenizer, self._template, self._added = tokenizer, template, tokenizer.added
        self._guard = _unused_character([messages, tools, template])
        self._messages, self._tools = self._guarded(messages), self._guarded(tools)

    def encode(self, open_: bool, continued: bool) -> tuple[list[int], list[int]]:
        """(ids, mask), with a new turn of the assistant begun or the final message continued."""
        chat = self._render(self._messages, open_, continued)
        pieces = list(self._added.cut(chat.text, chat.forged.__contains__))
        spans = chat.marked or self._turns(chat.text, pieces)
        spans = spans or self._by_beginnings(chat.text, pieces)
        return self._ids_and_mask(pieces, spans, overlapping=bool(chat.marked))

    def _render(self, messages: list[Message], open_: bool, continued: bool = False) -> _Rendered:
        special = self._tokenizer.special_tokens
        text, marked = render(self._template, messages, self._tools, open_, special, continued)
        if self._guard not in text:
            return _Rendered(text, (), marked)
        parts = text.split(self._guard)
        guards = list(accumulate(map(len, parts[:-1])))  # positions in the text without guards
        before = [place + n for n, place in enumerate(guards)]  # and in the text with them
        marked = [(s - bisect_left(before, s), e - bisect_left(before, e)) for s, e in marked]
        return _Rendered("".join(parts), {place - 1 for place in guards}, marked)

    def _guarded(self, value: Any) -> Any:
        """`value` with a guard inside each protected token of its strings and keys."""
        if isinstance(value, str):
            return self._added.guarded(value, self._guard)
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(inner) for inner in value]
        return value

    def _turns(self, text: str, pieces: list[Piece]) -> list[Span]:
        """What the assistant wrote in ChatML: from the end of its header to the end token.

        If the answer itself begins with a newline, one token may hold both newlines. It is not
        marked, because the assistant did not write all of it.
        """
        spans: list[Span] = []
        start: int | None = None
        begin = 0
        for _, i, end in pieces:
            opens, ends = i == self._tokenizer.im_start_id, i in self._tokenizer.turn_ends
            if start is not None and (opens or ends):
                spans.append((start, end if ends else begin))
                start = None
            elif ends and spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)  # a second end token, directly after the first
            if opens and text.startswith(_HEADER, end):
                start = end + len(_HEADER)
            begin = end
        return spans if start is None else [*spans, (start, begin)]

    def _by_beginnings(self, text: str, pieces: list[Piece]) -> list[Span]:
        """What the assistant wrote in another template: the text that each of its messages adds.

        A span ends with its last end token: the template wrote what follows.
        """
        ends = [end for _, i, end in pieces if i in self._tokenizer.turn_ends]
        spans = []
        for n, message in enumerate(self._messages):
            if n == 0 or message["role"] != "assistant":
                continue
            try:
                before = self._render(self._messages[:n], False).text
                prompt = self._render(self._messages[:n], True).text
                after = self._render(self._messages[: n + 1], False).text
            except OpenQwenError:
                continue  # this template refuses part of a chat
            if text.startswith(prompt) and text.startswith(after):
                start = len(prompt)
                if prompt == before:
                    # The template opens no turn: the span begins with the content and the blanks
                    # before it.
                    content = (message.get("content") or "").replace(self._guard, "").strip()
                    place = max(start, text.find(content, start))
                    start = max(start, len(text[:place].rstrip(" ")))
                last = max((end for end in ends if start < end <= len(after)), default=len(after))
                spans.append((start, last))
        return spans

    def _ids_and_mask(
        self, pieces: Iterable[Piece], spans: list[Span], overlapping: bool
    ) -> tuple[list[int], list[int]]:
        """Ids, and 1 for each token that begins in a span, or, with `overlapping`, touches one."""
        chat: list[int] = []
        mask: list[int] = []
        begin = passed = 0
        for piece, i, end in pieces:
            while passed < len(spans) and spans[passed][1] <= begin:
                passed += 1
            inside: list[Span] = []  # the spans that touch this piece, relative to its beginning
            for start, stop in islice(spans, passed, None):
                if start >= end:
                    break
                inside.append((start - begin, stop - begin))
            ids = self._tokenizer.encode_plain(piece) if i is None else [i]
            chat += ids
            covered = any(start <= 0 and stop >= end - begin for start, stop in inside)
            if covered or not inside:
                mask += [int(covered)] * len(ids)
            elif i is None:
                mask += self._marks(piece, ids, inside, overlapping)
            else:
                mask.append(int(overlapping or inside[0][0] <= 0))
            begin = end
        return chat, mask

    def _marks(self, piece: str, ids: list[int], spans: list[Span], overlapping: bool) -> list[int]:
        """The mask of a plain piece, of which the spans cover a part."""
        # Tokens are placed by bytes of the normalised piece, spans by characters of the text.
        ends = list(accumulate(len(self._tokenizer.token_bytes(i)) for i in ids))
        begins = [0, *ends[:-1]]
        mask = [0] * len(ids)
        for span in spans:
            start, end = (len(normalize(piece[: max(0, place)]).encode()) for place in span)
            first = bisect_right(ends, start) if overlapping else bisect_left(begins, start)
            for n in range(first, bisect_left(begins, end)):
                mask[n] = 1
        return mask


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _unused_character(value: Any) -> str:
    """A private-use character that no string inside `value` holds."""
    used = set().union(*_strings(value))
    candidates = map(chr, range(0xE000, 0x110000))
    return next(character for character in candidates if character not in used)
