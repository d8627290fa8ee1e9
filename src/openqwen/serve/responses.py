"""/v1/responses: OpenAI's newer form of a chat, turned into the older one on the way in and back on the way out."""

# ruff: noqa: UP013 (shapes of one line each)

import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from openqwen.serve.answers import Choice, Writing, identity
from openqwen.serve.api import Api
from openqwen.serve.errors import ApiError
from openqwen.serve.protocol import Body, ChatRequest, Content, Count, Json, PlainFormat, ToolFunction
from openqwen.serve.tools import Arguments, Call, Piece, Text

_MOST = 1_000  # responses that are kept
Role = Literal["system", "developer", "user", "assistant"]
MessageItem = TypedDict("MessageItem", {"type": NotRequired[Literal["message"]], "role": Role, "content": Content})
CallItem = TypedDict(
    "CallItem", {"type": Literal["function_call"], "call_id": str, "name": str, "arguments": NotRequired[str]}
)
ResultItem = TypedDict("ResultItem", {"type": Literal["function_call_output"], "call_id": str, "output": str})
FlatChoice = TypedDict("FlatChoice", {"type": Literal["function"], "name": str})
FlatJson = TypedDict("FlatJson", {"type": Literal["json_object"]})
FlatSchema = TypedDict(
    "FlatSchema",
    {"type": Literal["json_schema"], "name": NotRequired[str], "schema": Json, "strict": NotRequired[bool | None]},
)
Format = Annotated[PlainFormat | FlatJson | FlatSchema, Field(discriminator="type")]
TextConfig = TypedDict("TextConfig", {"format": NotRequired[Format | None]})


class FlatTool(ToolFunction):
    """A function, as this form writes it."""

    type: Literal["function"]


class ResponsesRequest(Body):
    """/v1/responses. The conversation comes whole, or goes on from a response that is kept."""

    input: str | Annotated[list[MessageItem | CallItem | ResultItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    store: bool | None = Field(None, description="keep it in memory for a while, to go on from; false: do not")
    previous_response_id: str | None = Field(None, description="the response whose conversation goes on")
    metadata: dict[str, str] | None = None

    def said(self, earlier: list[Json]) -> list[Json]:
        """The conversation as messages, but for the instructions, which are of this response alone."""
        messages = list(earlier)
        items: Any = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        for item in items:
            if "role" in item:
                messages.append({"role": item["role"], "content": item["content"]})
            elif item["type"] == "function_call_output":
                messages.append({"role": "tool", "content": item["output"]})
            else:
                last = messages.pop() if messages and messages[-1]["role"] == "assistant" else {"role": "assistant"}
                calls = [*last.get("tool_calls", []), {"function": _without_type(item)}]
                messages.append(last | {"tool_calls": calls})
        return messages

    def chat(self, messages: list[Json]) -> ChatRequest:
        """The whole request in the older form."""
        start = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        values: Json = {"messages": [*start, *messages], "max_completion_tokens": self.max_output_tokens}
        values["tools"] = [{"type": "function", "function": _without_type(tool)} for tool in self.tools or []]
        choice, form = self.tool_choice, (self.text or {}).get("format")
        if form is not None:
            values["response_format"] = form | ({"json_schema": form} if form["type"] == "json_schema" else {})
        values["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
        for name in ("model", "temperature", "top_p", "parallel_tool_calls", "stream"):
            values[name] = getattr(self, name)
        return ChatRequest.model_validate(values)


def _without_type(value: Any) -> Json:
    return {key: inner for key, inner in value.items() if key != "type"}


class Responses:
    """Makes responses, and keeps the conversations of the latest in memory."""

    def __init__(self, api: Api):
        self._api = api
        self._kept: dict[str, list[Json]] = {}  # messages by a response's id, oldest first

    async def begin(self, request: ResponsesRequest) -> "Responding":
        """Have the answer made."""
        name = request.previous_response_id
        if name is not None and name not in self._kept:
            message = f"There is no response '{name}' (any more); send the conversation whole."
            raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
        messages = request.said(self._kept.get(name or "", []))
        writing = await self._api.chat(request.chat(messages))

        def keep(made: str, answer: Choice) -> None:
            said = {"role": "assistant", "content": answer.text, "tool_calls": answer.calls}
            self._kept[made] = [*messages, said]
            if len(self._kept) > _MOST:
                del self._kept[next(iter(self._kept))]

        return Responding(request, writing, self._api.named(request.model, self._api.adapters), keep)


class Responding:
    """One response as it is made. keep: what to do with a whole one that is to be stored."""

    def __init__(self, request: ResponsesRequest, writing: Writing, model: str, keep: Callable[[str, Choice], None]):
        self.request, self.answers, self._writing, self._keep = request, writing.answers, writing, keep
        self._number = 0
        self._open: Json | None = None  # the item that is being made
        told = request.model_dump(exclude_none=True, exclude={"input", "stream"})
        names = ("error", "incomplete_details", "instructions", "metadata", "usage", "previous_response_id")
        self._response: Json = dict.fromkeys(names) | {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
        self._response |= {"store": True, **told, "model": model, "status": "in_progress", "output": []}
        self._response |= {"id": identity("resp"), "object": "response", "created_at": int(time.time())}

    async def whole(self) -> Json:
        """The response when it is finished."""
        async for _ in self._events():
            pass
        return self._response

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        try:
            async for event in self._events():
                yield b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))
        except ApiError as error:
            event = self._event("error", **error.body()["error"])
            yield b"event: error\ndata: %s\n\n" % orjson.dumps(event)

    async def _events(self) -> AsyncIterator[Json]:
        response = self._response
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=dict(response))
        choice = self._writing.choices[0]
        async for _, made in self.answers:
            for piece in choice.take(made):
                for event in self._piece(piece):
                    yield event
        status = "incomplete" if choice.reason == "length" else "completed"
        last = self._piece(Text("")) if not response["output"] else []  # without a character it is a message still
        for event in [*last, *self._close(status)]:
            yield event
        usage = self._writing.usage()
        response["status"] = status
        response["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if response["store"]:
            self._keep(response["id"], choice)
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
            return [*self._close("completed"), self._begin({"type": "function_call", "id": identity("fc"), **told})]
        assert isinstance(piece, Text) or self._open is not None
        if isinstance(piece, Arguments):
            self._open["arguments"] += piece.text  # type: ignore[index]
            return [self._of_item("function_call_arguments.delta", delta=piece.text)]
        events: list[Json] = []
        if self._open is None or self._open["type"] != "message":
            item: Json = {"type": "message", "id": identity("msg"), "role": "assistant", "content": []}
            events += [*self._close("completed"), self._begin(item)]
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self._of_item("content_part.added", part=dict(part)))
            item["content"] = [part]
        self._open["content"][0]["text"] += piece.text  # type: ignore[index]
        return [*events, *([self._of_item("output_text.delta", delta=piece.text, logprobs=[])] if piece.text else [])]

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
            events = [self._of_item("output_text.done", text=part["text"], logprobs=[])]
            events.append(self._of_item("content_part.done", part=part))
        else:
            told = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._of_item("function_call_arguments.done", **told)]
        self._open = None
        return [*events, self._event("response.output_item.done", item=item, **place)]
