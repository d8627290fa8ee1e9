"""What a record is and what it says, whatever its form; and how it is shown, within limits."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import parse_json
from openqwen.support.records import Record
from openqwen.tokenizer.messages import Message, Tools, demonstration, preference, prompt

_LONGEST = 100_000  # characters of one text that are shown
_MOST = 200  # messages that are shown
# Fields that are shown as a conversation; all others are shown as JSON.
_SHOWN = {
    "messages", "conversations", "conversation", "prompt", "instruction", "query", "question",
    "input", "completion", "output", "response", "answer", "chosen", "rejected", "text", "system",
    "history", "rejected_response", "rejected_messages", "tools", "functions",
}  # fmt: skip
_SIDES = ("chosen", "rejected", "rejected_response", "rejected_messages")
_GRADES = ("score", "grade", "reward", "margin", "passed", "quality")
_TAGS = ("tags", "tasks")


@dataclass
class RecordParts:
    """A record as the page shows it.

    form: task, preference, demonstration, prompt, document, decision, quarantined or other.
    messages: the conversation, or a preference's prompt. text: of a document.
    """

    form: str
    messages: list[Message] = field(default_factory=list)
    chosen: Message | None = None
    rejected: Message | None = None
    tools: Tools = None
    text: str = ""

    def texts(self) -> Iterable[str]:
        """All that is said, in order."""
        sides = [side for side in (self.chosen, self.rejected) if side]
        for message in [*self.messages, *sides]:
            yield message["content"]
            if message.get("tool_calls"):
                yield json.dumps(message["tool_calls"], ensure_ascii=False)
        if self.text:
            yield self.text

    def prompt(self) -> str:
        """What is asked; of a document, its text."""
        asked = [m["content"] for m in self.messages if m["role"] == "user"]
        return asked[-1] if asked else self.text


def describe(record: Record) -> RecordParts:
    """The form of a record and its parts. A record of no known form is "other"."""
    forms = ["demonstration", "prompt"]
    if isinstance(record.get("grader"), str) and "prompt" in record:
        forms = ["task"]
    elif any(record.get(side) is not None for side in _SIDES):
        forms = ["preference"]
    elif isinstance(record.get("text"), str):
        form = "quarantined" if isinstance(record.get("reason"), str) else "document"
        return RecordParts(form, text=record["text"])
    elif {"step", "rule", "kept"} <= record.keys():  # of a corpus: decisions.parquet
        return RecordParts("decision", text=f"{record['rule']}: {record.get('why')}")
    for form in forms:
        # TypeError, AttributeError: a field has another type than its name says.
        with suppress(OpenQwenError, TypeError, AttributeError):
            if form == "preference":
                return RecordParts(form, *preference(record))
            messages, tools = (demonstration if form == "demonstration" else prompt)(record)
            return RecordParts(form, messages, tools=tools)
    return RecordParts("other")


def origin_of(record: Record) -> dict[str, Any]:
    """How a record came to be: its `origin`, and of a document its `meta`, which may be JSON."""
    found: dict[str, Any] = {}
    for name in ("meta", "origin"):
        value = record.get(name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                value = parse_json(value)
            except ValueError:
                continue
        if isinstance(value, dict):
            # The corpus stage keeps the origin of a synthetic document in its meta.
            inner = value.get("origin")
            found |= value | (inner if isinstance(inner, dict) else {})
    return found


def facets(record: Record, form: str) -> dict[str, str]:
    """The values by which records are counted and filtered; "" where a record has none."""
    origin = origin_of(record)
    found = {"form": form}
    for name in ("method", "model", "kind", "source", "language", "grader", "reason"):
        value = record.get(name, origin.get(name))
        found[name] = value[:200] if isinstance(value, str) else ""
    if form == "decision":
        found["reason"], found["kind"] = str(record["rule"])[:200], str(record["step"])[:200]
    found["reason"] = found["reason"].partition(":")[0]  # behind it are details of one record
    if not found["kind"] and isinstance(origin.get("task"), str):
        found["kind"] = origin["task"][:200]
    return found


def tags(record: Record) -> list[str]:
    """The tags of a record: texts, or objects with a "tag"."""
    origin = origin_of(record)
    found: dict[str, None] = {}
    for name in _TAGS:
        values = record.get(name) or origin.get(name)
        for value in values[:100] if isinstance(values, list) else ():
            tag = value.get("tag") if isinstance(value, dict) else value
            if isinstance(tag, str) and tag:
                found[tag[:200]] = None
    return list(found)


def grade(record: Record) -> float | None:
    """The first number under a usual name for a grade, in the record or its origin."""
    for holder in (record, origin_of(record)):
        for name in _GRADES:
            value = holder.get(name)
            value = value.get("score") if isinstance(value, dict) else value
            if isinstance(value, int | float) and abs(value) < 1e300:
                return float(value)
    return None


def shown(record: Record) -> dict[str, Any]:
    """The record for the page: long texts are cut, and say how long they were."""
    parts = describe(record)
    hidden = _SHOWN if parts.form != "other" else ()
    rest = {name: value for name, value in record.items() if name not in hidden}
    return {
        "form": parts.form,
        "messages": [_message(message) for message in parts.messages[:_MOST]],
        "messages_left_out": max(0, len(parts.messages) - _MOST),
        "chosen": parts.chosen and _message(parts.chosen),
        "rejected": parts.rejected and _message(parts.rejected),
        "text": _text(parts.text) if parts.text else None,
        "tools": parts.tools and _json(parts.tools),
        "fields": _json(rest) if rest else None,
        "tags": tags(record),
        "grade": grade(record),
    }


def _text(text: str) -> dict[str, Any]:
    return {"text": text[:_LONGEST], "characters": len(text), "cut": len(text) > _LONGEST}


def _json(value: Any) -> dict[str, Any]:
    return _text(json.dumps(value, indent=2, ensure_ascii=False))


def _message(message: Message) -> dict[str, Any]:
    calls = [
        {
            "name": call["function"]["name"],
            "arguments": _json(call["function"].get("arguments")),
        }
        for call in message.get("tool_calls", ())[:_MOST]
    ]
    return {"role": message["role"], **_text(message["content"]), "calls": calls}
