"""Weights + prompts → tokens. Rollouts, scoring, synthesis, evaluation and chat all use this one engine.

Continuous batching over a paged cache: requests are admitted as pages become free, new prompts are read in one call
(prefill), then every running request advances by one token a call (decode).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from openqwen.engine.pages import Pages
from openqwen.engine.sampler import Sampling, choose, uniforms
from openqwen.model import Paged, Qwen2
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict[str, Any]]  # text, token ids, or messages

_CACHE_BYTES = 2**30
_RUNNING = 128  # requests decoded together, at most
_PREFILL = 8_192  # prompt tokens read in one call, at most (one longer prompt alone may exceed it)


@dataclass(frozen=True)
class Output:
    """One answer. `token_ids` leaves out the stop token; `logprobs` has one entry for each token id."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    prompt_ids: list[int]


@dataclass
class _Request:
    number: int
    prompt_ids: list[int]
    sampling: Sampling
    draws: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Engine:
    """Generates with a model that others (a trainer) may be changing between calls: it holds the module itself."""

    def __init__(self, model: Qwen2, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._stops = {tokenizer.eos_id, tokenizer.endoftext_id}

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Answer every prompt, in order. `seeds`: one for each prompt, in place of `sampling.seed`."""
        requests = [
            self._request(n, prompt, sampling, sampling.seed if seeds is None else seeds[n])
            for n, prompt in enumerate(prompts)
        ]
        for request, _ in self._run(requests):
            if request.finish_reason and progress:
                progress.advance(1)
        return [self._output(r) for r in requests]

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Iterator[int]:  # noqa: B008 (frozen)
        """Yield an answer's token ids as they are made, the stop token left out."""
        request = self._request(0, prompt, sampling, sampling.seed)
        for _, token in self._run([request]):
            if token is not None:
                yield token

    def _request(self, number: int, prompt: Prompt, sampling: Sampling, seed: int) -> _Request:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], dict):
            ids, _ = self.tokenizer.encode_chat(prompt, add_generation_prompt=True)
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        limit = self.model.config.max_position_embeddings
        if not ids or len(ids) >= limit:
            raise OpenQwenError(
                f"A prompt has {len(ids)} tokens; this model takes 1 to {limit - 1}.",
                where=f"prompt {number}",
                do="shorten it",
            )
        return _Request(number, ids, sampling, uniforms(seed, sampling.max_tokens))

    def _output(self, request: _Request) -> Output:
        text = self.tokenizer.decode(request.ids)
        return Output(text, request.ids, request.logprobs, request.finish_reason or "length", request.prompt_ids)

    def _room(self, request: _Request) -> int:
        """Tokens the request may come to hold."""
        longest = len(request.prompt_ids) + request.sampling.max_tokens
        return min(longest, self.model.config.max_position_embeddings)

    @torch.inference_mode()
    def _run(self, requests: list[_Request]) -> Iterator[tuple[_Request, int | None]]:
        """Yield (request, token) for each token, and (request, None) where a stop token ended one."""
        pages = self._pages(requests)
        waiting, running = deque(requests), list[_Request]()
        while waiting or running:
            fresh = self._admit(waiting, running, pages)
            batch = fresh or running
            tokens, logprobs = self._forward(batch, pages)
            if fresh:
                running += fresh
            for request, token, logprob in zip(batch, tokens, logprobs):
                stopped = token in self._stops or token in request.sampling.stop_ids
                if not stopped:
                    request.ids.append(token)
                    request.logprobs.append(logprob)
                if stopped:
                    request.finish_reason = "stop"
                elif len(request.prompt_ids) + len(request.ids) >= self._room(request):
                    request.finish_reason = "length"
                if request.finish_reason:
                    pages.give_back(request.pages)
                yield request, None if stopped else token
            running = [r for r in running if not r.finish_reason]

    def _pages(self, requests: list[_Request]) -> Pages:
        config, dtype = self.model.config, self.model.dtype
        needs = sorted((Pages.needed(self._room(r)) for r in requests), reverse=True)
        affordable = _CACHE_BYTES // Pages.bytes_per_page(config, dtype)
        count = max(min(sum(needs[:_RUNNING]), affordable), needs[0] if needs else 1)
        return Pages(config, count, self.model.device, dtype)

    def _admit(self, waiting: deque[_Request], running: list[_Request], pages: Pages) -> list[_Request]:
        """Take waiting requests, first come first served, whose pages to the very end are free."""
        fresh: list[_Request] = []
        tokens = 0
        while waiting and len(running) + len(fresh) < _RUNNING:
            need = Pages.needed(self._room(waiting[0]))
            tokens += len(waiting[0].prompt_ids)
            if need > len(pages.free) or (fresh and tokens > _PREFILL):
                break
            request = waiting.popleft()
            request.pages = pages.take(need)
            fresh.append(request)
        return fresh

    def _forward(self, batch: list[_Request], pages: Pages) -> tuple[list[int], list[float]]:
        """Read each request's newest tokens (a fresh one's whole prompt) and choose its next."""
        device = self.model.device
        new = [r.ids[-1:] or r.prompt_ids for r in batch]
        totals = [len(r.prompt_ids) + len(r.ids) for r in batch]
        width = max(len(r.pages) for r in batch)
        tables = torch.tensor([r.pages + [0] * (width - len(r.pages)) for r in batch], device=device)
        counts = [len(n) for n in new]
        tokens = torch.tensor([t for n in new for t in n], device=device)
        positions = torch.tensor([p for n, t in zip(counts, totals) for p in range(t - n, t)], device=device)
        hidden = self.model(tokens, positions, Paged(pages.cache, tables, totals, counts))
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        logits = self.model.logits(hidden[last])[:, : self.tokenizer.vocab_size]
        draws = np.array([r.draws[len(r.ids)] for r in batch])
        chosen, logprobs = choose(logits, [r.sampling for r in batch], draws)
        return chosen.tolist(), logprobs.tolist()
