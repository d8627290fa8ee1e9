"""The engine's events as OpenAI's objects: one response, or a stream of chunks."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, starmap
from operator import itemgetter
from typing import Any

from openqwen.engine import Event
from openqwen.engine.generator import TopTokens
from openqwen.http.errors import ApiError, new_id
from openqwen.http.json_body import dump_json
from openqwen.serve.bridge import Answers
from openqwen.serve.protocol import ChatRequest, CompletionRequest, Json, Options
from openqwen.serve.tools import Arguments, Call, Piece, Text, ToolCalls
from openqwen.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # JSON has no infinity
_Row = tuple[int, float | None, TopTokens]  # token id, its log-probability, the likeliest tokens


@dataclass
class Choice:
    """One answer, as far as it is generated.

    parser: finds tool calls, where tools are offered. most_calls: further calls are dropped.
    """

    parser: ToolCalls | None = None
    most_calls: int | None = None
    text: str = ""
    calls: list[Json] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None  # why the answer has ended

    def add(self, event: Event) -> list[Piece]:
        """Add an event; returns the pieces of text and calls that it completes."""
        self.tokens += len(event.token_ids)
        pieces: list[Piece] = []
        if self.parser is None:
            pieces += [Text(event.text)] if event.text else []
        else:
            pieces += self.parser.push(event.text)
            pieces += self.parser.finish() if event.finish_reason else []
        pieces = [piece for piece in pieces if self._kept(piece)]
        for piece in pieces:
            self._append(piece)
        self.reason = event.finish_reason
        if self.calls and self.reason == "stop":
            self.reason = "tool_calls"
        return pieces

    def _kept(self, piece: Piece) -> bool:
        return isinstance(piece, Text) or self.most_calls is None or piece.index < self.most_calls

    def _append(self, piece: Piece) -> None:
        if isinstance(piece, Text):
            self.text += piece.text
        elif isinstance(piece, Call):
            function = {"name": piece.name, "arguments": ""}
            self.calls.append({"id": new_id("call"), "type": "function", "function": function})
        else:
            self.calls[piece.index]["function"]["arguments"] += piece.text

    def delta(self, piece: Piece) -> Json:
        """A piece in the form of a stream's `delta`."""
        if isinstance(piece, Text):
            return {"content": piece.text}
        if isinstance(piece, Arguments):
            call: Json = {"index": piece.index, "function": {"arguments": piece.text}}
        else:
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": self.calls[piece.index]["id"], "type": "function"}
            call["function"] = function
        return {"tool_calls": [call]}


class TextResponse:
    """The answers to one request for text.

    Args:
        request: the request.
        answers: the answers in the engine.
        prompts: token ids of the prompts; each has as many answers as the others.
        tokenizer: turns token ids into text.
        names: `model` and `system_fingerprint` of the response.
    """

    def __init__(
        self,
        request: Options,
        answers: Answers,
        prompts: list[list[int]],
        tokenizer: Tokenizer,
        names: Json,
    ):
        self.request, self.answers = request, answers
        self._prompts, self._tokenizer = prompts, tokenizer
        chat = request if isinstance(request, ChatRequest) else None
        self.chat = chat is not None
        self.choices = [Choice() for _ in answers.requests]
        if chat is not None and chat.offered is not None:
            most = 1 if chat.parallel_tool_calls is False else None
            self.choices = [Choice(ToolCalls(chat.untagged), most) for _ in answers.requests]
        self._echo_only = isinstance(request, CompletionRequest) and request.max_tokens == 0
        self._n = len(self.choices) // len(prompts)
        logprobs = request.logprobs  # type: ignore[attr-defined]
        self._logprobs = logprobs is not None and logprobs is not False
        options: Any = request.stream_options or {}
        self._usage_last = bool(options.get("include_usage"))
        self._usage_always = self._usage_last and bool(options.get("continuous_usage_stats"))
        self._head = {
            "id": new_id("chatcmpl" if self.chat else "cmpl"),
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            **names,
        }

    def usage(self) -> Json:
        """Token counts so far; a prompt counts once, however many answers it has."""
        prompt = sum(map(len, self._prompts))
        answer = sum(choice.tokens for choice in self.choices)
        cached = sum(request.cached_tokens for request in self.answers.requests[:: self._n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def result(self) -> Json:
        """The response, when all answers are finished."""
        events: list[list[Event]] = [[] for _ in self.choices]
        async for number, event in self._events():
            self.choices[number].add(event)
            events[number].append(event)
        choices = [self._entry(number, events[number]) for number in range(len(self.choices))]
        response = {**self._head, "choices": choices, "usage": self.usage()}
        if self.chat and self.request.return_token_ids:
            response["prompt_token_ids"] = self._prompts[0]
        return response

    def _entry(self, number: int, events: list[Event]) -> Json:
        """One finished answer as an entry of `choices`."""
        choice = self.choices[number]
        entry: Json = {"index": number}
        if self.chat:
            message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            entry["message"] = message
        else:
            entry["text"] = self._echo(number) + choice.text
        entry["logprobs"] = self._logprobs_of(self._prompt_rows(number) + _rows(events))
        entry["finish_reason"] = choice.reason
        return entry | self._ids(events) | self._end_ids(number)

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """The engine's events; with `echo` alone, without the one token that the engine makes."""
        async for number, event in self.answers:
            if self._echo_only:
                event = replace(event, token_ids=[], text="", logprobs=[], top=[])
                if event.finish_reason:
                    event = replace(event, finish_reason="length")
            yield number, event

    async def stream(self) -> AsyncIterator[bytes]:
        """The answers as server-sent events; an error becomes an event too."""
        head = self._head | ({"object": "chat.completion.chunk"} if self.chat else {})
        # The bytes that all chunks begin with, made once.
        self._front = b"data: " + dump_json(head)[:-1] + b',"choices":[{"index":'
        offsets = [0] * len(self.choices)
        try:
            for number in range(len(self.choices) if self.chat else 0):
                yield self._chunk(number, {"role": "assistant", "content": None})
            async for number, event in self._events():
                # The prompt's log-probabilities are known now, and not before.
                if not offsets[number] and (echoed := self._echo(number)):
                    offsets[number] = len(echoed)
                    yield self._chunk(number, echoed, self._logprobs_of(self._prompt_rows(number)))
                pieces = self.choices[number].add(event)
                logprobs = None
                if event.token_ids:
                    logprobs = self._logprobs_of(_rows([event]), offsets[number])
                offsets[number] += len(event.text)
                chunks = self._chat_chunks if self.chat else self._text_chunks
                for chunk in chunks(number, event, pieces, logprobs):
                    yield chunk
            if self._usage_last:
                last = {**head, "choices": [], "usage": self.usage()}
                yield b"data: " + dump_json(last) + b"\n\n"
        except ApiError as error:
            yield b"data: " + dump_json(error.body()) + b"\n\n"
        yield DONE

    def _text_chunks(
        self, number: int, event: Event, _: list[Piece], logprobs: Json | None
    ) -> list[bytes]:
        ids, reason = self._ids([event]), self.choices[number].reason
        if not (event.text or event.finish_reason or logprobs or ids):
            return []
        return [self._chunk(number, event.text, logprobs, reason, **ids)]

    def _chat_chunks(
        self, number: int, event: Event, pieces: list[Piece], logprobs: Json | None
    ) -> list[bytes]:
        """The first chunk holds the log-probabilities and ids, the last the finish reason."""
        choice, ids = self.choices[number], self._ids([event])
        deltas = [choice.delta(piece) for piece in pieces]
        if not deltas and event.token_ids and (logprobs or ids):
            deltas = [{"content": ""}]
        chunks = []
        for delta in deltas:
            chunks.append(self._chunk(number, delta, logprobs, None, **ids))
            logprobs, ids = None, {}
        if choice.reason:
            chunks.append(self._chunk(number, {}, None, choice.reason))
        return chunks

    def _chunk(
        self,
        number: int,
        content: Json | str,
        logprobs: Json | None = None,
        reason: str | None = None,
        **more: Any,
    ) -> bytes:
        parts = [self._front, b"%d" % number]
        parts += [b',"delta":' if self.chat else b',"text":', dump_json(content)]
        parts += [b',"logprobs":', dump_json(logprobs)]
        parts += [b',"finish_reason":', dump_json(reason)]
        if more:
            parts += [b",", dump_json(more)[1:-1]]
        parts.append(b"}]")
        if self._usage_always:
            parts += [b',"usage":', dump_json(self.usage())]
        return b"".join([*parts, b"}\n\n"])

    def _echo(self, number: int) -> str:
        if not isinstance(self.request, CompletionRequest) or not self.request.echo:
            return ""
        return self._tokenizer.decode(self._prompts[number // self._n], skip_control=False)

    def _ids(self, events: list[Event]) -> Json:
        """The events' token ids, and the version of the weights that made each."""
        if not self.request.return_token_ids:
            return {}
        versions = [event.version for event in events for _ in event.token_ids]
        ids = [token for event in events for token in event.token_ids]
        return {"token_ids": ids, "token_versions": versions}

    def _end_ids(self, number: int) -> Json:
        """The token that ended an answer, and, as in vLLM, the ids of a completion's prompt."""
        if not self.request.return_token_ids:
            return {}
        ids: Json = {"stop_id": self.answers.requests[number].stop_id}
        if not self.chat:
            ids["prompt_token_ids"] = self._prompts[number // self._n]
        return ids

    def _prompt_rows(self, number: int) -> list[_Row]:
        """The prompt's tokens, where log-probabilities of them are requested."""
        request = self.answers.requests[number]
        if request.sampling.prompt_logprobs is None:
            return []
        # The first token has no log-probability.
        logprobs, top = [None, *request.prompt_logprobs], [[], *request.prompt_top]
        return list(zip(request.prompt_ids, logprobs, top))

    def _logprobs_of(self, rows: list[_Row], offset: int = 0) -> Json | None:
        """Log-probabilities: of a chat an entry for each token, of a completion four lists.

        offset: of the first token's text in the answer.
        """
        if not self._logprobs:
            return None
        entries = []
        for token, logprob, top in rows:
            entry = self._token(token, logprob)
            entries.append(entry | {"top_logprobs": list(starmap(self._token, top))})
        if self.chat:
            return {"content": entries, "refusal": None}
        texts = [entry["token"] for entry in entries]
        logprobs = [entry["logprob"] for entry in entries]
        return {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": [None if row[1] is None else self._by_text(*row) for row in rows],
            "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
        }

    def logprobs(self, event: Event) -> list[Json]:
        """The log-probabilities of an event of a chat, where they are requested."""
        return (self._logprobs_of(_rows([event])) or {"content": []})["content"]

    def _by_text(self, token: int, logprob: float | None, top: TopTokens) -> dict[str, float]:
        """Log-probabilities by text.

        Of several tokens with the same text, such as parts of characters, the likeliest counts.
        """
        pairs = sorted([(token, logprob), *top], key=itemgetter(1))
        return {entry["token"]: entry["logprob"] for entry in starmap(self._token, pairs)}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        value = None if logprob is None else max(logprob, _LEAST)
        return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}


def _rows(events: list[Event]) -> list[_Row]:
    rows: list[_Row] = []
    for event in events:
        rows += zip(event.token_ids, event.logprobs, event.top or [[]] * len(event.token_ids))
    return rows
