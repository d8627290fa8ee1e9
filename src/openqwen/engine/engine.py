"""Weights + prompts → tokens. Rollouts, scoring, synthesis, evaluation, chat and the server all use this one engine.

Requests are queued (`submit`) and advanced together, one forward call a `step`, until they end or are cancelled:
continuous batching over a paged, shared cache. `generate` and `stream` are loops around that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch
from torch import Tensor

from openqwen.engine.adapters import Adapters
from openqwen.engine.answer import grow
from openqwen.engine.config import EngineConfig
from openqwen.engine.constrain import Structures
from openqwen.engine.drafter import Lookup
from openqwen.engine.pages import PagePool
from openqwen.engine.plan import Work
from openqwen.engine.request import Event, Output, Prompt, Request, Sampling
from openqwen.engine.runner import Read, Runner
from openqwen.engine.sampler import Choice, Row, choose, seed_of_sample
from openqwen.engine.schedule import Schedule
from openqwen.engine.score import embeddings, log_probs_of
from openqwen.engine.text import TextStream
from openqwen.model import Cache, LongContext, Qwen2
from openqwen.model.long_context import profile, stated_context
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.tokenizer import Tokenizer

_CACHE_BYTES = 2**30
_BUDGET_CPU, _BUDGET = 512, 4096


@dataclass(frozen=True)
class Stats:
    """Where the engine stands, and what it has done since its start.

    tokens_in: of the prompts started; cache_hits: those of them that were found in the cache. drafted, accepted:
    guessed tokens, and those that were right.
    """

    waiting: int
    running: int
    pages_free: int
    pages_cached: int
    pages_used: int
    tokens_in: int
    cache_hits: int
    tokens_out: int
    preemptions: int
    drafted: int
    accepted: int
    version: int


class Engine:
    """Generates with a model that others (a trainer) may change between calls: it holds the module itself.

    All methods are called from one thread, or one after the other.
    """

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, config: EngineConfig = EngineConfig()):  # noqa: B008
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self._stops = {tokenizer.eos_id, tokenizer.endoftext_id}
        self._budget = config.token_budget or (_BUDGET_CPU if model.device.type == "cpu" else _BUDGET)
        pool = self._pool()
        self._longest = min(self._context, pool.count * pool.page_size)
        self._schedule = Schedule(pool, config)
        self.adapters = Adapters(model)
        self._runner = Runner(model, self.adapters, Cache.of(model, pool.count, pool.page_size, config.cache))
        self._structures = Structures(tokenizer, self._stops)
        self._pending: list[Event] = []
        self._paused = False
        self._numbers = count(1)
        self._tokens_out = self._drafted = self._accepted = 0
        self._weights = self._fingerprint()

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int | None = None,
        adapter: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt: text, token ids, or messages for the chat template. OpenQwenError says what is wrong with it.

        seed: in place of `sampling.seed`. adapter: a name added to `adapters`. priority: the larger goes first.
        """
        number = next(self._numbers)
        return self._submit(number, self._ids(prompt), sampling, seed, adapter, priority, number)

    def submit_many(
        self, prompt: Prompt, sampling: Sampling, n: int, adapter: str | None = None, priority: int = 0
    ) -> list[Request]:
        """Queue n samples of one prompt, which is read once; seeds follow from `sampling.seed` and each one's index."""
        ids, numbers = self._ids(prompt), [next(self._numbers) for _ in range(n)]
        return [
            self._submit(
                number, list(ids), sampling, seed_of_sample(sampling.seed, index), adapter, priority, numbers[0]
            )
            for index, number in enumerate(numbers)
        ]

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; its pages are free at once. One that has ended stays as it is."""
        if request.finish_reason is None:
            self._schedule.end(request, "cancelled")
            self._pending.append(Event(request, [], "", [], [], "cancelled", self.version))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance by one forward call at most; returns what was made, [] when there is nothing to do."""
        events, self._pending = self._pending, []
        works = [] if self._paused else self._schedule.next(self._budget)
        if not works:
            return events
        guesses = [self._guess(work) for work in works]
        reads = [self._read(work, guess) for work, guess in zip(works, guesses)]
        logits_RV = self._runner.run(reads)
        rows = [row for read, guess in zip(reads, guesses) if read.scored for row in self._rows(read.request, guess)]
        choice = choose(logits_RV, rows, self.tokenizer.vocab_size) if rows else None
        at = 0
        for read, guess in zip(reads, guesses):
            if choice and read.scored:
                events.append(self._advance(read.request, guess, choice, at))
                at += read.scored
            else:
                read.request.computed += len(read.tokens)
                self._schedule.seal(read.request)
        return events

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        at_work = bool(self._schedule.waiting or self._schedule.running)
        return bool(self._pending) or (at_work and not self._paused)

    @property
    def version(self) -> int:
        """The number of the weights."""
        return self._schedule.version

    def stats(self) -> Stats:
        """Counts for metrics."""
        schedule, pool = self._schedule, self._schedule.pool
        return Stats(
            waiting=len(schedule.waiting),
            running=len(schedule.running),
            pages_free=pool.available - pool.cached,
            pages_cached=pool.cached,
            pages_used=pool.count - pool.available,
            tokens_in=schedule.tokens_in,
            cache_hits=schedule.cache_hits,
            tokens_out=self._tokens_out,
            preemptions=schedule.preemptions,
            drafted=self._drafted,
            accepted=self._accepted,
            version=self.version,
        )

    def pause(self) -> None:
        """Hold everything where it is: steps do nothing until `resume`. Requests may still be queued and cancelled."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def refresh(self, version: int | None = None) -> None:
        """The weights have changed (version: their new number): nothing that was cached of older ones is used again.

        Requests that run keep what they have written and read it anew, with the new weights, before they go on.
        """
        self._schedule.restart(self.version + 1 if version is None else version)
        self._weights = self._fingerprint()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Answer every prompt, in order. `seeds`: one for each prompt, in place of `sampling.seed`."""
        requests: list[Request] = []
        try:
            for number, prompt in enumerate(prompts):
                requests.append(self.submit(prompt, sampling, None if seeds is None else seeds[number]))
            for event in self._events_of(requests):
                if event.finish_reason and progress:
                    progress.advance(1)
        finally:
            self._drop(requests)
        return [Output.of(request) for request in requests]

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Iterator[int]:  # noqa: B008 (frozen)
        """Yield an answer's token ids as they are made, the stop token left out."""
        request = self.submit(prompt, sampling)
        try:
            for event in self._events_of([request]):
                yield from event.token_ids
        finally:
            self._drop([request])

    def score(self, ids: Sequence[int], sampling: Sampling = Sampling()) -> list[float]:  # noqa: B008 (frozen)
        """The log-probability of each token but the first, given those before it: len(ids) − 1 numbers."""
        self._check(ids, self._context)
        return log_probs_of(self.model, ids, self._long_context(sampling, len(ids)))

    def embed(self, prompts: Sequence[Prompt]) -> Tensor:
        """The hidden state of each prompt's last token, of length 1: [B, D], float32."""
        texts = [self._ids(prompt) for prompt in prompts]
        for ids in texts:
            self._check(ids, self._context)
        return embeddings(self.model, texts)

    def _submit(
        self,
        number: int,
        ids: list[int],
        sampling: Sampling,
        seed: int | None,
        adapter: str | None,
        priority: int,
        group: int,
    ) -> Request:
        self._check(ids, self._longest - 1)
        chosen = None if adapter is None else self.adapters.get(adapter)
        matcher = self._structures.matcher(sampling.structure) if sampling.structure else None
        if not self._schedule.running and not self._schedule.waiting and self._fingerprint() != self._weights:
            self.refresh()  # somebody has trained the model
        limit = min(len(ids) + sampling.max_tokens, self._longest)
        context = self._long_context(sampling, limit)
        request = Request(
            id=number,
            prompt_ids=ids,
            sampling=sampling,
            seed=sampling.seed if seed is None else seed,
            limit=limit,
            stream=TextStream(self.tokenizer, sampling.stop),
            matcher=matcher,
            adapter=chosen,
            priority=priority,
            long_context=context,
            profile=(context, chosen and chosen.number, None if self.config.prefix_cache else group),
        )
        self._schedule.add(request)
        return request

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and not isinstance(prompt[0], int):
            return self.tokenizer.encode_chat(cast(list, prompt), add_generation_prompt=True)[0]
        return list(cast(Sequence[int], prompt))

    def _check(self, ids: Sequence[int], most: int) -> None:
        if not 1 <= len(ids) <= most:
            raise OpenQwenError(
                f"A prompt has {len(ids)} tokens; 1 to {most} are possible here.",
                where="prompt",
                do="shorten it, or raise the engine's max_context and cache_bytes",
            )
        size = self.model.config.vocab_size
        if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < size]:
            raise OpenQwenError(f"A prompt holds the id {wrong[0]}.", where="prompt", do=f"use ids of 0 to {size - 1}")

    def _pool(self) -> PagePool:
        """As many pages as the memory holds, but no more than all that run could ever fill."""
        size = self.config.page_size
        one = -(-self._context // size)
        memory = self.config.cache_bytes or _CACHE_BYTES
        affordable = memory // Cache.bytes_per_page(
            self.model.config, size, self.config.cache, self.model.head_VD.dtype
        )
        if self.config.cache_bytes is None:
            affordable = max(affordable, one)
        return PagePool(max(1, min(affordable, self.config.max_running * one)), size)

    @property
    def _context(self) -> int:
        return self.config.max_context or stated_context(self.model.config)

    def _long_context(self, sampling: Sampling, tokens: int) -> LongContext | None:
        """How a sequence of at most this many tokens is read. Dual Chunk Attention's scale must not change on the way:
        what is cached would not be what is read anew."""
        if sampling.long_context or (self.config.max_context is None and self.model.config.dual_chunk is None):
            return sampling.long_context
        return profile(self.model.config, tokens, self._context)

    def _guess(self, work: Work) -> list[int]:
        """Drafted tokens that fit the request's structure, their pages held."""
        request = work.request
        if not work.drafts:
            return []
        request.lookup = request.lookup or Lookup(self.config.speculate)
        guess = request.lookup.guess(request.tokens(0, request.total), work.drafts)
        if request.matcher:
            guess = request.matcher.forced()[: work.drafts] or request.matcher.fitting(guess)
        self._schedule.hold(request, request.total + len(guess))
        return guess

    def _read(self, work: Work, guess: list[int]) -> Read:
        request = work.request
        new = request.tokens(request.computed, request.computed + work.count) + guess
        return Read(request, new, len(guess) + 1 if work.count == request.left else 0)

    def _rows(self, request: Request, guess: list[int]) -> Iterator[Row]:
        """The places whose tokens are to be chosen: the next, and the one after each drafted token."""
        masks = request.matcher.masks(guess, self.model.config.vocab_size) if request.matcher else None
        place = len(request.output_ids)
        for number in range(len(guess) + 1):
            answer = request.output_ids + guess[:number] if request.sampling.penalised else ()
            allowed = masks[number].to(self.model.device) if masks else None
            yield Row(request.sampling, request.seed, place + number, request.prompt_ids, answer, allowed)

    def _advance(self, request: Request, guess: list[int], choice: Choice, at: int) -> Event:
        start = len(request.output_ids)
        growth = grow(request, guess, choice, at, self._stops, self.version)
        if guess and request.lookup:
            request.lookup.learn(len(guess), growth.right)
            self._drafted += len(guess)
            self._accepted += growth.right
        self._schedule.seal(request)
        if growth.reason:
            self._schedule.end(request, growth.reason)
        new = slice(start, None)
        self._tokens_out += len(request.output_ids) - start
        return Event(
            request,
            request.output_ids[new],
            growth.text,
            request.logprobs[new],
            request.top[new],
            growth.reason,
            self.version,
        )

    def _events_of(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Step until these requests have ended; what happens to others meanwhile is told at the next step."""
        ours, others = set(map(id, requests)), list[Event]()
        try:
            while any(request.finish_reason is None for request in requests):
                if self._paused:
                    raise OpenQwenError("The engine is paused.", do="call resume() first")
                for event in self.step():
                    if id(event.request) in ours:
                        yield event
                    else:
                        others.append(event)
        finally:
            self._pending += others

    def _drop(self, requests: Sequence[Request]) -> None:
        """Cancel what has not ended, and tell nobody: its caller is gone."""
        ours = set(map(id, requests))
        for request in requests:
            self.cancel(request)
        self._pending = [event for event in self._pending if id(event.request) not in ours]

    def _fingerprint(self) -> int:
        """Changes when a weight is changed in place, as optimizers do."""
        return hash(tuple((p.data_ptr(), p._version) for p in self.model.parameters() if not p.is_inference()))
