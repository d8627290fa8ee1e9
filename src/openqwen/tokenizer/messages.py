"""Conversations in any form in which people store them, to what a chat template reads.

Training, generation and the server read through here, so one conversation gives the same ids
everywhere. Forms: OpenAI's messages; ShareGPT, with the roles of LLaMA-Factory and ms-swift;
Alpaca; a question and an answer under the usual names; TRL's preferences, as texts or as messages,
the prompt apart or in both answers.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import takewhile
from typing import Any, NamedTuple

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import parse_json
from openqwen.tokenizer.template import ROLES, Message

Tools = list[dict[str, Any]] | None
Record = Mapping[str, Any]

_ROLES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function", "function_response"), "tool"),
}
_CALLING = ("function_call", "tool_call")  # roles whose content is a call, as JSON
_LISTS = ("messages", "conversations", "conversation")
_ASKED = ("prompt", "instruction", "query", "question")
_ANSWERED = ("completion", "output", "response", "answer")
_MARKS = ("weight", "loss", "train", "loss_scale")  # of OpenAI, ms-swift, axolotl, ms-swift
_FORMS = "messages, conversations, instruction and output, or prompt and completion"


class Preference(NamedTuple):
    """A prompt and two answers to it, of one message each."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: Tools


def demonstration(record: Record) -> tuple[list[Message], Tools]:
    """A conversation to learn from, and its tools.

    Of messages as prompt and completion, only the completion is learned. Raises OpenQwenError,
    which names the field, where the record has none of the forms.
    """
    if (messages := _listed(record)) is None:
        asked, name = _asked(record), _first(record, _ANSWERED)
        if asked is None or name is None:
            what = f"This record holds no conversation{_fields(record)}."
            raise OpenQwenError(what, do=f"give {_FORMS}")
        if isinstance(record.get("prompt"), list):  # TRL's completion_only_loss
            asked = [message | {"train": False} for message in asked]
        messages = asked + as_messages(record[name], name, "assistant")
    return messages, as_tools(record)


def prompt(record: Record) -> tuple[list[Message], Tools]:
    """What is asked, and its tools; the answer at the end of a demonstration is left out."""
    messages = _asked(record)
    if messages is None:
        messages = _listed(record) or []
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    if not messages:
        what = f"This record holds no prompt{_fields(record)}."
        raise OpenQwenError(what, do="give prompt: a text or messages")
    return messages, as_tools(record)


def preference(record: Record) -> Preference:
    """A preference; each answer is a text, a message, or messages that may begin with the prompt.

    A prompt in both answers is what they share at the start, as TRL's `extract_prompt` finds it.
    """
    given = _asked(record)
    if given is None:
        given = _listed(record) or []
    name = _first(record, ("rejected_response", "rejected_messages"))
    if "chosen" not in record and name:
        # ms-swift: `messages` ends with the chosen answer.
        other = as_messages(record[name], name, "assistant")
        whole = name == "rejected_messages"
        sides = [given, _with_system(record, other) if whole else given[:-1] + other]
        given = []
    else:
        for name in ("chosen", "rejected"):
            if record.get(name) is None:
                lacks = f"it lacks '{name}'{_fields(record)}"
                what = f"'{name}' is null" if name in record else lacks
                do = f"give {name}: a text, or one assistant message"
                raise OpenQwenError(f"This is no preference: {what}.", do=do)
        texts = [record["chosen"], record["rejected"]]
        if not given and all(isinstance(text, str) for text in texts):
            given, texts = _shared_text(*texts)
        named = zip(texts, ("chosen", "rejected"))
        sides = [as_messages(text, name, "assistant") for text, name in named]
    if not given or any(side and side[0]["role"] != "assistant" for side in sides):
        pairs = zip(sides[0][:-1], sides[1][:-1])
        shared = [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if not shared:
            raise OpenQwenError(
                "This is no preference: it lacks 'prompt', and its answers do not begin alike.",
                do="give prompt: a text, or messages",
            )
        sides = [side[len(shared) :] for side in sides]
        if given[-len(shared) :] != shared:
            given = _with_system(record, shared)
    for name, side in zip(("chosen", "rejected"), sides):
        if len(side) != 1 or side[0]["role"] != "assistant":
            do = f"give {name} as such, or a text"
            raise OpenQwenError("An answer is one assistant message.", name, do)
    return Preference(given, sides[0][0], sides[1][0], as_tools(record))


def as_messages(value: Any, where: str = "messages", role: str = "user") -> list[Message]:
    """Messages in OpenAI's form, but the arguments of tool calls are objects where they are JSON.

    value: a text (one message of `role`), a message, or a list of messages. Consecutive calls are
    one message. Raises OpenQwenError, which names the message.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple | Mapping):
        raise OpenQwenError(f"This is {_kind(value)}.", where, "give a text, or a list of messages")
    messages: list[Message] = []
    for number, item in enumerate([value] if isinstance(value, Mapping) else value):
        message, calls = _message(item, f"{where}[{number}]"), _named(item) in _CALLING
        last = messages[-1] if messages else {}
        if calls and last.get("role") == "assistant" and is_learned(last) == is_learned(message):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def as_tools(record: Record) -> Tools:
    """The tools of a record, under `tools` or `functions`; bare functions and JSON text too."""
    name = next((name for name in ("tools", "functions") if record.get(name)), None)
    if name is None:
        return None
    tools = _parsed(record[name], name) or []
    tools = tools if isinstance(tools, list) else [tools]
    return [_tool(tool, f"{name}[{n}]") for n, tool in enumerate(tools)] or None


def is_learned(message: Message) -> bool:
    """Whether an assistant's message is learned: not where one of `_MARKS` is 0 or false."""
    for mark in _MARKS:
        if (value := message.get(mark)) not in (None, 0, 1):
            raise OpenQwenError(f"'{mark}' of a message is {value!r}.", do="give 0 or 1")
    return all(message.get(mark) in (None, 1) for mark in _MARKS)


def _first(record: Record, names: Iterable[str]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _fields(record: Record) -> str:
    names = ", ".join(map(str, list(record)[:8]))
    return f"; its fields are {names}" if names else "; it is empty"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    if isinstance(value, int | float):
        return "a number"
    return {type(None): "null", list: "a list"}.get(type(value), "an object")


def _listed(record: Record) -> list[Message] | None:
    """The conversation in a list of turns, if the record has one."""
    if (name := _first(record, _LISTS)) is None:
        return None
    turns = _parsed(record[name], name)
    if isinstance(turns, str):
        raise OpenQwenError("This is a text.", where=name, do="give a list of messages")
    if isinstance(turns, list):
        turns = [message for turn in turns for message in _one_by_one(turn)]
    return _with_system(record, as_messages(turns, name))


def _one_by_one(turn: Any) -> list[Any]:
    """ms-swift's turn of a question and its answer as two messages; any other turn as it is."""
    if not isinstance(turn, Mapping) or not {"human", "assistant"} <= turn.keys():
        return [turn]
    return [{"role": role, "content": turn[role]} for role in ("human", "assistant")]


def _asked(record: Record) -> list[Message] | None:
    """The turns before an answer that stands apart, Alpaca's input and history among them."""
    if (name := _first(record, _ASKED)) is None:
        return None
    asked = record[name]
    if name == "instruction" and isinstance(asked, str) and isinstance(record.get("input"), str):
        asked = "\n".join(filter(None, [asked, record["input"]]))
    turns: list[Message] = []
    history = record.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise OpenQwenError("A turn is a question and an answer.", where=f"history[{number}]")
        turns += as_messages(pair[0], "history") + as_messages(pair[1], "history", "assistant")
    return _with_system(record, turns + as_messages(asked, name))


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """With the record's own system prompt, where the messages have none."""
    if not record.get("system") or (messages and messages[0]["role"] == "system"):
        return messages
    return as_messages(record["system"], "system", "system") + messages


def _shared_text(chosen: str, rejected: str) -> tuple[list[Message], list[str]]:
    """Two texts, cut where they begin to differ or at the space before; first comes the prompt."""
    pairs = list(zip(chosen, rejected))
    end = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if end is None:  # one text begins with the other: neither answer may be empty
        end = max(len(pairs) - 1, 0)
    elif chosen[:end].endswith(" "):
        end -= 1
    return (as_messages(chosen[:end]) if end else []), [chosen[end:], rejected[end:]]


def _parsed(value: Any, where: str) -> Any:
    """What JSON text holds; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        what = f"This text is not JSON: {error}."
        raise OpenQwenError(what, where, "give a list, or its JSON") from None


def _named(item: Any) -> str | None:
    """The role as the record spells it."""
    role = item.get("role") or item.get("from")
    return role if isinstance(role, str) else None


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        what = f"A message is an object with a role and a content, and this is {_kind(item)}."
        raise OpenQwenError(what, where, 'write {"role": "user", "content": "..."}')
    named = _named(item)
    if named is None or named not in _ROLES:
        raise OpenQwenError(f"A message needs a role, one of {', '.join(ROLES)}.", where)
    own = {key: value for key, value in item.items() if value is not None}
    own.pop("role", None)
    own.pop("from", None)
    content = own.pop("value", None)
    content = own.pop("content", content)
    calls, legacy = own.pop("tool_calls", None), own.pop("function_call", None)
    if named in _CALLING:
        content, calls = None, content
    content, calls = _text(content, where), _parsed(calls or legacy or [], f"{where}.tool_calls")
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        inside = f"{where}.tool_calls"
        own["tool_calls"] = [_call(call, f"{inside}[{n}]") for n, call in enumerate(calls)]
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        what = f"The content of a message must be text, and this is {_kind(content)}."
        raise OpenQwenError(what, where)
    return {"role": _ROLES[named], "content": content, **own}


def _text(content: Any, where: str) -> Any:
    """A list of texts or of text parts as one text; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise OpenQwenError(f"This model reads text, not {kind}.", f"{where}.content[{number}]")
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as OpenAI writes it, its arguments as an object; what is no JSON stays text."""
    outer = call if isinstance(call, Mapping) and "function" in call else {"function": call}
    function = outer["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OpenQwenError("A tool call needs the name of a function.", where)
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        with suppress(ValueError):
            arguments = parse_json((arguments or "").strip() or "{}")
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """A tool, or a bare function, as a tool."""
    tool = _parsed(tool, where)
    outer = tool
    if not isinstance(tool, Mapping) or "function" not in tool:
        outer = {"type": "function", "function": tool}
    function = outer["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OpenQwenError("A tool needs the name of a function.", where)
    return dict(outer)
