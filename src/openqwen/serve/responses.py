"""/v1/responses: OpenAI's newer form of a chat, turned into the older one on the way in and back on the way out."""

# ruff: noqa: UP013 (shapes of one line each)

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from openqwen.serve.answers import Writing, identity
from openqwen.serve.api import Api
from openqwen.serve.errors import ApiError
from openqwen.serve.protocol import (
    Body,
    ChatRequest,
    Content,
    Count,
    FunctionName,
    Json,
    PlainFormat,
)
from openqwen.serve.tools import Arguments, Call, Piece, Text

Role = Literal["system", "developer", "user", "assistant"]
MessageItem = TypedDict("MessageItem", {"type": NotRequired[Literal["message"]], "role": Role, "content": Content})
CallItem = TypedDict(
    "CallItem", {"type": Literal["function_call"], "call_id": str, "name": str, "arguments": NotRequired[str]}
)
ResultItem = TypedDict("ResultItem", {"type": Literal["function_call_output"], "call_id": str, "output": str})
FlatTool = TypedDict(
    "FlatTool",
    {
        "type": Literal["function"],
        "name": FunctionName,
        "description": NotRequired[str | None],
        "parameters": NotRequired[Json | None],
    },
)
FlatChoice = TypedDict("FlatChoice", {"type": Literal["function"], "name": str})
FlatJson = TypedDict("FlatJson", {"type": Literal["json_object"]})
FlatSchema = TypedDict("FlatSchema", {"type": Literal["json_schema"], "name": NotRequired[str], "schema": Json})
Format = Annotated[PlainFormat | FlatJson | FlatSchema, Field(discriminator="type")]
TextConfig = TypedDict("TextConfig", {"format": NotRequired[Format | None]})


class ResponsesRequest(Body):
    """/v1/responses. Nothing is stored: the conversation comes whole with each request."""

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
    previous_response_id: None = Field(None, description="not kept here")
    metadata: dict[str, str] | None = None

    def chat(self) -> ChatRequest:
        """The whole request in the older form."""
        messages: list[Json] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        items: Any = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        for item in items:
            if "role" in item:
                messages.append({"role": item["role"], "content": item["content"]})
            elif item["type"] == "function_call_output":
                messages.append({"role": "tool", "content": item["output"]})
            else:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append({"function": _without_type(item)})
        values: Json = {"messages": messages, "max_completion_tokens": self.max_output_tokens}
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


class Responding:
    """One response as it is made."""

    def __init__(self, request: ResponsesRequest, writing: Writing, model: str):
        self.request, self.answers, self._writing = request, writing.answers, writing
        self._number = 0
        self._open: Json | None = None  # the item that is being made
        told = request.model_dump(exclude_none=True, exclude={"input", "stream"})
        self._response: Json = dict.fromkeys(("error", "incomplete_details", "instructions", "metadata", "usage"))
        self._response |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], **told, "model": model}
        self._response |= {"id": "resp_" + identity("")[1:], "object": "response", "created_at": int(time.time())}
        self._response |= {"status": "in_progress", "output": [], "store": False}

    @classmethod
    async def begin(cls, request: ResponsesRequest, api: Api) -> "Responding":
        """Have the answer made."""
        return cls(request, await api.chat(request.chat()), api.named(request.model, api.adapters))

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
        yield self._event("response.created", response=dict(self._response))
        yield self._event("response.in_progress", response=dict(self._response))
        choice = self._writing.choices[0]
        async for _, made in self.answers:
            for piece in choice.take(made):
                for event in self._piece(piece):
                    yield event
        if not self._response["output"]:  # an answer without a character is a message all the same
            for event in self._piece(Text("")):
                yield event
        cut = choice.reason == "length"
        for event in self._close("incomplete" if cut else "completed"):
            yield event
        usage = self._writing.usage()
        self._response |= {"status": "incomplete" if cut else "completed"}
        self._response |= {"incomplete_details": {"reason": "max_output_tokens"} if cut else None}
        self._response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        yield self._event("response.incomplete" if cut else "response.completed", response=self._response)

    def _event(self, kind: str, **values: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **values}

    def _place(self) -> Json:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._response["output"]) - 1}
        return place | ({"content_index": 0} if self._open["type"] == "message" else {})

    def _piece(self, piece: Piece) -> list[Json]:
        events: list[Json] = []
        if isinstance(piece, Text):
            if self._open is None or self._open["type"] != "message":
                item: Json = {"type": "message", "id": "msg_" + identity("")[1:], "role": "assistant", "content": []}
                events += [*self._close("completed"), self._begin(item)]
                part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                events.append(self._event("response.content_part.added", part=dict(part), **self._place()))
                item["content"] = [part]
            self._open["content"][0]["text"] += piece.text  # type: ignore[index]
            if piece.text:
                told = {"delta": piece.text, "logprobs": []}
                events.append(self._event("response.output_text.delta", **told, **self._place()))
        elif isinstance(piece, Call):
            names = {"id": "fc_" + identity("")[1:], "call_id": identity("call"), "name": piece.name, "arguments": ""}
            events += [*self._close("completed"), self._begin({"type": "function_call", **names})]
        elif isinstance(piece, Arguments):
            self._open["arguments"] += piece.text  # type: ignore[index]
            events.append(self._event("response.function_call_arguments.delta", delta=piece.text, **self._place()))
        return events

    def _begin(self, item: Json) -> Json:
        self._open = item
        item["status"] = "in_progress"
        self._response["output"].append(item)
        place = {"output_index": len(self._response["output"]) - 1}
        return self._event("response.output_item.added", item=dict(item), **place)

    def _close(self, status: str) -> list[Json]:
        if self._open is None:
            return []
        item, place = self._open, self._place()
        item["status"] = status
        events: list[Json]
        if item["type"] == "message":
            part = item["content"][0]
            done = self._event("response.output_text.done", text=part["text"], logprobs=[], **place)
            events = [done, self._event("response.content_part.done", part=part, **place)]
        else:
            told = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **told, **place)]
        self._open = None
        return [*events, self._event("response.output_item.done", item=item, output_index=place["output_index"])]
