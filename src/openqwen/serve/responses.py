"""/v1/responses, OpenAI's newer form of a chat. Requests are translated to the older form."""

# ruff: noqa: UP013 (a class for each shape would be longer)

from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, Discriminator, Field, Tag
from typing_extensions import TypedDict

from openqwen.http.errors import ApiError, new_id, validated
from openqwen.serve.api import Api
from openqwen.serve.protocol import (
    ChatRequest,
    Content,
    Count,
    Json,
    PlainFormat,
    RequestBody,
    ToolFunction,
    TopCount,
)
from openqwen.serve.response_object import ResponseObject

_MOST_KEPT = 1_000  # responses in memory
_LOGPROBS = "message.output_text.logprobs"
_FIELD_NAMES = {  # of the older form, and of this one
    "messages": "input",
    "response_format": "text.format",
    ".function.": ".",
}
_ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}
_KINDS = (*_ID_PREFIXES, "item_reference")


def _kind(item: Any) -> Any:
    """The type of an item; messages and references may leave it out."""
    if not isinstance(item, dict):
        return None
    reference = "id" in item and "role" not in item
    return item.get("type") or ("item_reference" if reference else "message")


def _refuse_unknown(item: Any) -> Any:
    kind = _kind(item)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"this server reads items of type {', '.join(_KINDS)}, not {kind}")
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
    BeforeValidator(_refuse_unknown),
]
FlatToolChoice = TypedDict("FlatToolChoice", {"type": Literal["function"], "name": str})
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
    """A function; the older form nests its fields under `function`."""

    type: Literal["function"]


class ResponsesRequest(RequestBody):
    """/v1/responses. `input` is the whole conversation, or continues a response that is kept."""

    refused = {  # noqa: RUF012
        "background": "answers are generated while the client waits",
        "conversation": "send previous_response_id, or the whole conversation",
        "prompt": "send instructions and input",
        "context_management": "this server does not shorten conversations",
        "moderation": "this server does not moderate",
    }
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: TopCount | None = None
    include: list[str] | None = Field(
        None, description=f"what to add to the response; only {_LOGPROBS} has an effect"
    )
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    store: bool | None = Field(
        None,
        description="keep the response in memory, to continue it later; default: true",
    )
    previous_response_id: str | None = Field(None, description="the response to continue")
    metadata: dict[str, str] | None = None

    def items(self, find: Callable[[str], Json]) -> list[Json]:
        """The input as items that each have an id. find: gives the item of a reference."""
        items: list[Any] = [{"role": "user", "content": self.input}]
        if not isinstance(self.input, str):
            items = list(self.input)
        items = [find(item["id"]) if _kind(item) == "item_reference" else item for item in items]
        # Another model's reasoning is of no use to a model that does not reason.
        return [_completed(item) for item in items if _kind(item) != "reasoning"]

    def chat(self, messages: list[Json]) -> ChatRequest:
        """The request in the older form. messages: the conversation without `instructions`."""
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        shared = ("model", "temperature", "top_p", "parallel_tool_calls", "stream", "top_logprobs")
        values: Json = {name: getattr(self, name) for name in shared}
        values |= {"messages": messages, "max_completion_tokens": self.max_output_tokens}
        values["tools"] = [_nested(tool) for tool in self.tools or []]
        choice, form = self.tool_choice, (self.text or {}).get("format")
        values["tool_choice"] = _nested(choice) if isinstance(choice, dict) else choice
        if form is not None:
            values["response_format"] = form
            if form["type"] == "json_schema":
                values["response_format"] = {**form, "json_schema": form}
        values["logprobs"] = bool(self.top_logprobs) or _LOGPROBS in (self.include or [])
        return validated(ChatRequest, values)


def _nested(function: Any) -> Json:
    """A function in the older form, where its fields are nested."""
    fields = {name: value for name, value in function.items() if name != "type"}
    return {"type": "function", "function": fields}


def _completed(item: Json) -> Json:
    """An item in its full form: with an id, and with a message's content in parts."""
    kind = _kind(item)
    item_id = item.get("id") or new_id(_ID_PREFIXES[kind])
    item = {"status": "completed", **item, "type": kind, "id": item_id}
    if isinstance(item.get("content"), str):
        part: Json = {"type": "input_text"}
        if item["role"] == "assistant":
            part = {"type": "output_text", "annotations": []}
        item["content"] = [part | {"text": item["content"]}]
    return item


def _messages(items: list[Json]) -> list[Json]:
    """The items as messages of the older form.

    Calls of the assistant, and its text before them, become one message.
    """
    messages: list[Json] = []
    for item in items:
        if item["type"] == "function_call_output":
            messages.append({"role": "tool", "content": item["output"]})
            continue
        is_call, role = item["type"] == "function_call", item.get("role", "assistant")
        last = messages[-1] if messages else {}
        same_turn = last.get("role") == role == "assistant" and (is_call or "tool_calls" in last)
        if not same_turn:
            last = {"role": role}
            messages.append(last)
        if is_call:
            function = {name: item[name] for name in ("name", "arguments") if name in item}
            last["tool_calls"] = [*last.get("tool_calls", []), {"function": function}]
        else:
            last["content"] = [*last.get("content", []), *item["content"]]
    return messages


def _renamed(error: ApiError) -> ApiError:
    """An error of the older form with the field names of this one."""
    for old, new in _FIELD_NAMES.items():
        error.param = error.param and error.param.replace(old, new)
        if error.message.startswith(old):
            error.message = new + error.message.removeprefix(old)
    return error


class Responses:
    """Starts responses, and keeps the latest of them with their conversations in memory."""

    def __init__(self, api: Api):
        self._api = api
        # (response, its input) by the response's id, oldest first.
        self._kept: dict[str, tuple[Json, list[Json]]] = {}

    async def start(self, request: ResponsesRequest) -> ResponseObject:
        """Start the answer to a request."""
        previous, items = request.previous_response_id, list[Json]()
        if previous is not None:
            if previous not in self._kept:
                message = f"There is no response '{previous}' (any more); send the whole "
                message += "conversation."
                raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
            response, before = self._kept[previous]
            items = [*before, *response["output"]]
        items += request.items(self._find)
        try:
            text = await self._api.chat(request.chat(_messages(items)))
        except ApiError as error:
            raise _renamed(error) from None

        def keep(response: Json) -> None:
            self._kept[response["id"]] = (response, items)
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]

        model = self._api.named(request.model, self._api.adapters)
        return ResponseObject(request, text, model, keep)

    def get(self, name: str) -> Json:
        """A response that is kept."""
        return self._entry(name)[0]

    def delete(self, name: str) -> Json:
        """Delete a response."""
        self._entry(name)
        del self._kept[name]
        return {"id": name, "object": "response", "deleted": True}

    def input_items(self, name: str, after: str | None, limit: int, order: str) -> Json:
        """A page of a response's input, the latest item first unless the order is asc."""
        items = self._entry(name)[1][:: 1 if order == "asc" else -1]
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise ApiError(400, f"This response has no item '{after}'.", "after")
        start = 0 if after is None else ids.index(after) + 1
        page, more = items[start : start + limit], len(items) > start + limit
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        ends = {"first_id": first, "last_id": last}
        return {"object": "list", "data": page, **ends, "has_more": more}

    def _entry(self, name: str) -> tuple[Json, list[Json]]:
        if name not in self._kept:
            raise ApiError(404, f"There is no response '{name}' (any more).", "response_id")
        return self._kept[name]

    def _find(self, name: str) -> Json:
        for response, items in reversed(self._kept.values()):
            for item in [*response["output"], *items]:
                if item["id"] == name:
                    return item
        raise ApiError(404, f"There is no item '{name}' (any more); send the item itself.", "input")
