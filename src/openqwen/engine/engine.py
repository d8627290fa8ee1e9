"""Weights + prompts → tokens. Rollouts, scoring, synthesis, evaluation, chat and the server all use
this one engine.

Requests are queued (`submit`) and advanced together, one forward call a `step`, until they end or
are cancelled: continuous batching over a paged, shared cache. `generate` and `stream` are loops
around that.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from time import monotonic

import torch
from torch import Tensor

from openqwen.engine.adapters import Adapters
from openqwen.engine.admission import Admission, stop_ids
from openqwen.engine.config import EngineConfig
from openqwen.engine.constrain import Structures
from openqwen.engine.drafter import Drafter, DraftModel
from openqwen.engine.generator import FinishReason, Generator, Output, Prompt, Sampling
from openqwen.engine.pages import PagePool
from openqwen.engine.request import Event, Request, Stats
from openqwen.engine.runner import Read, Runner
from openqwen.engine.sampler import Choice, Row, choose
from openqwen.engine.schedule import Schedule
from openqwen.engine.score import embeddings
from openqwen.engine.seeds import seed_of
from openqwen.engine.text import TextStream
from openqwen.model import Qwen2, kernels
from openqwen.model.quantize import QuantizedQwen2
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.tokenizer import Tokenizer

_BUDGET_CPU, _BUDGET = 256, 4096
_GREEDY, _DEFAULTS = Sampling(), EngineConfig()


class Engine(Generator):
    """Generates with a model that others (a trainer) may change between calls: it holds the module
    itself.

    draft: a smaller model of the same vocabulary, to guess for `speculate` in place of prompt
    lookup. adapters: what requests may name. All methods are called from one thread, or one after
    the other.
    """

    def __init__(
        self,
        model: Qwen2,
        tokenizer: Tokenizer,
        config: EngineConfig = _DEFAULTS,
        draft: Qwen2 | None = None,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.adapters = Adapters(model)
        self._stops = stop_ids(model.config, tokenizer)
        self._budget = config.token_budget or (
            _BUDGET_CPU if model.device.type == "cpu" else _BUDGET
        )
        self._admission = Admission(model, tokenizer, config)
        self._schedule = Schedule(PagePool(self._admission.pages, config.page_size), config)
        cache = (self._admission.pages, config.page_size, config.cache)
        self._runner = Runner(model, self.adapters, tokenizer.vocab_size, *cache)
        self._structures = Structures(tokenizer, self._stops)
        self._drafter = Drafter(config.speculate)
        if draft is not None:
            room = config.draft_below * self._admission.longest
            self._drafter.draft = DraftModel(draft, tokenizer.vocab_size, config.page_size, room)
        self._threads = kernels.alone if isinstance(model, QuantizedQwen2) else nullcontext
        self._pending: list[Event] = []
        self._paused = False
        self._numbers = count(1)
        self._weights = self._fingerprint()

    @property
    def longest(self) -> int:
        """Tokens of one sequence, prompt and answer, at most."""
        return self._admission.longest

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling = _GREEDY,
        seed: int | None = None,
        adapter: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt: text, token ids, or messages for the chat template. OpenQwenError says
        what is wrong with it.

        seed: in place of `sampling.seed`. adapter: a name added to `adapters`. priority: the larger
        goes first.
        """
        sampling = sampling if seed is None else replace(sampling, seed=seed)
        return self.submit_many(prompt, sampling, 1, adapter, priority)[0]

    def submit_many(
        self,
        prompt: Prompt,
        sampling: Sampling,
        n: int,
        adapter: str | None = None,
        priority: int = 0,
    ) -> list[Request]:
        """Queue n samples of one prompt, which is read once; seeds follow from `sampling.seed` and
        each one's index.
        """
        ids = self._admission.ids(prompt, self.longest - 1)
        limit, stages = self._admission.stages(sampling, len(ids))
        chosen = None if adapter is None else self.adapters.get(adapter)
        numbers = [next(self._numbers) for _ in range(n)]
        group = None if self.config.prefix_cache or not numbers else numbers[0]
        requests = [
            Request(
                id=number,
                prompt_ids=list(ids),
                sampling=sampling,
                seed=seed_of(sampling.seed, index),
                limit=limit,
                stream=TextStream(self.tokenizer, sampling.stop),
                matcher=self._structures.matcher(sampling.structure)
                if sampling.structure
                else None,
                adapter=chosen,
                stages=stages,
                priority=priority,
                profile=(chosen and chosen.number, group),
            )
            for index, number in enumerate(numbers)
        ]
        if (
            not self._schedule.running
            and not self._schedule.waiting
            and self._fingerprint() != self._weights
        ):
            self.refresh()  # somebody has trained the model
        for request in requests:
            self._schedule.add(request)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; its pages are free at once.

        One that has ended stays as it is.
        """
        if request.finish_reason is None:
            self._schedule.end(request, "cancelled")
            self._pending.append(Event(request, [], "", [], [], "cancelled", self.version))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance by one forward call at most; returns what was made, [] when there is nothing to
        do.
        """
        events, self._pending = self._pending, []
        if self._paused:
            return events
        for request, done, pages in self._schedule.outgrown():
            self._runner.turn(request, done, pages)
        works = self._schedule.next(self._budget)
        if not works:
            return events
        reads, rows = [], list[Row]()
        guesses = self._drafter.guess(works)
        for work, guess in zip(works, guesses):
            request = work.request
            self._schedule.hold(request, request.total + len(guess))
            new = request.tokens(request.computed, request.computed + work.count) + guess
            scored = len(guess) + 1 if work.count == request.left else 0
            reads.append(Read(request, new, scored))
            rows += self._rows(request, guess) if scored else ()
        with self._threads():
            logits_RV = self._runner.run(reads)
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
        return self._schedule.counts.version

    def stats(self) -> Stats:
        """Counts for metrics."""
        return self._schedule.stats()

    def pause(self) -> None:
        """Hold everything where it is: steps do nothing until `resume`.

        Requests may still be queued and cancelled.
        """
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def refresh(self, version: int | None = None) -> None:
        """The weights have changed (version: their new number): nothing that was cached of older
        ones is used again.

        Requests that run keep what they have written and read it anew, with the new weights, before
        they go on.
        """
        self._schedule.restart(self.version + 1 if version is None else version)
        self._runner.refresh()
        self._weights = self._fingerprint()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = _GREEDY,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Answer every prompt, in order.

        seeds: one for each prompt. None: they follow from `sampling.seed` and each prompt's index.
        """
        requests: list[Request] = []
        try:
            for number, prompt in enumerate(prompts):
                seed = seed_of(sampling.seed, number) if seeds is None else seeds[number]
                requests.append(self.submit(prompt, sampling, seed))
            for event in self._events_of(requests):
                if event.finish_reason and progress:
                    progress.advance(1)
        finally:
            self._drop(requests)
        return list[Output](requests)

    def stream(self, prompt: Prompt, sampling: Sampling = _GREEDY) -> Iterator[int]:
        """Yield an answer's token ids as they are made, the stop token left out."""
        request = self.submit(prompt, sampling)
        try:
            for event in self._events_of([request]):
                yield from event.token_ids
        finally:
            self._drop([request])

    def score(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it: len(ids) − 1
        numbers.
        """
        return self.generate([ids], Sampling(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs

    def embed(self, prompts: Sequence[Prompt]) -> Tensor:
        """The hidden state of each prompt's last token, of length 1: [B, D], float32."""
        return embeddings(
            self.model, [self._admission.ids(prompt, self._admission.context) for prompt in prompts]
        )

    def _rows(self, request: Request, guess: list[int]) -> Iterator[Row]:
        """The places whose tokens are to be chosen: the next, and the one after each guessed
        token.
        """
        masks = (
            request.matcher.masks(guess, self.model.config.vocab_size) if request.matcher else None
        )
        place = len(request.token_ids)
        for number in range(len(guess) + 1):
            answer = request.token_ids + guess[:number] if request.sampling.penalised else ()
            allowed = masks[number].to(self.model.device) if masks else None
            yield Row(
                request.sampling, request.seed, place + number, request.prompt_ids, answer, allowed
            )

    def _advance(self, request: Request, guess: list[int], choice: Choice, at: int) -> Event:
        """Write the tokens chosen at row `at` and after it: as many as the guess was right, and one
        more.
        """
        request.first_token = request.first_token or monotonic()
        start, right, text, counts = len(request.token_ids), 0, "", self._schedule.counts
        while True:
            piece, reason = self._write(request, choice, at + right)
            text += piece
            if reason or right == len(guess) or choice.tokens[at + right] != guess[right]:
                break
            right += 1
        if reason:
            text += request.stream.finish()
        request.text += text
        request.computed = request.total - 1
        if guess and request.pace:
            request.pace.learn(len(guess), right)
        counts.drafted += len(guess)
        counts.accepted += right
        counts.tokens_out += len(request.token_ids) - start
        self._schedule.seal(request)
        if reason:
            self._schedule.end(request, reason)
        new = (request.token_ids[start:], text, request.logprobs[start:], request.top[start:])
        return Event(request, *new, reason, self.version)

    def _write(self, request: Request, choice: Choice, row: int) -> tuple[str, FinishReason | None]:
        """Add one token; returns the text that it makes final, and why the answer ends, if it
        does.
        """
        token, sampling = choice.tokens[row], request.sampling
        if row in choice.broken:
            return "", "error"
        if token in sampling.stop_ids or (token in self._stops and not sampling.ignore_eos):
            request.stop_id = token
            return "", "stop"
        request.token_ids.append(token)
        request.logprobs.append(choice.logprobs[row])
        request.drawn_logprobs.append(choice.drawn_logprobs[row])
        request.top.append(choice.top[row])
        request.versions.append(self.version)
        text = request.stream.push(token)
        if request.stream.stopped:
            return text, "stop"
        if request.matcher:
            request.matcher.accept(token)
            if request.matcher.fault:
                return text, "error"
            if request.matcher.complete:
                return text, "stop"
        return text, "length" if request.total >= request.limit else None

    def _events_of(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Step until these requests have ended; what happens to others meanwhile is told at the
        next step.
        """
        ours, others = set(requests), list[Event]()
        try:
            while any(request.finish_reason is None for request in requests):
                if self._paused:
                    raise OpenQwenError("The engine is paused.", do="call resume() first")
                for event in self.step():
                    if event.request in ours:
                        yield event
                    else:
                        others.append(event)
        finally:
            self._pending += others

    def _drop(self, requests: Sequence[Request]) -> None:
        """Cancel what has not ended, and tell nobody: its caller is gone."""
        for request in requests:
            self.cancel(request)
        self._pending = [event for event in self._pending if event.request not in requests]

    def _fingerprint(self) -> int:
        """Changes when a weight is changed in place, as optimizers do."""
        weights = (*self.model.parameters(), *self.model.buffers())
        return hash(tuple((w.data_ptr(), w._version) for w in weights if not w.is_inference()))
