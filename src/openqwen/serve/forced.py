"""Grammars of answers in which functions may or must be called, in llguidance's notation."""

import json
import re
from typing import Any

from openqwen.engine import Structure
from openqwen.engine.schema import LENIENT, faults, ready
from openqwen.serve.errors import ApiError
from openqwen.serve.tools import TAGS

Json = dict[str, Any]
# The blanks of calls in Qwen2.5's training data. Where any are allowed, a model may never end.
_AS_TRAINED: Json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def followed(schema: Json, strict: bool, where: str, name: str) -> Json:
    """The schema as a grammar can follow it.

    where: the request's field. name: of the tool or the format.

    Raises: ApiError that tells the places of what cannot be followed.
    """
    schema = ready(schema, strict)
    if found := "; ".join(faults(schema, strict))[:400]:
        whose = f'{where.partition(".")[0]} ("{name}")'
        if strict:
            message = f"{whose} is strict, but its schema has what cannot be enforced: {found}. "
            message += "Leave that out, or send strict: false."
        else:
            message = f"The schema of {whose} cannot be followed: {found}."
        raise ApiError(400, message, where)
    return schema


def only_calls(tools: list[Any], name: str | None, several: bool) -> Structure:
    """Nothing but calls. name: of the one function to call. several: more than one may come."""
    chosen = {n: tool for n, tool in enumerate(tools) if name in (None, tool["function"]["name"])}
    return Structure("grammar", "\n".join(["start: calls", *_calls(chosen, several, forced=True)]))


def calls_or_json(tools: list[Any], schema: Json, several: bool) -> Structure:
    """JSON that fits a schema, or calls."""
    start = ["start: answer | calls", f"answer: {_json(schema, whitespace_flexible=False)}"]
    rules = _calls(dict(enumerate(tools)), several, more="call")
    return Structure("grammar", "\n".join([*start, *rules]))


def calls_or_text(tools: list[Any], several: bool) -> Structure:
    """Any text, which calls may follow; or one call without tags, as `ToolCalls` reads it."""
    names = [re.escape(tool["function"]["name"]) for tool in tools]
    tags, blank = "|".join(tag[1:-1] for tag in TAGS), r"[ \n]{0,9}"
    begun = rf"\s*(```(json|xml)?\s*)?(<({tags})>\s*)?\[?\s*"
    begun += rf'\{{\s*"name"\s*:\s*"({"|".join(names)})"'
    before = rf"{blank}(```(json|xml)?\n{blank})?(<({tags})>{blank})?"
    bodies = " | ".join(f"HEAD{number} arguments{number}" for number in range(len(names)))
    rules = ["start: TEXT calls? | calls | untagged", f"untagged: ({bodies}) TAIL"]
    rules += [f"TEXT: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/ & ~/{begun}(?s:.*)/"]
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
    """Rules of `calls`. Arguments fit the schemas of functions that are forced or strict.

    more: how further calls are written. Qwen2.5-Coder leaves out their tags.
    """
    # A newline promises no further call: Qwen2.5-Coder writes one before it ends its turn, too.
    rules = [rf'calls: call ("\n" {more})* "\n"?' if several else "calls: call"]
    rules.append(r'call: <tool_call> "\n" object "\n" </tool_call>')
    objects = []
    for number, tool in tools.items():
        function = tool["function"]
        strict = bool(function.get("strict"))
        schema: Json = {"type": "object"}
        if forced or strict:
            given = function.get("parameters")
            given = {"properties": {}} if given is None else given
            where = f"tools[{number}].function.parameters"
            schema = followed(schema | given, strict, where, function["name"])
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        objects.append(f'{head} arguments{number} "}}"')
        rules.append(f"arguments{number}: {_json(schema, **_AS_TRAINED)}")
    return [*rules, "object: " + " | ".join(objects)]


def _json(schema: Json, **layout: Any) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': layout | LENIENT})}"
