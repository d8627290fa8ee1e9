"""/v1/responses: OpenAI's newer form of a chat, turned into the older one on the way in and back on
the way out.
"""

# ruff: noqa: UP013 (shapes of one line each)

import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Discriminator, Field, Tag
from typing_extensions import TypedDict

from openqwen.serve.answers import Writing
from openqwen.serve.api import Api
from openqwen.serve.errors import ApiError, checked, identity
from openqwen.serve.json_text import dump_json
from openqwen.serve.protocol import (
    Body,
    ChatRequest,
    Content,
    Count,
    Json,
    PlainFormat,
    ToolFunction,
    Top,
)
from openqwen.serve.tools import Arguments, Call, Piece, Text

_MOST = 1_000  # responses that are kept
_LOGPROBS = "message.output_text.logprobs"
_RENAMED = {
    "messages": "input",
    "response_format": "text.format",
    ".function.": ".",
}
_NAMES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _kind(item: Any) -> Any:
    """Messages and references may leave their type out."""
    bare = (
        "item_reference"
        if isinstance(item, dict) and "id" in item and "role" not in item
        else "message"
    )
    return (item.get("type") or bare) if isinstance(item, dict) else None


def _known(item: Any) -> Any:
    kind = _kind(item)
    if not isinstance(kind, str) or kind not in (*_NAMES, "item_reference"):
        known = ", ".join([*_NAMES, "item_reference"])
        raise ValueError(f"this server reads items of type {known}, not {kind}")
    return item


Role = Literal["system", "developer", "user", "assistant"]
MessageItem = TypedDict(
    "MessageItem",
    {
        "type": NotRequired[Literal["message"]],
        "id": NotRequired[str | None],
        "role": Role,
        "content": Content,
    },
)
CallItem = TypedDict(
    "CallItem",
    {
        "type": Literal["function_call"],
        "id": NotRequired[str | None],
        "call_id": str,
        "name": str,
        "arguments": NotRequired[str],
    },
)
ResultItem = TypedDict(
    "ResultItem",
    {
        "type": Literal["function_call_output"],
        "id": NotRequired[str | None],
        "call_id": str,
        "output": Content,
    },
)
ReasoningItem = TypedDict("ReasoningItem", {"type": Literal["reasoning"]})
Reference = TypedDict(
    "Reference", {"type": NotRequired[Literal["item_reference"] | None], "id": str}
)
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[Reference, Tag("item_reference")],
    Discriminator(_kind),
    BeforeValidator(_known),
]
FlatChoice = TypedDict("FlatChoice", {"type": Literal["function"], "name": str})
FlatJson = TypedDict("FlatJson", {"type": Literal["json_object"]})
FlatSchema = TypedDict(
    "FlatSchema",
    {
        "type": Literal["json_schema"],
        "name": NotRequired[str],
        "schema": Json,
        "strict": NotRequired[bool | None],
    },
)
Format = Annotated[PlainFormat | FlatJson | FlatSchema, Field(discriminator="type")]
TextConfig = TypedDict(
    "TextConfig",
    {"format": NotRequired[Format | None], "verbosity": NotRequired[Literal["medium"] | None]},
)


class FlatTool(ToolFunction):
    """A function, as this form writes it."""

    type: Literal["function"]


class ResponsesRequest(Body):
    """/v1/responses. The conversation comes whole, or goes on from a response that is kept."""

    refused = {  # noqa: RUF012
        "background": "the answer is made while you wait",
        "conversation": "send previous_response_id, or the conversation whole",
        "prompt": "send instructions and input",
        "context_management": "conversations are not shortened here",
        "moderation": "this server does not moderate",
    }
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: Top | None = None
    include: list[str] | None = Field(
        None, description=f"what to tell besides; {_LOGPROBS} alone has an effect"
    )
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    store: bool | None = Field(
        None, description="keep it in memory for a while, to go on from; false: do not"
    )
    previous_response_id: str | None = Field(
        None, description="the response whose conversation goes on"
    )
    metadata: dict[str, str] | None = None

    def items(self, find: Callable[[str], Json]) -> list[Json]:
        """The input as items that each have an id. find: the item that a reference names."""
        given: Any = (
            [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        )
        items = [find(item["id"]) if _kind(item) == "item_reference" else item for item in given]
        # A model that does not reason has no use for the reasoning of another.
        return [_whole(item) for item in items if _kind(item) != "reasoning"]

    def chat(self, messages: list[Json]) -> ChatRequest:
        """The whole request in the older form. messages: without this response's own
        instructions.
        """
        start = (
            [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        )
        values: Json = {
            "messages": [*start, *messages],
            "max_completion_tokens": self.max_output_tokens,
        }
        values["tools"] = [
            {"type": "function", "function": _without_type(tool)} for tool in self.tools or []
        ]
        choice, form = self.tool_choice, (self.text or {}).get("format")
        if form is not None:
            values["response_format"] = form | (
                {"json_schema": form} if form["type"] == "json_schema" else {}
            )
        values["tool_choice"] = (
            {"type": "function", "function": choice} if isinstance(choice, dict) else choice
        )
        values["logprobs"] = bool(self.top_logprobs) or _LOGPROBS in (self.include or [])
        for name in (
            "model",
            "temperature",
            "top_p",
            "parallel_tool_calls",
            "stream",
            "top_logprobs",
        ):
            values[name] = getattr(self, name)
        return checked(ChatRequest, values)


def _whole(item: Json) -> Json:
    """An item as it is listed: with an id, and a message's content in parts."""
    kind = _kind(item)
    item = {
        "status": "completed",
        **item,
        "type": kind,
        "id": item.get("id") or identity(_NAMES[kind]),
    }
    if isinstance(item.get("content"), str):
        part = (
            {"type": "input_text"}
            if item["role"] != "assistant"
            else {"type": "output_text", "annotations": []}
        )
        item["content"] = [part | {"text": item["content"]}]
    return item


def _messages(items: list[Json]) -> list[Json]:
    """A conversation as messages.

    An assistant's calls and the messages beside them are one turn.
    """
    messages: list[Json] = []
    for item in items:
        if item["type"] == "function_call_output":
            messages.append({"role": "tool", "content": item["output"]})
            continue
        calls, role = item["type"] == "function_call", item.get("role", "assistant")
        last = messages[-1] if messages else {}
        if not (last.get("role") == role == "assistant" and (calls or "tool_calls" in last)):
            last = {"role": role}
            messages.append(last)
        if calls:
            function = {name: item[name] for name in ("name", "arguments") if name in item}
            last["tool_calls"] = [*last.get("tool_calls", []), {"function": function}]
        else:
            last["content"] = [*last.get("content", []), *item["content"]]
    return messages


def _renamed(error: ApiError) -> ApiError:
    """An error of the older form with this one's names of the fields."""
    for old, new in _RENAMED.items():
        error.param = error.param and error.param.replace(old, new)
        if error.message.startswith(old):
            error.message = new + error.message.removeprefix(old)
    return error


def _without_type(value: Any) -> Json:
    return {key: inner for key, inner in value.items() if key != "type"}


class Responses:
    """Makes responses, and keeps the latest and their conversations in memory."""

    def __init__(self, api: Api):
        self._api = api
        self._kept: dict[
            str, tuple[Json, list[Json]]
        ] = {}  # response and its input, by its id, oldest first

    async def begin(self, request: ResponsesRequest) -> "Responding":
        """Have the answer made."""
        name, items = request.previous_response_id, list[Json]()
        if name is not None:
            if name not in self._kept:
                message = f"There is no response '{name}' (any more); send the conversation whole."
                raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
            earlier, before = self._kept[name]
            items = [*before, *earlier["output"]]
        items += request.items(self._find)
        try:
            writing = await self._api.chat(request.chat(_messages(items)))
        except ApiError as error:
            raise _renamed(error) from None

        def keep(response: Json) -> None:
            self._kept[response["id"]] = (response, items)
            if len(self._kept) > _MOST:
                del self._kept[next(iter(self._kept))]

        return Responding(
            request, writing, self._api.named(request.model, self._api.adapters), keep
        )

    def get(self, name: str) -> Json:
        """A response that is kept."""
        return self._known(name)[0]

    def delete(self, name: str) -> Json:
        """Forget a response."""
        self._known(name)
        del self._kept[name]
        return {"id": name, "object": "response", "deleted": True}

    def input_items(self, name: str, after: str | None, limit: int, order: str) -> Json:
        """A page of what a response answered, the latest first unless the order is asc."""
        items = self._known(name)[1][:: 1 if order == "asc" else -1]
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise ApiError(400, f"This response has no item '{after}'.", "after")
        start = 0 if after is None else ids.index(after) + 1
        page, more = items[start : start + limit], len(items) > start + limit
        ends = {
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
        }
        return {"object": "list", "data": page, **ends, "has_more": more}

    def _known(self, name: str) -> tuple[Json, list[Json]]:
        if name not in self._kept:
            raise ApiError(404, f"There is no response '{name}' (any more).", "response_id")
        return self._kept[name]

    def _find(self, name: str) -> Json:
        for response, items in reversed(self._kept.values()):
            for item in [*response["output"], *items]:
                if item["id"] == name:
                    return item
        raise ApiError(404, f"There is no item '{name}' (any more); send it whole.", "input")


class Responding:
    """One response as it is made. keep: what to do with a whole one that is to be stored."""

    def __init__(
        self, request: ResponsesRequest, writing: Writing, model: str, keep: Callable[[Json], None]
    ):
        self.request, self.answers = request, writing.answers
        self._writing, self._keep = writing, keep
        self._number = 0
        self._open: Json | None = None  # the item that is being made
        self._told: list[Json] = []  # log-probabilities of tokens whose text is still to come
        told = request.model_dump(exclude_none=True, exclude={"input", "stream", "include"})
        names = (
            "error",
            "incomplete_details",
            "instructions",
            "metadata",
            "usage",
            "previous_response_id",
        )
        self._response: Json = dict.fromkeys(names) | {
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        self._response |= {
            "store": True,
            **told,
            "model": model,
            "status": "in_progress",
            "output": [],
        }
        self._response |= {
            "id": identity("resp"),
            "object": "response",
            "created_at": int(time.time()),
        }

    async def whole(self) -> Json:
        """The response when it is finished."""
        async for _ in self._events():
            pass
        return self._response

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        try:
            async for event in self._events():
                yield b"event: %s\ndata: %s\n\n" % (event["type"].encode(), dump_json(event))
        except ApiError as error:
            event = self._event("error", **error.body()["error"])
            yield b"event: error\ndata: %s\n\n" % dump_json(event)

    async def _events(self) -> AsyncIterator[Json]:
        response = self._response
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=dict(response))
        choice = self._writing.choices[0]
        async for _, made in self.answers:
            self._told += self._writing.logprobs(made)
            for piece in choice.take(made):
                for event in self._piece(piece):
                    yield event
        status = "incomplete" if choice.reason == "length" else "completed"
        last = (
            self._piece(Text("")) if not response["output"] else []
        )  # without a character it is a message still
        for event in [*last, *self._close(status)]:
            yield event
        usage = self._writing.usage()
        response["status"] = status
        response["incomplete_details"] = (
            {"reason": "max_output_tokens"} if status == "incomplete" else None
        )
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if response["store"]:
            self._keep(response)
        yield self._event(f"response.{status}", response=response)

    def _event(self, kind: str, **values: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **values}

    def _of_item(self, kind: str, **values: Any) -> Json:
        """An event of the open item."""
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._response["output"]) - 1}
        place |= {"content_index": 0} if self._open["type"] == "message" else {}
        return self._event(f"response.{kind}", **place, **values)

    def _piece(self, piece: Piece) -> list[Json]:
        if isinstance(piece, Call):
            told = {"call_id": identity("call"), "name": piece.name, "arguments": ""}
            return [
                *self._close("completed"),
                self._begin({"type": "function_call", "id": identity("fc"), **told}),
            ]
        assert isinstance(piece, Text) or self._open is not None
        if isinstance(piece, Arguments):
            self._open["arguments"] += piece.text  # type: ignore[index]
            return [self._of_item("function_call_arguments.delta", delta=piece.text)]
        events: list[Json] = []
        if self._open is None or self._open["type"] != "message":
            item: Json = {
                "type": "message",
                "id": identity("msg"),
                "role": "assistant",
                "content": [],
            }
            events += [*self._close("completed"), self._begin(item)]
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self._of_item("content_part.added", part=dict(part)))
            item["content"] = [part]
        self._open["content"][0]["text"] += piece.text  # type: ignore[index]
        if piece.text:
            events.append(
                self._of_item("output_text.delta", delta=piece.text, logprobs=self._take())
            )
        return events

    def _take(self) -> list[Json]:
        """The log-probabilities that the open message has got since, which become its own."""
        told, self._told = self._told, []
        if self._open is not None and self._open["type"] == "message":
            self._open["content"][0]["logprobs"] += told
        return told

    def _begin(self, item: Json) -> Json:
        self._open = item
        item["status"] = "in_progress"
        self._response["output"].append(item)
        place = {"output_index": len(self._response["output"]) - 1}
        return self._event("response.output_item.added", item=dict(item), **place)

    def _close(self, status: str) -> list[Json]:
        if self._open is None:
            return []
        item, place = self._open, {"output_index": len(self._response["output"]) - 1}
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            self._take()
            events = [
                self._of_item("output_text.done", text=part["text"], logprobs=part["logprobs"])
            ]
            events.append(self._of_item("content_part.done", part=part))
        else:
            told = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._of_item("function_call_arguments.done", **told)]
            self._take()
        self._open = None
        return [*events, self._event("response.output_item.done", item=item, **place)]
