"""Grammars of answers that may or must hold tool calls, in llguidance's notation."""

import json
import re
from typing import Any

from openqwen.engine import Structure
from openqwen.engine.schema import LENIENT, faults, ready
from openqwen.http.errors import ApiError
from openqwen.serve.tools import TAGS

Json = dict[str, Any]
# The white space of calls in Qwen2.5's training data. Where a grammar allows any amount of it, a
# model may never stop writing it.
_AS_TRAINED: Json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def enforceable(schema: Json, strict: bool, where: str, name: str) -> Json:
    """The schema in the form that a grammar can enforce.

    Args:
        schema: the client's JSON schema.
        strict: whether each keyword of it must be enforced.
        where: the field of the request.
        name: the name of the tool or of the response format.

    Raises:
        ApiError: a part of the schema cannot be enforced; the message names each.
    """
    schema = ready(schema, strict)
    if problems := "; ".join(faults(schema, strict))[:400]:
        owner = f'{where.partition(".")[0]} ("{name}")'
        message = f"The schema of {owner} cannot be enforced: {problems}."
        if strict:
            message = f"{owner} is strict, but parts of its schema cannot be enforced: {problems}. "
            message += "Leave them out, or send strict: false."
        raise ApiError(400, message, where)
    return schema


def only_calls(tools: list[Any], name: str | None, several: bool) -> Structure:
    """Tool calls and no text. name: the only function to call. several: allow several calls."""
    chosen = {n: tool for n, tool in enumerate(tools) if name in (None, tool["function"]["name"])}
    return Structure("grammar", "\n".join(["start: calls", *_calls(chosen, several, forced=True)]))


def calls_or_json(tools: list[Any], schema: Json, several: bool) -> Structure:
    """JSON that fits a schema, or tool calls."""
    start = ["start: answer | calls", f"answer: {_json(schema, whitespace_flexible=False)}"]
    rules = _calls(dict(enumerate(tools)), several, more="call")
    return Structure("grammar", "\n".join([*start, *rules]))


def calls_or_text(tools: list[Any], several: bool) -> Structure:
    """Any text and then tool calls, or one call without tags, as `ToolCalls` reads it."""
    names = [re.escape(tool["function"]["name"]) for tool in tools]
    tags, blank = "|".join(tag[1:-1] for tag in TAGS), r"[ \n]{0,9}"
    call_start = rf"\s*(```(json|xml)?\s*)?(<({tags})>\s*)?\[?\s*"
    call_start += rf'\{{\s*"name"\s*:\s*"({"|".join(names)})"'
    before = rf"{blank}(```(json|xml)?\n{blank})?(<({tags})>{blank})?"
    bodies = " | ".join(f"HEAD{number} arguments{number}" for number in range(len(names)))
    rules = ["start: TEXT calls? | calls | untagged", f"untagged: ({bodies}) TAIL"]
    rules += [f"TEXT: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/ & ~/{call_start}(?s:.*)/"]
    for number, name in enumerate(names):
        head = rf'{before}\{{{blank}"name": ?"{name}",{blank}"arguments": ?'
        rules.append(f"HEAD{number}: /{head}/")
    rules.append(rf"TAIL: /{blank}\}}({blank}<\/({tags})>)?({blank}```)?/")
    return Structure("grammar", "\n".join([*rules, *_calls(dict(enumerate(tools)), several)]))


def _calls(
    tools: dict[int, Any],
    several: bool,
    forced: bool = False,
    more: str = "(call | object)",
) -> list[str]:
    """The rules of `calls`.

    Arguments must fit their function's schema where the call is forced or the function strict.
    more: the rule of further calls; Qwen2.5-Coder writes them without tags.
    """
    # A newline need not be followed by a call: Qwen2.5-Coder also writes one before its turn ends.
    rules = [rf'calls: call ("\n" {more})* "\n"?' if several else "calls: call"]
    rules.append(r'call: <tool_call> "\n" object "\n" </tool_call>')
    objects = []
    for number, tool in tools.items():
        function = tool["function"]
        strict = bool(function.get("strict"))
        schema: Json = {"type": "object"}
        if forced or strict:
            parameters = function.get("parameters")
            schema |= {"properties": {}} if parameters is None else parameters
            where = f"tools[{number}].function.parameters"
            schema = enforceable(schema, strict, where, function["name"])
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        objects.append(f'{head} arguments{number} "}}"')
        rules.append(f"arguments{number}: {_json(schema, **_AS_TRAINED)}")
    return [*rules, "object: " + " | ".join(objects)]


def _json(schema: Json, **layout: Any) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': layout | LENIENT})}"
