"""Finds Qwen2.5's tool calls in a stream of text.

A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. The parser reads one character
at a time, so the calls do not depend on how the text was cut into pieces. Arguments come out as
exactly the characters that the model wrote.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"
# What models write around calls instead of the tag; llama.cpp accepts the same.
FENCES = ("```", "```json", "```xml")
TAGS = ("<tools>", "<tool>", "<function_call>", "<response>", "<json>", "<xml>", "<JSON>")
_BEFORE = [a + b + c for a in ("", *FENCES) for b in ("", *TAGS) for c in ("", "[")]
_ANY_TAG = "|".join(tag[1:-1] for tag in (OPEN, *TAGS))
_BETWEEN = re.compile(rf"([\s,\[\]]|```(json|xml)?|</?({_ANY_TAG})>)*")


@dataclass(frozen=True)
class Text:
    """Text of the answer, outside of calls."""

    text: str


@dataclass(frozen=True)
class Call:
    """The start of a call. index: the number of the call in the answer."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """A further part of a call's arguments."""

    index: int
    text: str


Piece = Text | Call | Arguments


class ToolCalls:
    """A parser: `push` takes text, `finish` ends it; both return the pieces that are certain.

    White space before a call, and after the last one, belongs to the format and is dropped. What
    begins like a call, but has no JSON object with a name, is text. A call that the end of the
    answer cuts off keeps the arguments that it has.

    names: functions whose calls are recognised without a tag too, if the answer holds nothing
    else. Qwen2.5-Coder writes them bare or in a fence. Text that may become such an answer is held
    back until the end.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self.count = 0  # calls that have begun
        self._names = names
        # The beginnings of an answer of calls without tags, without white space. Cleared when the
        # answer turns out to be something else.
        self._heads = [f'{before}{{"name":"{name}"' for before in _BEFORE for name in names]
        self._out: list[Piece] = []
        self._held = ""  # white space, or the beginning of a tag, that may belong to a call
        self._begin("")
        self._state = self._text

    def push(self, text: str) -> list[Piece]:
        """Read text; returns the pieces that are certain now."""
        self._read(text)
        return self._take()

    def finish(self) -> list[Piece]:
        """End the text; returns the pieces that were held back."""
        if self._state == self._untagged:
            self._read_untagged()
        if self._state != self._text:
            self._add_text(self._raw if self._index is None else "")
        elif self._held.strip(_SPACE) or not self.count:
            self._add_text(self._held)
        return self._take()

    def _read(self, text: str) -> None:
        for character in text:
            self._state(character)

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _add_text(self, text: str) -> None:
        if text:
            self._heads = []
        last = self._out[-1] if self._out else None
        if isinstance(last, Text):
            self._out[-1] = Text(last.text + text)
        elif text:
            self._out.append(Text(text))

    def _add_arguments(self, text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, Arguments) and last.index == self._index:
            self._out[-1] = Arguments(last.index, last.text + text)
        elif text and self._index is not None:
            self._out.append(Arguments(self._index, text))

    def _text(self, character: str) -> None:
        """State: outside of calls. White space, and what may become a tag, is held back."""
        self._held += character
        tag = self._held.lstrip(_SPACE)
        if tag == OPEN:
            self._begin(self._held)
        elif tag and not OPEN.startswith(tag) and not self._may_be_untagged(tag):
            if self._heads:
                self._read_as_tagged()
                return
            first = "<" if character == "<" else ""  # a tag may begin with this character
            held = self._held.removesuffix(first)
            text = held.rstrip(_SPACE)
            self._add_text(text)
            self._held = held[len(text) :] + first

    def _may_be_untagged(self, text: str) -> bool:
        """Whether the text may become an answer of calls without tags."""
        bare = "".join(text.split())
        if any(map(bare.startswith, self._heads)):
            self._state = self._untagged
        return any(bare.startswith(head) or head.startswith(bare) for head in self._heads)

    def _untagged(self, character: str) -> None:
        """State: an answer that began like calls without tags; all is held back."""
        self._held += character

    def _read_untagged(self) -> None:
        """Read the held answer as calls without tags, or, if it is something else, as any other."""
        calls = _only_calls(self._held, self._names)
        if calls is None:
            self._read_as_tagged()
            return
        for call in calls:
            self._begin("")
            self._read(call)
        self._state = self._text

    def _read_as_tagged(self) -> None:
        """Read what was held back again, as an answer in which calls have tags."""
        held, self._held, self._heads, self._state = self._held, "", [], self._text
        self._read(held)

    def _begin(self, raw: str) -> None:
        """Begin a call. raw: its characters, which become text if it turns out to be no call."""
        self._raw, self._held, self._arguments = raw, "", ""
        self._index: int | None = None  # until the name is known
        self._key: str | None = None  # the key of the value being read; None: a key comes next
        self._token = ""  # the key or value being read
        self._depth, self._quoted, self._escaped = 0, False, False
        self._state = self._before

    def _before(self, character: str) -> None:
        """State: between the tag and the object's brace."""
        self._raw += character
        if character == "{":
            self._state = self._inside
        elif character not in _SPACE:
            self._end()

    def _inside(self, character: str) -> None:
        """State: in the object. A key or value ends where its quotes and brackets balance."""
        self._raw += character
        if self._quoted:
            self._add(character)
            self._quoted = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
            if not self._quoted and not self._depth and self._key is not None:
                self._value_ends()
        elif self._depth or self._key is not None:  # in a value
            if not self._depth and (character in ",}" or (self._token and character in _SPACE)):
                self._value_ends()
                if character == "}" and self._state == self._inside:
                    self._end()
            elif self._token or character not in _SPACE:
                self._depth += (character in "{[") - (character in "}]")
                self._quoted = character == '"'
                self._add(character)
                if character in "}]" and not self._depth:
                    self._value_ends()
        elif character == '"':
            self._quoted, self._token = True, '"'
        elif character == ":" and self._token:
            again = self._token == '"arguments"' and self._arguments
            self._key, self._token = "" if again else self._token, ""
        elif character == "}" or character not in _SPACE + ",":
            self._end()

    def _add(self, character: str) -> None:
        self._token += character
        if self._key == '"arguments"':
            self._arguments += character
            self._add_arguments(character)

    def _value_ends(self) -> None:
        """A name begins the call; arguments that came before the name follow it."""
        if self._key == '"name"' and self._index is None and self._token.startswith('"'):
            self._index, self.count = self.count, self.count + 1
            self._out.append(Call(self._index, _unquoted(self._token)))
            self._add_arguments(self._arguments)
        self._key, self._token = None, ""

    def _end(self) -> None:
        """End the object; without a name it was no call, and its characters are text."""
        if self._index is None:
            self._held = "<" if self._raw.endswith("<") else ""
            self._add_text(self._raw.removesuffix(self._held))
            self._state = self._text
        else:
            self._add_arguments("" if self._arguments else "{}")
            self._token, self._state = "", self._after

    def _after(self, character: str) -> None:
        """State: between the object and the closing tag, which models may forget."""
        self._token = (self._token + character)[-len(CLOSE) :]
        if self._token == CLOSE:
            self._state = self._text
        elif self._token.endswith(OPEN):
            self._begin(OPEN)


def _only_calls(text: str, names: Collection[str]) -> list[str] | None:
    """The JSON objects of a text that holds only calls of these functions, else None."""
    calls, at = [], 0
    # The expression always matches, if only the empty text.
    while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not value.keys() <= {"name", "arguments"}:
            return None
        if value.get("name") not in names or not isinstance(value.get("arguments", {}), dict):
            return None
        calls.append(text[at:end])
        at = end
    return calls


def _unquoted(token: str) -> str:
    try:
        return json.loads(token, strict=False)
    except json.JSONDecodeError:
        return token[1:-1]
