"""What the server does for each kind of request, without HTTP: batches use it too."""

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

from openqwen.engine.score import criteria_scores
from openqwen.http.errors import ApiError
from openqwen.model import Scorer, load_model
from openqwen.serve.answers import TextResponse
from openqwen.serve.bridge import Bridge
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
from openqwen.support.batching import cut_to_budget
from openqwen.tokenizer.answers import encode_answer
from openqwen.tokenizer.fill_in_middle import MARKERS, code_ids, middle_prompt

# Fields of requests that the engine's and the tokenizer's errors may name.
FIELDS = ("messages", "prompt", "tools")
_SCORED = 2_048  # most tokens to score between two steps of the engine, but for a longer answer


class Api:
    """Answers requests with one model.

    Args:
        bridge: the engine's thread.
        config: the server's settings.
        names: the model's names; responses use the first where a request gives none.
        scorer: a reward model for `score`.
    """

    def __init__(
        self, bridge: Bridge, config: ServeConfig, names: list[str], scorer: Scorer | None
    ):
        self.bridge, self.config, self.names, self.scorer = bridge, config, names, scorer
        self.tokenizer, self.adapters = bridge.engine.tokenizer, bridge.engine.adapters.names
        self.max_context = bridge.engine.longest
        self._defaults = bridge.engine.model.config.generation
        self._started = int(time.time())
        identity = repr((names, bridge.engine.model.config)).encode()
        self._fingerprint = "b" + hashlib.sha256(identity).hexdigest()[:10]

    def named(self, name: str | None, adapters: Sequence[str] = ()) -> str:
        """The name to use in the response; ApiError 404 for a name of no model or adapter."""
        known = [*self.names, *adapters]
        if name is not None and name not in known:
            message = f"There is no model '{name}' here. Known models: {', '.join(known)}."
            raise ApiError(404, message, "model", "model_not_found")
        return name or self.names[0]

    def model(self, name: str) -> Json:
        """The description of the model, or of the model with an adapter."""
        more = {"owned_by": "openqwen", "max_model_len": self.max_context}
        if name in self.adapters:
            more["parent"] = self.names[0]
        return {"id": name, "object": "model", "created": self._started, **more}

    def _encode_chat(self, messages: list[Any], tools: Any, **ending: bool) -> list[int]:
        tools = without_strict(tools)
        return self.tokenizer.encode_chat(plain(messages), tools=tools, **ending)[0]

    def _prompts(self, value: Any, param: str, suffix: str | None = None) -> list[list[int]]:
        """The token ids of a field that holds one prompt or several, as texts or ids.

        suffix: the text after a middle that is to be written. Control tokens in a prompt are
        read as such, but not in code around a middle: there they are text, as in training.
        """
        prompts = [value] if isinstance(value, str) or isinstance(value[0], int) else value
        encode = partial(self.tokenizer.encode, allow_control=not suffix)
        rows = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        if suffix:
            if not set(MARKERS) <= self.tokenizer.control_ids.keys():
                message = "suffix needs fill-in-the-middle tokens, which this model does not have."
                raise ApiError(400, message, "suffix")
            after = encode(suffix)
            rows = [middle_prompt(self.tokenizer, row, after) for row in rows]
        return [self._checked(ids, param) for ids in rows]

    def _checked(self, ids: list[int], param: str) -> list[int]:
        """The ids, if the context has room for them and the vocabulary holds them."""
        if len(ids) >= self.max_context:
            # OpenAI's words: clients know by them that they must shorten the conversation.
            # LangChain reads the text and not the code, so the text holds the code too.
            message = f"This model's maximum context length is {self.max_context} tokens. "
            message += f"However, your {param} resulted in {len(ids)} tokens. Please reduce the "
            message += f"length of the {param} so that there is room for an answer "
            message += "(context_length_exceeded)."
            raise ApiError(400, message, param, "context_length_exceeded")
        if max(ids) >= self.tokenizer.vocab_size:
            message = f"{param} holds the token id {max(ids)}, which is out of vocabulary."
            raise ApiError(400, message, param)
        return ids

    async def chat(self, request: ChatRequest, priority: int = 0) -> TextResponse:
        """Start the answers to a chat."""
        encode = partial(self._encode_chat, request.messages, request.offered, **request.ending)
        ids = self._checked(await asyncio.to_thread(encode), "messages")
        most = request.max_completion_tokens or request.max_tokens
        return await self._start(request, [ids], most, request.top_logprobs or 0, priority)

    async def complete(self, request: CompletionRequest, priority: int = 0) -> TextResponse:
        """Start the completions of texts."""
        prompts = await asyncio.to_thread(self._prompts, request.prompt, "prompt", request.suffix)
        stop_ids = code_ids(self.tokenizer) if request.suffix else ()
        top = request.logprobs or 0
        return await self._start(request, prompts, request.max_tokens, top, priority, stop_ids)

    async def _start(
        self,
        request: Options,
        prompts: list[list[int]],
        most: int | None,
        top_logprobs: int,
        priority: int,
        stop_ids: tuple[int, ...] = (),
    ) -> TextResponse:
        """Submit prompts to the engine. most: tokens of one answer; None: all that there is room
        for.
        """
        model, vocabulary = self.named(request.model, self.adapters), self.tokenizer.vocab_size
        if beyond := [i for i in request.logit_bias or {} if int(i) >= vocabulary]:
            message = f"logit_bias holds {', '.join(beyond)}, out of vocabulary "
            message += f"({vocabulary} tokens)."
            raise ApiError(400, message, "logit_bias")
        submitted = []
        for ids in prompts:
            room = self.max_context - len(ids)
            limit = None if most is None else max(1, min(most, room))
            sampling = request.sampling(self._defaults, limit, top_logprobs)
            sampling = replace(sampling, stop_ids=sampling.stop_ids + stop_ids)
            submitted.append((ids, sampling, request.n or 1))
        adapter = model if model in self.adapters else None
        answers = await self.bridge.submit(submitted, priority, adapter)
        fingerprint = f"{self._fingerprint}-{self.bridge.engine.version}"
        names = {"model": model, "system_fingerprint": fingerprint}
        return TextResponse(request, answers, prompts, self.tokenizer, names)

    async def embed(self, request: EmbeddingRequest) -> Json:
        """Embeddings, scaled to length 1."""
        model, engine = self.named(request.model), self.bridge.engine
        prompts = await asyncio.to_thread(self._prompts, request.input, "input")
        if (request.dimensions or 1) > (width := engine.model.config.hidden_size):
            raise ApiError(400, f"This model's embeddings have {width} dimensions.", "dimensions")
        values: list[Any] = []
        for ids in prompts:
            embeddings = await self.bridge.call(partial(engine.embed, [ids]))
            vector = embeddings[0, : request.dimensions].float().cpu().numpy()
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
            if request.encoding_format == "base64":
                values.append(base64.b64encode(vector.tobytes()).decode())
            else:
                values.append(vector.tolist())
        return _listed("embedding", values, model, prompts)

    async def score(self, request: ScoreRequest) -> Json:
        """The reward model's scores of conversations."""
        model, scorer = self.named(request.model), self.scorer
        if scorer is None:
            message = "No reward model is served here; start the server with --reward."
            raise ApiError(404, message, code="no_reward_model")
        rows = []
        for number, messages in enumerate(request.conversations):
            where = f"conversations[{number}]"
            if messages[-1]["role"] != "assistant":
                message = "A conversation to score must end with an assistant message."
                raise ApiError(400, message, where)
            talk = plain(messages)
            encode = partial(encode_answer, self.tokenizer, talk[:-1], talk[-1])
            rows.append(self._checked((await asyncio.to_thread(encode))[0], where))
        scores: list[list[float]] = []
        for cut in cut_to_budget(list(map(len, rows)), _SCORED):
            part = await self.bridge.call(partial(criteria_scores, scorer, rows[cut]))
            scores += part.tolist()
        values = scorer.reward(torch.tensor(scores)).tolist()
        listed = _listed("score", values, model, rows)
        if len(scorer.criteria) > 1:
            for entry, by_criterion in zip(listed["data"], scores, strict=True):
                entry["criteria"] = dict(zip(scorer.criteria, by_criterion))
        return listed

    async def tokenize(self, request: TokenizeRequest) -> Json:
        """The token ids of a text, or of a chat as the model reads it."""
        text = request.content if request.prompt is None else request.prompt
        if (text is None) == (request.messages is None):
            raise ApiError(400, "Give one of prompt, content and messages.", "prompt")
        if text is None:
            messages = request.messages or []
            encode = partial(self._encode_chat, messages, request.tools, **request.ending)
            ids = await asyncio.to_thread(encode)
        else:
            ids = await asyncio.to_thread(self.tokenizer.encode, text, request.parse_special)
        tokens: list[Any] = ids
        if request.with_pieces:
            tokens = [{"id": i, "piece": _piece(self.tokenizer.token_bytes(i))} for i in ids]
        return {"tokens": tokens, "count": len(ids), "max_model_len": self.max_context}

    async def detokenize(self, request: DetokenizeRequest) -> Json:
        """The text of token ids, under llama.cpp's name and vLLM's."""
        text = self.tokenizer.decode(request.tokens, skip_control=False)
        return {"content": text, "prompt": text}

    async def template(self, request: TemplateRequest) -> Json:
        """A chat as the text that the model reads."""
        tools: Any = without_strict(request.tools)
        render = partial(self.tokenizer.apply_chat_template, plain(request.messages), tools)
        return {"prompt": await asyncio.to_thread(partial(render, **request.ending))}

    async def update_weights(self, request: WeightsRequest) -> Json:
        """Load the weights of a subfolder of --weights into the running model."""
        version, engine = request.version, self.bridge.engine
        folder = self.config.weights and self.config.weights / str(version)
        if folder is None or not folder.is_dir():
            raise ApiError(404, f"There are no weights of version {version}.", "version")
        new, model = await asyncio.to_thread(load_model, folder), engine.model
        if new.config != model.config:
            message = f"The weights of version {version} have another configuration."
            raise ApiError(409, message, "version")
        await self.bridge.call(partial(engine.replace_weights, new, version))
        return {"version": engine.version}


def _listed(kind: str, values: list[Any], model: str, prompts: list[list[int]]) -> Json:
    count = sum(map(len, prompts))
    data = [{"object": kind, "index": index, kind: value} for index, value in enumerate(values)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are not whole characters."""
    text = raw.decode(errors="replace")
    return text if text.encode() == raw else list(raw)
