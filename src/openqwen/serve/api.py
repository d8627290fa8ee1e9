"""What the server does with a request that has passed the gate, free of HTTP: batches use it
too.
"""

import asyncio
import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from openqwen.model import Packed, Scorer, load_model
from openqwen.model.quantize import QuantizedQwen2, refresh
from openqwen.serve.answers import Writing
from openqwen.serve.bridge import Bridge
from openqwen.serve.errors import ApiError
from openqwen.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Json,
    Options,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
    WeightsRequest,
    plain,
    without_strict,
)
from openqwen.serve.settings import ServeConfig
from openqwen.tokenizer.fill_in_middle import MARKERS, code_ids, middle_prompt


class Api:
    """One model behind names. scorer: a reward model, where there is one."""

    def __init__(
        self, bridge: Bridge, config: ServeConfig, names: list[str], scorer: Scorer | None
    ):
        self.bridge, self.config, self.names, self.scorer = bridge, config, names, scorer
        self.tokenizer, self.adapters = bridge.engine.tokenizer, bridge.engine.adapters.names
        self.max_context = bridge.engine.longest
        self._defaults = bridge.engine.model.config.generation
        self._started = int(time.time())
        self._print = (
            "b"
            + hashlib.sha256(repr((names, bridge.engine.model.config)).encode()).hexdigest()[:10]
        )

    def named(self, name: str | None, adapters: Sequence[str] = ()) -> str:
        """The model under the name that a client used, or one of these adapters."""
        known = [*self.names, *adapters]
        if name is not None and name not in known:
            only = ", ".join(known)
            raise ApiError(
                404, f"There is no model '{name}' here, only {only}.", "model", "model_not_found"
            )
        return name or self.names[0]

    def model(self, name: str) -> Json:
        """What clients are told of the model, or of it with an adapter."""
        more = {"owned_by": "openqwen", "max_model_len": self.max_context}
        if name in self.adapters:
            more["parent"] = self.names[0]
        return {"id": name, "object": "model", "created": self._started, **more}

    def _encode_chat(self, messages: list[Any], tools: Any, **ending: bool) -> list[int]:
        tools = without_strict(tools)
        return self.tokenizer.encode_chat(plain(messages), tools=tools, **ending)[0]

    def _several(self, value: Any, param: str, suffix: str | None = None) -> list[list[int]]:
        """The prompts in a field that takes one or many, as text or ids.

        suffix: what follows a middle that is to be written. Control tokens in a text are read, but
        not in code around a middle: there they are text, as in training.
        """
        prompts = [value] if isinstance(value, str) or isinstance(value[0], int) else value
        encode = partial(self.tokenizer.encode, allow_control=not suffix)
        rows = [encode(one) if isinstance(one, str) else one for one in prompts]
        if suffix:
            if not set(MARKERS) <= self.tokenizer.control_ids.keys():
                message = "suffix needs fill-in-the-middle tokens, which this model does not have."
                raise ApiError(400, message, "suffix")
            after = encode(suffix)
            rows = [middle_prompt(self.tokenizer, row, after) for row in rows]
        return [self._fitting(ids, param) for ids in rows]

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if len(ids) >= self.max_context:
            # In OpenAI's words, by which clients know that they must shorten the conversation.
            message = f"This model's maximum context length is {self.max_context} tokens. "
            message += f"However, your {param} resulted in {len(ids)} tokens. "
            message += (
                f"Please reduce the length of the {param} so that there is room for an answer "
            )
            message += "(context_length_exceeded)."  # LangChain reads the text alone
            raise ApiError(400, message, param, "context_length_exceeded")
        if max(ids) >= self.tokenizer.vocab_size:
            raise ApiError(400, f"{param} has a token id out of vocabulary ({max(ids)}).", param)
        return ids

    async def chat(self, request: ChatRequest, priority: int = 0) -> Writing:
        """Begin to answer a chat."""
        encode = partial(self._encode_chat, request.messages, request.offered, **request.ending)
        ids = await asyncio.to_thread(encode)
        asked = request.max_completion_tokens or request.max_tokens
        return await self._begin(
            request, [self._fitting(ids, "messages")], asked, request.top_logprobs or 0, priority
        )

    async def complete(self, request: CompletionRequest, priority: int = 0) -> Writing:
        """Begin to continue texts."""
        prompts = await asyncio.to_thread(self._several, request.prompt, "prompt", request.suffix)
        stops = code_ids(self.tokenizer) if request.suffix else ()
        top = request.logprobs or 0
        return await self._begin(request, prompts, request.max_tokens, top, priority, stops)

    async def _begin(
        self,
        request: Options,
        prompts: list[list[int]],
        most: int | None,
        top: int,
        priority: int,
        stops: tuple[int, ...] = (),
    ) -> Writing:
        """stops: ids that end these answers too."""
        model, vocabulary = self.named(request.model, self.adapters), self.tokenizer.vocab_size
        if beyond := [i for i in request.logit_bias or {} if int(i) >= vocabulary]:
            message = (
                f"logit_bias has {', '.join(beyond)}, out of vocabulary ({vocabulary} tokens)."
            )
            raise ApiError(400, message, "logit_bias")
        rooms = [self.max_context - len(ids) for ids in prompts]
        limits = [None if most is None else max(1, min(most, room)) for room in rooms]
        samplings = [request.sampling(self._defaults, limit, top) for limit in limits]
        samplings = [replace(one, stop_ids=one.stop_ids + stops) for one in samplings]
        asked = [(ids, sampling, request.n or 1) for ids, sampling in zip(prompts, samplings)]
        answers = await self.bridge.submit(
            asked, priority, model if model in self.adapters else None
        )
        names = {
            "model": model,
            "system_fingerprint": f"{self._print}-{self.bridge.engine.version}",
        }
        return Writing(request, answers, prompts, self.tokenizer, names)

    async def embed(self, request: EmbeddingRequest) -> Json:
        """Vectors of length 1."""
        model, engine = self.named(request.model), self.bridge.engine
        prompts = await asyncio.to_thread(self._several, request.input, "input")
        if (request.dimensions or 1) > (width := engine.model.config.hidden_size):
            raise ApiError(400, f"This model's embeddings have {width} dimensions.", "dimensions")
        values: list[Any] = []
        for ids in prompts:
            made = await self.bridge.call(partial(engine.embed, [ids]))
            vector = made[0, : request.dimensions].float().cpu().numpy()
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
            packed = request.encoding_format == "base64"
            values.append(
                base64.b64encode(vector.tobytes()).decode() if packed else vector.tolist()
            )
        return _listed("embedding", values, model, prompts)

    async def score(self, request: ScoreRequest) -> Json:
        """What the reward model thinks of conversations."""
        model, scorer = self.named(request.model), self.scorer
        if scorer is None:
            raise ApiError(
                404, "No reward model is served here; start with --reward.", code="no_reward_model"
            )
        rows = []
        for number, messages in enumerate(request.conversations):
            where = f"conversations[{number}]"
            if messages[-1]["role"] != "assistant":
                raise ApiError(
                    400, "A conversation to score ends with the assistant's answer.", where
                )
            ids, written = await asyncio.to_thread(self.tokenizer.encode_chat, plain(messages))
            # As in training: up to the end of the turn, without the newline behind it.
            end = max((n for n, own in enumerate(written, 1) if own), default=len(ids))
            rows.append(self._fitting(ids[:end], where))
        values = [await self.bridge.call(partial(_score, scorer, ids)) for ids in rows]
        return _listed("score", values, model, rows)

    async def tokenize(self, request: TokenizeRequest) -> Json:
        """Ids of a text, or of a chat as the model reads it."""
        text = request.content if request.prompt is None else request.prompt
        if (text is None) == (request.messages is None):
            raise ApiError(400, "Give one of prompt, content and messages.", "prompt")
        if text is None:
            encode = partial(
                self._encode_chat, request.messages or [], request.tools, **request.ending
            )
            ids = await asyncio.to_thread(encode)
        else:
            ids = await asyncio.to_thread(self.tokenizer.encode, text, request.parse_special)
        pieces = [
            {"id": i, "piece": _piece(self.tokenizer.token_bytes(i))}
            for i in ids
            if request.with_pieces
        ]
        return {"tokens": pieces or ids, "count": len(ids), "max_model_len": self.max_context}

    async def detokenize(self, request: DetokenizeRequest) -> Json:
        """The text of ids, under llama.cpp's name and vLLM's."""
        text = self.tokenizer.decode(request.tokens, skip_control=False)
        return {"content": text, "prompt": text}

    async def template(self, request: TemplateRequest) -> Json:
        """A chat as the text that the model reads."""
        tools: Any = without_strict(request.tools)
        render = partial(
            self.tokenizer.apply_chat_template, plain(request.messages), tools, **request.ending
        )
        return {"prompt": await asyncio.to_thread(render)}

    async def update_weights(self, request: WeightsRequest) -> Json:
        """Put the weights of a subfolder of --weights into the network at work."""
        version, engine = request.version, self.bridge.engine
        folder = self.config.weights and self.config.weights / str(version)
        if folder is None or not folder.is_dir():
            raise ApiError(404, f"There are no weights of version {version}.", "version")
        new, model = await asyncio.to_thread(load_model, folder), engine.model
        if new.config != model.config:
            raise ApiError(
                409, f"The weights of version {version} are of another network.", "version"
            )

        def change() -> None:
            if isinstance(model, QuantizedQwen2):
                refresh(model, new)
            else:
                model.load_state_dict(new.state_dict())
            engine.refresh(version)

        await self.bridge.call(change)
        return {"version": engine.version}


def _score(scorer: Scorer, ids: list[int]) -> float:
    packed, device = Packed.from_lengths([len(ids)]), scorer.device
    tokens, last = torch.tensor(ids, device=device), torch.tensor([len(ids) - 1], device=device)
    with torch.inference_mode():
        return float(scorer(tokens, packed.positions.to(device), packed.to(device), last))


def _listed(kind: str, values: list[Any], model: str, prompts: list[list[int]]) -> Json:
    count = sum(map(len, prompts))
    data = [{"object": kind, "index": index, kind: value} for index, value in enumerate(values)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no whole characters."""
    text = raw.decode(errors="replace")
    return text if text.encode() == raw else list(raw)
