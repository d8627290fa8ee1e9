"""A response of /v1/responses as it is generated: its object, and the events of its stream."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from openqwen.http.errors import ApiError, new_id
from openqwen.http.json_body import dump_json
from openqwen.serve.answers import TextResponse
from openqwen.serve.protocol import Json, RequestBody
from openqwen.serve.tools import Arguments, Call, Piece, Text

# What OpenAI's object holds, unless the request or the result says otherwise.
_EMPTY: Json = {
    **dict.fromkeys(("error", "incomplete_details", "instructions", "metadata", "usage")),
    "previous_response_id": None,
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "store": True,
}


class ResponseObject:
    """One response: items of text or of tool calls, built one after the other.

    Args:
        request: the request, a `ResponsesRequest`.
        text: the answer to the same request in the form of a chat.
        model: the model's name.
        keep: called with the finished response, where the request lets it be stored.
    """

    def __init__(
        self, request: RequestBody, text: TextResponse, model: str, keep: Callable[[Json], None]
    ):
        self.request: Any = request
        self.answers = text.answers
        self._text, self._keep = text, keep
        self._event_number = 0
        self._item: Json | None = None  # the item that is being generated
        self._logprobs: list[Json] = []  # of tokens whose text is still to come
        self._response: Json = {
            **_EMPTY,
            **request.model_dump(exclude_none=True, exclude={"input", "stream", "include"}),
            "model": model,
            "status": "in_progress",
            "output": [],
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
        }

    async def result(self) -> Json:
        """The response, when it is finished."""
        async for _ in self._events():
            pass
        return self._response

    async def stream(self) -> AsyncIterator[bytes]:
        """The response as server-sent events; an error becomes an event too."""
        try:
            async for event in self._events():
                yield b"event: %s\ndata: %s\n\n" % (event["type"].encode(), dump_json(event))
        except ApiError as error:
            event = self._event("error", **error.body()["error"])
            yield b"event: error\ndata: %s\n\n" % dump_json(event)

    async def _events(self) -> AsyncIterator[Json]:
        response, choice = self._response, self._text.choices[0]
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=dict(response))
        async for _, engine_event in self.answers:
            self._logprobs += self._text.logprobs(engine_event)
            for piece in choice.add(engine_event):
                for event in self._piece_events(piece):
                    yield event
        status = "incomplete" if choice.reason == "length" else "completed"
        # An answer without a character is still a message.
        empty = [] if response["output"] else self._piece_events(Text(""))
        for event in [*empty, *self._close_item(status)]:
            yield event
        response |= {"status": status, "usage": self._usage()}
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if response["store"]:
            self._keep(response)
        yield self._event(f"response.{status}", response=response)

    def _usage(self) -> Json:
        usage = self._text.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _event(self, kind: str, **values: Any) -> Json:
        self._event_number += 1
        return {"type": kind, "sequence_number": self._event_number - 1, **values}

    def _item_event(self, kind: str, **values: Any) -> Json:
        """An event of the current item."""
        assert self._item is not None
        place = {"item_id": self._item["id"], **self._index()}
        if self._item["type"] == "message":
            place["content_index"] = 0
        return self._event(f"response.{kind}", **place, **values)

    def _index(self) -> Json:
        return {"output_index": len(self._response["output"]) - 1}

    def _piece_events(self, piece: Piece) -> list[Json]:
        """Add a piece to the response; returns its events."""
        if isinstance(piece, Call):
            item: Json = {"type": "function_call", "id": new_id("fc"), "call_id": new_id("call")}
            item |= {"name": piece.name, "arguments": ""}
            return [*self._close_item("completed"), self._open_item(item)]
        if isinstance(piece, Arguments):
            assert self._item is not None
            self._item["arguments"] += piece.text
            return [self._item_event("function_call_arguments.delta", delta=piece.text)]
        events: list[Json] = []
        if self._item is None or self._item["type"] != "message":
            events += [*self._close_item("completed"), *self._open_message()]
        assert self._item is not None
        self._item["content"][0]["text"] += piece.text
        if piece.text:
            logprobs = self._take_logprobs()
            events.append(
                self._item_event("output_text.delta", delta=piece.text, logprobs=logprobs)
            )
        return events

    def _open_message(self) -> list[Json]:
        message: Json = {"type": "message", "id": new_id("msg"), "role": "assistant", "content": []}
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        opened = self._open_item(message)
        events = [opened, self._item_event("content_part.added", part=dict(part))]
        message["content"] = [part]
        return events

    def _open_item(self, item: Json) -> Json:
        self._item = item
        item["status"] = "in_progress"
        self._response["output"].append(item)
        return self._event("response.output_item.added", item=dict(item), **self._index())

    def _take_logprobs(self) -> list[Json]:
        """Move the log-probabilities since the last delta to the current item, if it is text."""
        logprobs, self._logprobs = self._logprobs, []
        if self._item is not None and self._item["type"] == "message":
            self._item["content"][0]["logprobs"] += logprobs
        return logprobs

    def _close_item(self, status: str) -> list[Json]:
        """Finish the current item, if there is one; returns its last events."""
        if self._item is None:
            return []
        item, index = self._item, self._index()
        item["status"] = status
        self._take_logprobs()
        if item["type"] == "message":
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._item_event("output_text.done", **text),
                self._item_event("content_part.done", part=part),
            ]
        else:
            call = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._item_event("function_call_arguments.done", **call)]
        self._item = None
        return [*events, self._event("response.output_item.done", item=item, **index)]
