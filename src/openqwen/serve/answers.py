"""The engine's events as OpenAI's objects: whole, or as a stream of chunks whose unchanging bytes
are made once.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, starmap
from operator import itemgetter
from typing import Any

from openqwen.engine import Event
from openqwen.engine.generator import TopTokens
from openqwen.serve.bridge import Answers
from openqwen.serve.errors import ApiError, identity
from openqwen.serve.json_text import dump_json
from openqwen.serve.protocol import ChatRequest, CompletionRequest, Json, Options
from openqwen.serve.tools import Arguments, Call, Piece, Text, ToolCalls
from openqwen.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # JSON has no infinity
_Row = tuple[int, float | None, TopTokens]


@dataclass
class Choice:
    """One answer, as far as it has come."""

    machine: ToolCalls | None = None  # where tools are offered
    most_calls: int | None = None
    text: str = ""
    calls: list[Json] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None

    def take(self, event: Event) -> list[Piece]:
        """Add an event; returns what became certain by it."""
        self.tokens += len(event.token_ids)
        if self.machine is None:
            pieces: list[Piece] = [Text(event.text)] if event.text else []
        else:
            pieces = self.machine.push(event.text) + (
                self.machine.finish() if event.finish_reason else []
            )
        kept = [
            p
            for p in pieces
            if isinstance(p, Text) or self.most_calls is None or p.index < self.most_calls
        ]
        for piece in kept:
            if isinstance(piece, Text):
                self.text += piece.text
            elif isinstance(piece, Call):
                function = {"name": piece.name, "arguments": ""}
                self.calls.append(
                    {"id": identity("call"), "type": "function", "function": function}
                )
            else:
                self.calls[piece.index]["function"]["arguments"] += piece.text
        if event.finish_reason:
            self.reason = (
                "tool_calls"
                if self.calls and event.finish_reason == "stop"
                else event.finish_reason
            )
        return kept

    def delta(self, piece: Piece) -> Json:
        """A piece as a stream tells it."""
        if isinstance(piece, Text):
            return {"content": piece.text}
        if isinstance(piece, Arguments):
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        begun = {"id": self.calls[piece.index]["id"], "type": "function"}
        return {
            "tool_calls": [
                {"index": piece.index, **begun, "function": {"name": piece.name, "arguments": ""}}
            ]
        }


class Writing:
    """The answers to one request for text. told: the model and system_fingerprint."""

    def __init__(
        self,
        request: Options,
        answers: Answers,
        prompts: list[list[int]],
        tokenizer: Tokenizer,
        told: Json,
    ):
        self.request, self.answers, self._prompts, self._tokenizer = (
            request,
            answers,
            prompts,
            tokenizer,
        )
        self.chat = isinstance(request, ChatRequest)
        chat = request if isinstance(request, ChatRequest) else None
        most = 1 if chat and chat.parallel_tool_calls is False else None
        tools = chat is not None and chat.offered is not None
        names = chat.untagged if chat else ()
        self.choices = [Choice(ToolCalls(names) if tools else None, most) for _ in answers.requests]
        self._echo_alone = isinstance(request, CompletionRequest) and request.max_tokens == 0
        self._n = len(self.choices) // len(prompts)
        asked = request.logprobs  # type: ignore[attr-defined]
        self._logprobs = asked is not None and asked is not False
        options: Any = request.stream_options or {}
        self._usage_last = bool(options.get("include_usage"))
        self._usage_always = self._usage_last and bool(options.get("continuous_usage_stats"))
        self._head = {
            "id": identity("chatcmpl" if self.chat else "cmpl"),
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            **told,
        }

    def usage(self) -> Json:
        """Tokens so far; a prompt counts once however many answers it gets."""
        prompt = sum(map(len, self._prompts))
        answer = sum(choice.tokens for choice in self.choices)
        cached = sum(request.cached_tokens for request in self.answers.requests[:: self._n])
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            **details,
        }

    async def whole(self) -> Json:
        """The answers when all are finished."""
        lists: dict[int, list[Event]] = {number: [] for number in range(len(self.choices))}
        async for number, event in self._events():
            self.choices[number].take(event)
            lists[number].append(event)
        choices = []
        for number, choice in enumerate(self.choices):
            echoed = self._echo(number)
            entry: Json = {"index": number}
            if self.chat:
                entry["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
                if choice.calls:
                    entry["message"] |= {"content": choice.text or None, "tool_calls": choice.calls}
            else:
                entry["text"] = echoed + choice.text
            entry["logprobs"] = self._told(self._before(number) + _rows(lists[number]))
            told = self._ids(lists[number]) | self._ends(number)
            choices.append(entry | {"finish_reason": choice.reason} | told)
        ids = self.chat and self.request.return_token_ids
        prompt = {"prompt_token_ids": self._prompts[0]} if ids else {}
        return {**self._head, "choices": choices, "usage": self.usage()} | prompt

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """The engine's, but without the one token that it cannot but make."""
        async for number, event in self.answers:
            if self._echo_alone:
                reason: Any = event.finish_reason and "length"
                event = replace(
                    event, token_ids=[], text="", logprobs=[], top=[], finish_reason=reason
                )
            yield number, event

    async def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events, an error's included."""
        head = self._head | ({"object": "chat.completion.chunk"} if self.chat else {})
        self._front = b"data: " + dump_json(head)[:-1] + b',"choices":[{"index":'
        offsets = [0] * len(self.choices)
        try:
            for number in range(len(self.choices) if self.chat else 0):
                yield self._chunk(number, {"role": "assistant", "content": None})
            async for number, event in self._events():
                choice = self.choices[number]
                if not offsets[number] and (
                    echoed := self._echo(number)
                ):  # only now is all known of the prompt
                    offsets[number] = len(echoed)
                    yield self._chunk(number, echoed, self._told(self._before(number)))
                pieces = choice.take(event)
                logprobs = self._told(_rows([event]), offsets[number]) if event.token_ids else None
                ids = self._ids([event])
                offsets[number] += len(event.text)
                if not self.chat:
                    if event.text or event.finish_reason or logprobs or ids:
                        yield self._chunk(number, event.text, logprobs, choice.reason, **ids)
                    continue
                deltas = [choice.delta(piece) for piece in pieces]
                if not deltas and event.token_ids and (logprobs or ids):
                    deltas = [{"content": ""}]
                for delta in deltas:
                    yield self._chunk(number, delta, logprobs, None, **ids)
                    logprobs, ids = None, {}
                if choice.reason:
                    yield self._chunk(number, {}, None, choice.reason)
            if self._usage_last:
                yield (
                    b"data: " + dump_json({**head, "choices": [], "usage": self.usage()}) + b"\n\n"
                )
        except ApiError as error:
            yield b"data: " + dump_json(error.body()) + b"\n\n"
        yield DONE

    def _chunk(
        self,
        number: int,
        said: Json | str,
        logprobs: Json | None = None,
        reason: str | None = None,
        **more: Any,
    ) -> bytes:
        told = b"null" if logprobs is None else dump_json(logprobs)
        parts = [
            self._front,
            b"%d" % number,
            b',"delta":' if self.chat else b',"text":',
            dump_json(said),
        ]
        parts += [
            b',"logprobs":',
            told,
            b',"finish_reason":',
            b"null" if reason is None else b'"%s"' % reason.encode(),
        ]
        if more:
            parts += [b",", dump_json(more)[1:-1]]
        usage = (
            [b'],"usage":', dump_json(self.usage()), b"}\n\n"]
            if self._usage_always
            else [b"]}\n\n"]
        )
        return b"".join([*parts, b"}", *usage])

    def _echo(self, number: int) -> str:
        if not isinstance(self.request, CompletionRequest) or not self.request.echo:
            return ""
        return self._tokenizer.decode(self._prompts[number // self._n], skip_control=False)

    def _ids(self, events: list[Event]) -> Json:
        if not self.request.return_token_ids:
            return {}
        made = [(token, event.version) for event in events for token in event.token_ids]
        return {
            "token_ids": [token for token, _ in made],
            "token_versions": [version for _, version in made],
        }

    def _ends(self, number: int) -> Json:
        """The token that ended an answer, and, as in vLLM, the ids of a completion's prompt."""
        if not self.request.return_token_ids:
            return {}
        ended = {"stop_id": self.answers.requests[number].stop_id}
        prompt = {} if self.chat else {"prompt_token_ids": self._prompts[number // self._n]}
        return ended | prompt

    def _before(self, number: int) -> list[_Row]:
        """The prompt's tokens, where they are told; nothing is known of the first."""
        request = self.answers.requests[number]
        told = request.sampling.prompt_logprobs is not None
        return (
            list(
                zip(request.prompt_ids, [None, *request.prompt_logprobs], [[], *request.prompt_top])
            )
            if told
            else []
        )

    def _told(self, rows: list[_Row], offset: int = 0) -> Json | None:
        """Log-probabilities: for chat an entry each token, for completions four lists."""
        if not self._logprobs:
            return None
        entries = [
            self._entry(token, logprob) | {"top_logprobs": [self._entry(*likely) for likely in top]}
            for token, logprob, top in rows
        ]
        if self.chat:
            return {"content": entries, "refusal": None}
        texts, values = ([entry[key] for entry in entries] for key in ("token", "logprob"))
        tops = [None if value is None else self._ranked(*row) for row, value in zip(rows, values)]
        offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def logprobs(self, event: Event) -> list[Json]:
        """Of a chat's tokens, where they were asked for."""
        return (self._told(_rows([event])) or {"content": []})["content"]

    def _ranked(self, token: int, logprob: float | None, top: TopTokens) -> dict[str, float]:
        """By their texts; of tokens of the same text, such as parts of characters, the likeliest
        counts.
        """
        pairs = sorted([(token, logprob), *top], key=itemgetter(1))
        return {entry["token"]: entry["logprob"] for entry in starmap(self._entry, pairs)}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        value = None if logprob is None else max(logprob, _LEAST)
        return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}


def _rows(events: list[Event]) -> list[_Row]:
    return [
        row
        for e in events
        for row in zip(e.token_ids, e.logprobs, e.top or [[]] * len(e.token_ids))
    ]
