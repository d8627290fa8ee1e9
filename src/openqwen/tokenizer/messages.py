"""Conversations in all usual forms, converted to the messages that a chat template reads.

Training, generation and the server convert here, so one conversation gives the same ids in all of
them. Forms: OpenAI's messages; ShareGPT, with the roles of LLaMA-Factory and ms-swift; Alpaca; a
question and an answer under the usual names; TRL's preferences, as texts or as messages, with the
prompt in a field of its own or in both answers.
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
_SIDES = ("chosen", "rejected")
_MARKS = ("weight", "loss", "train", "loss_scale")  # of OpenAI, ms-swift, axolotl, ms-swift
_FORMS = "messages, conversations, instruction and output, or prompt and completion"


class Preference(NamedTuple):
    """A prompt and two answers to it, of one message each."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: Tools


class AnswerSides(NamedTuple):
    """A prompt and answers to it, of one message each: good ones and bad ones."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: Tools


def demonstration(record: Record) -> tuple[list[Message], Tools]:
    """(a conversation to learn from, its tools).

    If prompt and completion are messages, only the completion is learned. Raises OpenQwenError,
    which names the field, if the record has none of the forms.
    """
    if (messages := _listed(record)) is None:
        asked, name = _asked(record), _first(record, _ANSWERED)
        if asked is None or name is None:
            what = f"This record has no conversation{_fields(record)}."
            raise OpenQwenError(what, do=f"give {_FORMS}")
        if isinstance(record.get("prompt"), list):  # TRL's completion_only_loss
            asked = [message | {"train": False} for message in asked]
        messages = asked + as_messages(record[name], name, "assistant")
    return messages, as_tools(record)


def prompt(record: Record) -> tuple[list[Message], Tools]:
    """(the prompt, its tools); the answer at the end of a demonstration is left out."""
    messages = _asked(record)
    if messages is None:
        messages = _listed(record) or []
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    if not messages:
        what = f"This record has no prompt{_fields(record)}."
        raise OpenQwenError(what, do="give prompt: a text or messages")
    return messages, as_tools(record)


def preference(record: Record) -> Preference:
    """A preference; each answer is a text, a message, or messages that may begin with the prompt.

    If both answers contain the prompt, it is what they have in common at the start, as in TRL's
    `extract_prompt`.
    """
    asked, sides = _swift_sides(record) or _sides(record)
    if not asked or any(side and side[0]["role"] != "assistant" for side in sides):
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(sides[0][:-1], sides[1][:-1]))
        shared = [message for message, _ in pairs]
        if not shared:
            raise OpenQwenError(
                "This is not a preference: it lacks 'prompt', and its answers do not begin alike.",
                do="give prompt: a text, or messages",
            )
        sides = [side[len(shared) :] for side in sides]
        if asked[-len(shared) :] != shared:
            asked = _with_system(record, shared)
    for name, side in zip(_SIDES, sides):
        if len(side) != 1 or side[0]["role"] != "assistant":
            do = f"give {name} as one assistant message or as a text"
            raise OpenQwenError("An answer is one assistant message.", name, do)
    return Preference(asked, sides[0][0], sides[1][0], as_tools(record))


def answer_sides(record: Record) -> AnswerSides:
    """A preference whose sides may each be a list of answers, as in RewardBench 2.

    Each answer of `chosen` is better than each of `rejected`. See `preference`.
    """
    if not any(_several(record.get(name)) for name in _SIDES):
        one = preference(record)
        return AnswerSides(one.prompt, [one.chosen], [one.rejected], one.tools)
    chosen, rejected = (
        record[name] if _several(record.get(name)) else [record.get(name)] for name in _SIDES
    )
    couples = [(c, rejected[0]) for c in chosen] + [(chosen[0], r) for r in rejected]
    pairs = [preference({**record, "chosen": c, "rejected": r}) for c, r in couples]
    first = pairs[0]
    if any(pair.prompt != first.prompt for pair in pairs):
        do = "give prompt: a text, or messages"
        raise OpenQwenError("The answers of this record do not begin alike.", do=do)
    answers = [pair.chosen for pair in pairs[: len(chosen)]]
    worse = [pair.rejected for pair in pairs[len(chosen) :]]
    return AnswerSides(first.prompt, answers, worse, first.tools)


def _several(side: Any) -> bool:
    """Whether a side is a list of answers: texts or lists of messages, not messages."""
    return isinstance(side, list) and bool(side) and not isinstance(side[0], Mapping)


def _sides(record: Record) -> tuple[list[Message], list[list[Message]]]:
    """(prompt, or none if the answers contain it; chosen and rejected)."""
    for name in _SIDES:
        if record.get(name) is None:
            lacks = f"it lacks '{name}'{_fields(record)}"
            what = f"'{name}' is null" if name in record else lacks
            do = f"give {name}: a text, or one assistant message"
            raise OpenQwenError(f"This is not a preference: {what}.", do=do)
    asked = _turns(record)
    answers = [record[name] for name in _SIDES]
    if not asked and all(isinstance(answer, str) for answer in answers):
        asked, answers = _shared_text(*answers)
    named = zip(answers, _SIDES)
    return asked, [as_messages(answer, name, "assistant") for answer, name in named]


def _swift_sides(record: Record) -> tuple[list[Message], list[list[Message]]] | None:
    """The same for ms-swift's form, in which `messages` ends with the chosen answer."""
    name = _first(record, ("rejected_response", "rejected_messages"))
    if "chosen" in record or name is None:
        return None
    chosen = _turns(record)
    rejected = as_messages(record[name], name, "assistant")
    if name == "rejected_messages":
        return [], [chosen, _with_system(record, rejected)]
    return [], [chosen, chosen[:-1] + rejected]


def as_messages(value: Any, where: str = "messages", role: str = "user") -> list[Message]:
    """Messages in OpenAI's form, but with the arguments of tool calls as objects if they are JSON.

    value: a text (one message of `role`), a message, or a list of messages. Consecutive calls
    become one message. Raises OpenQwenError, which names the message.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple | Mapping):
        raise OpenQwenError(f"This is {_kind(value)}.", where, "give a text, or a list of messages")
    messages: list[Message] = []
    for number, item in enumerate([value] if isinstance(value, Mapping) else value):
        message, is_call = _message(item, f"{where}[{number}]"), _given_role(item) in _CALLING
        last = messages[-1] if messages else {}
        if is_call and last.get("role") == "assistant" and is_learned(last) == is_learned(message):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def as_tools(record: Record) -> Tools:
    """The tools of a record, from `tools` or `functions`; bare functions and JSON text too."""
    name = next((name for name in ("tools", "functions") if record.get(name)), None)
    if name is None:
        return None
    tools = _parsed(record[name], name) or []
    tools = tools if isinstance(tools, list) else [tools]
    return [_tool(tool, f"{name}[{n}]") for n, tool in enumerate(tools)] or None


def is_learned(message: Message) -> bool:
    """Whether an assistant's message is learned: not if one of `_MARKS` is 0 or false."""
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
    """ms-swift's turn of a question and its answer as two messages; any other turn unchanged."""
    if not isinstance(turn, Mapping) or not {"human", "assistant"} <= turn.keys():
        return [turn]
    return [{"role": role, "content": turn[role]} for role in ("human", "assistant")]


def _asked(record: Record) -> list[Message] | None:
    """The turns before an answer in a field of its own, with Alpaca's input and history."""
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


def _turns(record: Record) -> list[Message]:
    """The turns before an answer, or else the conversation; empty if there is neither."""
    asked = _asked(record)
    return _listed(record) or [] if asked is None else asked


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """The messages, with the record's system prompt if they have none."""
    if not record.get("system") or (messages and messages[0]["role"] == "system"):
        return messages
    return as_messages(record["system"], "system", "system") + messages


def _shared_text(chosen: str, rejected: str) -> tuple[list[Message], list[str]]:
    """(prompt, [chosen, rejected]): the texts, cut where they begin to differ.

    The cut is before a space that stands there.
    """
    pairs = list(zip(chosen, rejected))
    end = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if end is None:  # one text begins with the other, but neither answer may be empty
        end = max(len(pairs) - 1, 0)
    elif chosen[:end].endswith(" "):
        end -= 1
    return (as_messages(chosen[:end]) if end else []), [chosen[end:], rejected[end:]]


def _parsed(value: Any, where: str) -> Any:
    """The value of a JSON text; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        what = f"This text is not JSON: {error}."
        raise OpenQwenError(what, where, "give a list, or its JSON") from None


def _given_role(item: Any) -> str | None:
    """The role as the record writes it."""
    role = item.get("role") or item.get("from")
    return role if isinstance(role, str) else None


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        what = f"A message is an object with a role and a content, and this is {_kind(item)}."
        raise OpenQwenError(what, where, 'write {"role": "user", "content": "..."}')
    given = _given_role(item)
    if given is None or given not in _ROLES:
        raise OpenQwenError(f"A message needs a role, one of {', '.join(ROLES)}.", where)
    fields = {key: value for key, value in item.items() if value is not None}
    fields.pop("role", None)
    fields.pop("from", None)
    content = fields.pop("value", None)
    content = fields.pop("content", content)
    calls, legacy = fields.pop("tool_calls", None), fields.pop("function_call", None)
    if given in _CALLING:
        content, calls = None, content
    inside = f"{where}.tool_calls"
    content, calls = _text(content, where), _parsed(calls or legacy or [], inside)
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        fields["tool_calls"] = [_call(call, f"{inside}[{n}]") for n, call in enumerate(calls)]
        content = "" if content is None else content
    if not isinstance(content, str):
        what = f"The content of a message must be text, and this is {_kind(content)}."
        raise OpenQwenError(what, where)
    return {"role": _ROLES[given], "content": content, **fields}


def _text(content: Any, where: str) -> Any:
    """A list of texts or of text parts as one text; any other content unchanged."""
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
    """A call in OpenAI's form, with its arguments as an object, or as text if they are not JSON."""
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
    """A tool in OpenAI's form, from a tool or a bare function."""
    tool = _parsed(tool, where)
    outer = tool
    if not isinstance(tool, Mapping) or "function" not in tool:
        outer = {"type": "function", "function": tool}
    function = outer["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OpenQwenError("A tool needs the name of a function.", where)
    return dict(outer)
