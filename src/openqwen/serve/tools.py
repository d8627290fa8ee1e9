"""Qwen2.5's tool calls in a stream of text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

A machine that reads one character at a time and never looks back, so that however the text was cut into pieces the same
calls come out, and the arguments are the very characters that the model wrote.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Text:
    """Words of the answer outside calls."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins: its number in the answer, and the function's name."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments, verbatim."""

    index: int
    text: str


Piece = Text | Call | Arguments


class ToolCalls:
    """`push` text as it comes, `finish` at the end; both give what is certain by then.

    White space before a call, and after the last one, belongs to the format and is dropped. What opens like a call but is none (no
    JSON object with a name) is given back as text. A call that the answer's end cuts off keeps what it had.
    """

    def __init__(self) -> None:
        self.count = 0  # calls begun
        self._out: list[Piece] = []
        self._held = ""  # white space, or the beginning of a tag, that may yet belong to a call
        # Of the call that is being read: all its characters, the key, the arguments, its number once its name is known.
        self._raw = self._key = self._arguments = ""
        self._index: int | None = None
        self._enter(self._text)

    def push(self, text: str) -> list[Piece]:
        """What these characters make certain."""
        for character in text:
            self._state(character)
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back."""
        if self._state == self._text:
            if self._held.strip(_SPACE) or not self.count:
                self._say(self._held)
        elif self._index is None:
            self._say(self._raw)
        return self._take()

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _say(self, text: str) -> None:
        if text and self._out and isinstance(self._out[-1], Text):
            self._out[-1] = Text(self._out[-1].text + text)
        elif text:
            self._out.append(Text(text))

    def _enter(self, state: Callable[[str], None]) -> None:
        self._state, self._token, self._depth, self._quoted, self._escaped = state, "", 0, False, False

    def _text(self, character: str) -> None:
        """Outside calls: all but white space and what may become a tag is passed on at once."""
        self._held += character
        tag = self._held.lstrip(_SPACE)
        if tag == OPEN:
            self._begin(self._held)
        elif tag and not OPEN.startswith(tag):
            # The tag may begin anew with this very character.
            keep = "<" if character == "<" else ""
            kept = self._held.removesuffix(keep)
            bare = kept.rstrip(_SPACE)
            self._say(bare)
            self._held = kept[len(bare) :] + keep

    def _begin(self, raw: str) -> None:
        self._raw, self._held = raw, ""
        self._key, self._arguments, self._index = "", "", None
        self._enter(self._before)

    def _broken(self) -> None:
        """Not a call after all: its characters are text. One whose name is out stands as it is."""
        if self._index is not None:
            self._enter(self._after)
            return
        self._held = "<" if self._raw.endswith("<") else ""
        self._say(self._raw.removesuffix(self._held))
        self._enter(self._text)

    def _before(self, character: str) -> None:
        """Between the tag and the object's brace."""
        self._raw += character
        if character == "{":
            self._enter(self._member)
        elif character not in _SPACE:
            self._broken()

    def _member(self, character: str) -> None:
        """Where a key may begin, or the object end."""
        self._raw += character
        if character == '"':
            self._enter(self._in_key)
            self._quoted = True
        elif character == "}":
            self._object_ends()
        elif character not in _SPACE + ",":
            self._broken()

    def _in_key(self, character: str) -> None:
        self._raw += character
        if self._quoted and not self._string_ends(character):
            self._token += character
        elif character == ":":
            self._key = "" if self._token == "arguments" and self._arguments else self._token
            self._enter(self._value)
        elif character not in _SPACE + '"':
            self._broken()

    def _value(self, character: str) -> None:
        """A value ends where its quotes and brackets balance; a bare one before a comma, a brace or white space."""
        self._raw += character
        if not self._token and character in _SPACE:
            return
        if self._quoted:
            self._add(character)
            if self._string_ends(character) and not self._depth:
                self._value_ends()
        elif not self._depth and (character in ",}" or character in _SPACE):
            self._value_ends()
            if character == "}":
                self._object_ends()
        else:
            self._quoted = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            self._add(character)
            if character in "}]" and not self._depth:
                self._value_ends()

    def _string_ends(self, character: str) -> bool:
        """Whether this character closes the string that we are in."""
        ends = character == '"' and not self._escaped
        self._escaped = character == "\\" and not self._escaped
        self._quoted = not ends
        return ends

    def _add(self, character: str) -> None:
        self._token += character
        if self._key == "arguments":
            self._arguments += character
            self._argue(character)

    def _value_ends(self) -> None:
        """The call begins when its name is whole; arguments that came before the name follow it."""
        if self._key == "name" and self._index is None and self._token.startswith('"'):
            self._index, self.count = self.count, self.count + 1
            self._out.append(Call(self._index, _unquoted(self._token)))
            self._argue(self._arguments)
        self._enter(self._member)

    def _argue(self, text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, Arguments) and last.index == self._index:
            self._out[-1] = Arguments(last.index, last.text + text)
        elif text and self._index is not None:
            self._out.append(Arguments(self._index, text))

    def _object_ends(self) -> None:
        if not self._arguments:
            self._argue("{}")
        self._broken() if self._index is None else self._enter(self._after)

    def _after(self, character: str) -> None:
        """Between the object's end and the closing tag; another call may open without one."""
        self._token = (self._token + character)[-len(CLOSE) :]
        if self._token == CLOSE:
            self._enter(self._text)
        elif self._token.endswith(OPEN):
            self._begin(OPEN)


def _unquoted(token: str) -> str:
    try:
        return json.loads(token, strict=False)
    except json.JSONDecodeError:
        return token[1:-1]
