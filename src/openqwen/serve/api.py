"""What the server does with a request that has passed the gate, free of HTTP: batches use it too."""

import asyncio
import base64
import hashlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from openqwen.engine import Sampling
from openqwen.model import Packed, Scorer, load_model
from openqwen.serve.answers import Writing
from openqwen.serve.bridge import Bridge
from openqwen.serve.errors import ApiError
from openqwen.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Json,
    Message,
    Options,
    ScoreRequest,
    TokenizeRequest,
    Tool,
)
from openqwen.serve.settings import ServeConfig
from openqwen.tokenizer import Tokenizer

Result = TypeVar("Result")
_INPUTS = 256  # prompts or embeddings of one request, at most


class Api:
    """One model behind names. scorer: a reward model, where there is one."""

    def __init__(self, bridge: Bridge, config: ServeConfig, names: list[str], scorer: Scorer | None):
        self.bridge, self.config, self.names, self.scorer = bridge, config, names, scorer
        self.tokenizer: Tokenizer = bridge.engine.tokenizer
        self.max_context = bridge.engine.config.max_context or bridge.engine.model.config.max_position_embeddings
        self._defaults = bridge.engine.model.config.generation
        self._started = int(time.time())
        self._print = "b" + hashlib.sha256(repr((names, bridge.engine.model.config)).encode()).hexdigest()[:10]

    def named(self, name: str | None) -> str:
        """The model under the name that a client used."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"There is no model '{name}' here, only {known}.", "model", "model_not_found")
        return name or self.names[0]

    def model(self, name: str) -> Json:
        """What clients are told of the model."""
        more = {"owned_by": "openqwen", "max_model_len": self.max_context}
        return {"id": name, "object": "model", "created": self._started, **more}

    async def _aside(self, function: Callable[[], Result]) -> Result:
        """Reading a long text takes a while: not in the event loop."""
        return await asyncio.to_thread(function)

    def _encode_chat(self, messages: list[Message], tools: list[Json] | None, open_: bool = True) -> list[int]:
        plain = [message.plain(f"messages[{number}]") for number, message in enumerate(messages)]
        return self.tokenizer.encode_chat(plain, add_generation_prompt=open_, tools=tools)[0]

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.encode(prompt, allow_control=True) if isinstance(prompt, str) else prompt

    def _several(self, value: str | list[str] | list[int] | list[list[int]], param: str) -> list[list[int]]:
        """The prompts in a field that takes one or many, as text or ids."""
        one = isinstance(value, str) or (bool(value) and isinstance(value[0], int))
        prompts: Any = [value] if one else value
        if not 0 < len(prompts) <= _INPUTS:
            raise ApiError(400, f"{param} must hold 1 to {_INPUTS} texts.", param=param)
        return [self._fitting(self._encode(prompt), param) for prompt in prompts]

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if not 0 < len(ids) < self.max_context:
            message = f"{param} has {len(ids)} tokens; this model takes 1 to {self.max_context - 1}."
            raise ApiError(400, message, param, "context_length_exceeded" if ids else None)
        if max(ids) >= self.tokenizer.vocab_size:
            raise ApiError(400, f"{param} has a token id out of vocabulary ({max(ids)}).", param)
        return ids

    async def chat(self, request: ChatRequest, priority: int = 0) -> Writing:
        """Begin to answer a chat."""
        model = self.named(request.model)
        ids = await self._aside(lambda: self._encode_chat(request.messages, request.offered))
        asked = request.max_completion_tokens or request.max_tokens
        top = request.top_logprobs or 0
        return await self._begin(request, [self._fitting(ids, "messages")], asked, top, model, priority)

    async def complete(self, request: CompletionRequest, priority: int = 0) -> Writing:
        """Begin to continue texts."""
        model = self.named(request.model)
        prompts = await self._aside(lambda: self._several(request.prompt, "prompt"))
        return await self._begin(request, prompts, request.max_tokens, request.logprobs or 0, model, priority)

    async def _begin(
        self, request: Options, prompts: list[list[int]], asked: int | None, top: int, model: str, priority: int
    ) -> Writing:
        vocabulary = self.tokenizer.vocab_size
        if any(int(i) >= vocabulary for i in request.logit_bias or {}):
            raise ApiError(400, f"logit_bias has a token id out of vocabulary ({vocabulary}).", "logit_bias")

        def sampling(ids: list[int]) -> Sampling:
            room = self.max_context - len(ids)
            return request.sampling(self._defaults, min(asked or room, room), request.structure(), top)

        answers = await self.bridge.submit([(ids, sampling(ids), request.n or 1) for ids in prompts], priority)
        fingerprint = f"{self._print}-{self.bridge.engine.version}"
        return Writing(request, answers, prompts, self.tokenizer, model, fingerprint)

    async def embed(self, request: EmbeddingRequest) -> Json:
        """Vectors of length 1."""
        model = self.named(request.model)
        prompts = await self._aside(lambda: self._several(request.input, "input"))
        width = self.bridge.engine.model.config.hidden_size
        if (request.dimensions or 1) > width:
            raise ApiError(400, f"This model's embeddings have {width} dimensions.", "dimensions")
        vectors = [await self.bridge.call(lambda ids=ids: self.bridge.engine.embed([ids])[0]) for ids in prompts]
        data = []
        for index, vector in enumerate(vectors):
            array = np.asarray(vector, np.float32)[: request.dimensions]
            array = array / max(float(np.linalg.norm(array)), 1e-12)
            text = request.encoding_format == "base64"
            value = base64.b64encode(array.astype("<f4").tobytes()).decode() if text else array.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
        return {"object": "list", "data": data, "model": model, "usage": _read(prompts)}

    async def score(self, request: ScoreRequest) -> Json:
        """What the reward model thinks of conversations."""
        model, scorer = self.named(request.model), self.scorer
        if scorer is None:
            raise ApiError(404, "No reward model is served here; start with --reward.", code="no_reward_model")
        rows = []
        for number, messages in enumerate(request.conversations):
            where = f"conversations[{number}]"
            if messages[-1].role != "assistant":
                raise ApiError(400, "A conversation to score ends with the assistant's answer.", where)
            ids = await self._aside(lambda messages=messages: self._encode_chat(messages, None, open_=False))
            # As in training: up to the end of the turn, without the newline behind it.
            end = len(ids) - ids[::-1].index(self.tokenizer.eos_id)
            rows.append(self._fitting(ids[:end], where))
        scores = [await self.bridge.call(lambda ids=ids: _score(scorer, ids)) for ids in rows]
        data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
        return {"object": "list", "data": data, "model": model, "usage": _read(rows)}

    async def tokenize(self, request: TokenizeRequest) -> Json:
        """Ids of a text, or of a chat as the model reads it."""
        text = request.content if request.prompt is None else request.prompt
        if (text is None) == (request.messages is None):
            raise ApiError(400, "Give one of prompt, content and messages.", "prompt")
        tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or []]

        def encode() -> list[int]:
            if text is not None:
                return self.tokenizer.encode(text, allow_control=request.parse_special)
            return self._encode_chat(request.messages or [], tools, request.add_generation_prompt)

        ids = await self._aside(encode)
        told: list[Any] = ids
        if request.with_pieces:
            pieces = ((i, self.tokenizer.token_bytes(i)) for i in ids)
            told = [{"id": i, "piece": raw.decode() if _whole(raw) else list(raw)} for i, raw in pieces]
        return {"tokens": told, "count": len(ids), "max_model_len": self.max_context}

    async def template(self, messages: list[Message], tools: list[Tool] | None) -> str:
        """A chat as the text that the model reads."""
        plain = [message.plain(f"messages[{number}]") for number, message in enumerate(messages)]
        offered = [tool.model_dump(exclude_unset=True) for tool in tools or []]
        return await self._aside(lambda: self.tokenizer.apply_chat_template(plain, offered, True))

    async def update_weights(self, version: int) -> None:
        """Put the weights of the subfolder `version` of --weights into the network at work."""
        folder = self.config.weights and self.config.weights / str(version)
        if folder is None or not folder.is_dir():
            raise ApiError(404, f"There are no weights of version {version}.", "version")
        model = self.bridge.engine.model
        new = (await self._aside(lambda: load_model(folder, dtype=None))).state_dict()
        old = model.state_dict()
        if {name: tensor.shape for name, tensor in new.items()} != {name: tensor.shape for name, tensor in old.items()}:
            raise ApiError(409, f"The weights of version {version} are of another network.", "version")

        @torch.no_grad()
        def change() -> None:
            for name, tensor in new.items():
                old[name].copy_(tensor)
            self.bridge.engine.refresh(version)

        await self.bridge.call(change)


def _score(scorer: Scorer, ids: list[int]) -> float:
    packed = Packed.from_lengths([len(ids)])
    device = scorer.device
    with torch.inference_mode():
        tokens, last = torch.tensor(ids, device=device), torch.tensor([len(ids) - 1], device=device)
        return float(scorer(tokens, packed.positions.to(device), packed.to(device), last))


def _read(prompts: list[list[int]]) -> Json:
    count = sum(map(len, prompts))
    return {"prompt_tokens": count, "total_tokens": count}


def _whole(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
