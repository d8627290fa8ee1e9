"""Qwen2.5's tool calls in a stream of text: `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`.

A machine that reads one character at a time and never looks back, so that however the text was cut
into pieces the same calls come out, and the arguments are the very characters that the model wrote.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"
# What models write about calls in place of the tag; llama.cpp knows the same.
FENCES = ("```", "```json", "```xml")
TAGS = ("<tools>", "<tool>", "<function_call>", "<response>", "<json>", "<xml>", "<JSON>")
_BEFORE = [a + b + c for a in ("", *FENCES) for b in ("", *TAGS) for c in ("", "[")]
_ANY_TAG = "|".join(tag[1:-1] for tag in (OPEN, *TAGS))
_BETWEEN = re.compile(rf"([\s,\[\]]|```(json|xml)?|</?({_ANY_TAG})>)*")


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

    White space before a call, and after the last one, belongs to the format and is dropped. What
    opens like a call but is none (no JSON object with a name) is given back as text. A call that
    the answer's end cuts off keeps what it had.
    names: of functions whose calls are known without a tag too, where the answer is nothing else:
    Qwen2.5-Coder writes them bare or in a fence. What may become such an answer is held back.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self.count = 0  # calls begun
        self._names = names
        # How an answer of calls without tags begins, but for its blanks.
        # Emptied when something else is said.
        self._heads = [f'{before}{{"name":"{name}"' for before in _BEFORE for name in names]
        self._out: list[Piece] = []
        self._held = ""  # white space, or the beginning of a tag, that may yet belong to a call
        self._begin("")
        self._state = self._text

    def push(self, text: str) -> list[Piece]:
        """What these characters make certain."""
        for character in text:
            self._state(character)
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back."""
        if self._state == self._whole:
            self._read_whole()
        if self._state != self._text:
            self._say(self._raw if self._index is None else "")
        elif self._held.strip(_SPACE) or not self.count:
            self._say(self._held)
        return self._take()

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _say(self, text: str) -> None:
        if text:
            self._heads = []
        last = self._out[-1] if self._out else None
        if isinstance(last, Text):
            self._out[-1] = Text(last.text + text)
        elif text:
            self._out.append(Text(text))

    def _argue(self, text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, Arguments) and last.index == self._index:
            self._out[-1] = Arguments(last.index, last.text + text)
        elif text and self._index is not None:
            self._out.append(Arguments(self._index, text))

    def _text(self, character: str) -> None:
        """Outside calls: all but white space and what may become a tag is passed on at once."""
        self._held += character
        tag = self._held.lstrip(_SPACE)
        if tag == OPEN:
            self._begin(self._held)
        elif tag and not OPEN.startswith(tag) and not self._untagged(tag):
            if self._heads:  # what was held back is read anew
                self._again()
                return
            keep = (
                "<" if character == "<" else ""
            )  # the tag may begin anew with this very character
            kept = self._held.removesuffix(keep)
            said = kept.rstrip(_SPACE)
            self._say(said)
            self._held = kept[len(said) :] + keep

    def _untagged(self, text: str) -> bool:
        """Whether this may become an answer of calls without tags; the end decides."""
        bare = "".join(text.split())
        if any(map(bare.startswith, self._heads)):
            self._state = self._whole
        return any(bare.startswith(head) or head.startswith(bare) for head in self._heads)

    def _whole(self, character: str) -> None:
        self._held += character

    def _read_whole(self) -> None:
        """At the end of an answer that began as calls without tags."""
        calls = _only_calls(self._held, self._names)
        if calls is None:
            self._again()
            return
        for call in calls:
            self._begin("")
            for character in call:
                self._state(character)
        self._state = self._text

    def _again(self) -> None:
        """Read what was held back as an answer in which calls have tags."""
        held, self._held, self._heads, self._state = self._held, "", [], self._text
        for character in held:
            self._state(character)

    def _begin(self, raw: str) -> None:
        """A tag has opened a call: its characters, its number once its name is known, and the value
        being read.
        """
        self._raw, self._held, self._arguments = raw, "", ""
        self._index: int | None = None
        self._key: str | None = None  # None: a key is awaited
        self._token, self._depth, self._quoted, self._escaped = "", 0, False, False
        self._state = self._before

    def _before(self, character: str) -> None:
        """Between the tag and the object's brace."""
        self._raw += character
        if character == "{":
            self._state = self._inside
        elif character not in _SPACE:
            self._end()

    def _inside(self, character: str) -> None:
        """In the object: keys and values end where their quotes and brackets balance."""
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
            self._argue(character)

    def _value_ends(self) -> None:
        """The call begins when its name is whole; arguments that came before the name follow it."""
        if self._key == '"name"' and self._index is None and self._token.startswith('"'):
            self._index, self.count = self.count, self.count + 1
            self._out.append(Call(self._index, _unquoted(self._token)))
            self._argue(self._arguments)
        self._key, self._token = None, ""

    def _end(self) -> None:
        """The object has ended, or is broken; without a name it was no call, and its characters are
        text.
        """
        if self._index is None:
            self._held = "<" if self._raw.endswith("<") else ""
            self._say(self._raw.removesuffix(self._held))
            self._state = self._text
        else:
            self._argue("" if self._arguments else "{}")
            self._token, self._state = "", self._after

    def _after(self, character: str) -> None:
        """Between the object's end and the closing tag; another call may open without one."""
        self._token = (self._token + character)[-len(CLOSE) :]
        if self._token == CLOSE:
            self._state = self._text
        elif self._token.endswith(OPEN):
            self._begin(OPEN)


def _only_calls(text: str, names: Collection[str]) -> list[str] | None:
    """The objects of a text that is nothing but calls of these functions; None for any other."""
    found, at = [], 0
    # The expression matches the empty text too.
    while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not value.keys() <= {"name", "arguments"}:
            return None
        if value.get("name") not in names or not isinstance(value.get("arguments", {}), dict):
            return None
        found.append(text[at:end])
        at = end
    return found


def _unquoted(token: str) -> str:
    try:
        return json.loads(token, strict=False)
    except json.JSONDecodeError:
        return token[1:-1]
