"""Weights + prompts → tokens: one engine for rollouts, scoring, synthesis, evaluation and serving.

Requests are queued (`submit`) and advanced together, by one forward call in each `step`, until they
end or are cancelled: continuous batching over a paged, shared cache. `generate` and `stream` call
these two.
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
from openqwen.engine.generator import (
    Continuation,
    FinishReason,
    Generator,
    Output,
    Prompt,
    Sampling,
)
from openqwen.engine.lanes import EngineLane
from openqwen.engine.pages import PagePool
from openqwen.engine.request import Event, Request, ScheduledRequest, Stats
from openqwen.engine.runner import Runner
from openqwen.engine.sampler import SampledTokens, SamplingRow, sample
from openqwen.engine.scheduler import Scheduler
from openqwen.engine.score import embeddings
from openqwen.engine.seeds import seed_of
from openqwen.engine.text import TextStream
from openqwen.model import Qwen2, kernels
from openqwen.model.quantize import QuantizedQwen2
from openqwen.model.quantize import refresh as refresh_quantized
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.tokenizer import Tokenizer

_BUDGET_CPU, _BUDGET = 256, 4096
_GREEDY, _DEFAULTS = Sampling(), EngineConfig()


class Engine(Generator):
    """Generates with a model. It holds the module itself, which a trainer may change between calls.

    All methods are called from one thread, or one after the other.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        config: limits of memory and work.
        draft: a smaller model with the same vocabulary, which drafts in place of prompt lookup if
            `config.speculate` is above 0.
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
        default_budget = _BUDGET_CPU if model.device.type == "cpu" else _BUDGET
        self._token_budget = config.token_budget or default_budget
        self._admission = Admission(model, tokenizer, config)
        pages, page_size, vocabulary = self._admission.pages, config.page_size, tokenizer.vocab_size
        self._scheduler = Scheduler(PagePool(pages, page_size), config)
        self._runner = Runner(model, self.adapters, vocabulary, pages, page_size, config.cache)
        self._structures = Structures(tokenizer, self._stops)
        drafter = None
        if draft is not None:
            tokens = config.draft_below * self._admission.longest
            drafter = DraftModel(draft, vocabulary, page_size, tokens)
        self._drafter = Drafter(config.speculate, drafter)
        self._threads = kernels.alone if isinstance(model, QuantizedQwen2) else nullcontext
        self._pending: list[Event] = []
        self._paused = False
        self._numbers = count(1)
        self._weights = self._fingerprint()

    @property
    def longest(self) -> int:
        """Most tokens of one sequence, prompt and answer."""
        return self._admission.longest

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling = _GREEDY,
        seed: int | None = None,
        adapter: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt: text, token ids, or messages for the chat template.

        Args:
            prompt: the prompt.
            sampling: how to sample the answer.
            seed: replaces `sampling.seed`.
            adapter: the name of one of `adapters`.
            priority: requests of a larger priority go first.

        Raises:
            OpenQwenError: the prompt, the adapter or the sampling cannot be used.
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
        """Queue n samples of one prompt, which is computed once.

        Each sample's seed is derived from `sampling.seed` and its index; see `submit`.
        """
        ids = self._admission.token_ids(prompt, self.longest - 1)
        max_length, scalings = self._admission.scalings_for(sampling, len(ids))
        chosen = None if adapter is None else self.adapters.get(adapter)
        numbers = [next(self._numbers) for _ in range(n)]
        # Without a prefix cache only the samples of one call share pages.
        group = None if self.config.prefix_cache or not numbers else numbers[0]
        structure = sampling.structure
        requests = []
        for index, number in enumerate(numbers):
            request = Request(
                id=number,
                prompt_ids=list(ids),
                sampling=sampling,
                seed=seed_of(sampling.seed, index),
                max_length=max_length,
                stream=TextStream(self.tokenizer, sampling.stop),
                matcher=self._structures.matcher(structure) if structure else None,
                adapter=chosen,
                scalings=scalings,
                priority=priority,
                cache_key=(chosen and chosen.number, group),
            )
            requests.append(request)
        idle = not self._scheduler.running and not self._scheduler.waiting
        if idle and self._fingerprint() != self._weights:
            self.refresh()  # the model has been trained since
        for request in requests:
            self._scheduler.add(request)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request, waiting or running, and release its pages.

        A request that has ended stays as it is.
        """
        if request.finish_reason is None:
            self._scheduler.end(request, "cancelled")
            self._pending.append(Event(request, [], "", [], [], "cancelled", self.version))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance requests by at most one forward call; returns what was produced."""
        events, self._pending = self._pending, []
        if self._paused:
            return events
        scheduler = self._scheduler
        scheduler.advance_scalings(self._runner.rotate)
        scheduled = scheduler.schedule(self._token_budget)
        if not scheduled:
            return events
        self._drafter.draft(scheduled)
        rows: list[SamplingRow] = []
        for item in scheduled:
            scheduler.allocate(item.request, item.request.total + len(item.drafts))
            if item.scored:
                rows += self._sampling_rows(item.request, item.drafts)
        with self._threads():
            logits_RV = self._runner.run(scheduled)
            sampled = sample(logits_RV, rows, self.tokenizer.vocab_size) if rows else None
        row = 0
        for item in scheduled:
            if sampled and item.scored:
                events.append(self._accept(item, sampled, row))
                row += len(item.drafts) + 1
            else:
                item.request.computed += item.count
                scheduler.register_prefix(item.request)
            assert item.request.computed < item.request.total
        return events

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to return."""
        requests = bool(self._scheduler.waiting or self._scheduler.running)
        return bool(self._pending) or (requests and not self._paused)

    @property
    def version(self) -> int:
        """The version of the weights, a number."""
        return self._scheduler.counts.version

    def stats(self) -> Stats:
        """Counts for metrics."""
        return self._scheduler.stats()

    def check_integrity(self) -> None:
        """Assert what holds between two steps: pages add up, registered ≤ computed < total."""
        self._scheduler.check_integrity()
        if self._drafter.model:
            self._drafter.model.check_integrity()

    def pause(self) -> None:
        """Let `step` do nothing until `resume`. Requests may still be queued and cancelled."""
        self._paused = True

    def resume(self) -> None:
        """Continue after `pause`."""
        self._paused = False

    def refresh(self, version: int | None = None) -> None:
        """Use changed weights: drop all keys and values that the older ones computed.

        Running requests keep their answers, whose tokens are computed again with the new weights.

        Args:
            version: the number of the new weights; None adds 1.
        """
        self._scheduler.restart(self.version + 1 if version is None else version)
        self._runner.refresh()
        self._weights = self._fingerprint()

    def replace_weights(self, new: Qwen2, version: int) -> None:
        """Copy the weights of a network of the same configuration into this one; see `refresh`."""
        if isinstance(self.model, QuantizedQwen2):
            refresh_quantized(self.model, new)
        else:
            self.model.load_state_dict(new.state_dict())
        self.refresh(version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = _GREEDY,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Answer every prompt, in order; see `Generator.generate`."""
        requests: list[Request] = []
        try:
            for number, prompt in enumerate(prompts):
                seed = seed_of(sampling.seed, number) if seeds is None else seeds[number]
                requests.append(self.submit(prompt, sampling, seed))
            for event in self._events_of(requests):
                if event.finish_reason and progress:
                    progress.advance(1)
        finally:
            self._discard(requests)
        return list[Output](requests)

    def lane(self) -> EngineLane:
        """Requests whose answers come one by one."""
        return EngineLane(self)

    def stream(self, prompt: Prompt, sampling: Sampling = _GREEDY) -> Iterator[int]:
        """Yield an answer's token ids as they are produced, without the stop token."""
        request = self.submit(prompt, sampling)
        try:
            for event in self._events_of([request]):
                yield from event.token_ids
        finally:
            self._discard([request])

    def score(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it."""
        return self.generate([ids], Sampling(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs

    def score_continuations(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Progress | None = None,
    ) -> list[Continuation]:
        """Score the tokens of each continuation, given its context.

        Contexts that begin alike are computed once: pairs run in the order of their tokens, so that
        those with a common prefix follow each other and share its pages.

        Args:
            pairs: (context, continuation) as token ids, neither of them empty.
            progress: advanced by 1 with each pair.
        """
        tokens = [[*context, *continuation] for context, continuation in pairs]
        requests: dict[int, Request] = {}
        try:
            for index in sorted(range(len(pairs)), key=tokens.__getitem__):
                first = len(pairs[index][0])
                sampling = Sampling(1, prompt_logprobs=1, prompt_logprobs_from=first)
                requests[index] = self.submit(tokens[index], sampling)
            for event in self._events_of(list(requests.values())):
                if event.finish_reason and progress:
                    progress.advance(1)
        finally:
            self._discard(list(requests.values()))
        results = []
        for index, (_, continuation) in enumerate(pairs):
            request = requests[index]
            likeliest = [top[0][0] for top in request.prompt_top]
            greedy = likeliest == list(continuation)
            results.append(Continuation(request.prompt_logprobs, greedy))
        return results

    def embed(self, prompts: Sequence[Prompt]) -> Tensor:
        """The normalized hidden state of each prompt's last token: [B, D], float32."""
        most, scalings = self._admission.context, self._admission.scalings
        ids = [self._admission.token_ids(prompt, most) for prompt in prompts]
        contexts = [next(s.way for s in scalings if s.until >= len(tokens)) for tokens in ids]
        return embeddings(self.model, ids, contexts)

    def _sampling_rows(self, request: Request, drafts: list[int]) -> Iterator[SamplingRow]:
        """How to sample the next token, and the one after each draft token."""
        masks = None
        if request.matcher:
            masks = request.matcher.masks(drafts, self.model.config.vocab_size)
        for number in range(len(drafts) + 1):
            answer = request.token_ids + drafts[:number] if request.sampling.penalised else ()
            allowed = masks[number].to(self.model.device) if masks else None
            position = len(request.token_ids) + number
            yield SamplingRow(
                request.sampling, request.seed, position, request.prompt_ids, answer, allowed
            )

    def _accept(self, item: ScheduledRequest, sampled: SampledTokens, row: int) -> Event:
        """Append the sampled tokens, from `row` on, up to the first that is not its draft token."""
        request, drafts, counts = item.request, item.drafts, self._scheduler.counts
        request.first_token = request.first_token or monotonic()
        start, text = len(request.token_ids), ""
        for accepted in range(len(drafts) + 1):
            piece, reason = self._append(request, sampled, row + accepted)
            text += piece
            if reason or drafts[accepted : accepted + 1] != [sampled.tokens[row + accepted]]:
                break
        if reason:
            text += request.stream.finish()
        request.text += text
        request.computed = request.total - 1
        if drafts and request.draft_length:
            request.draft_length.update(len(drafts), accepted)
        counts.drafted += len(drafts)
        counts.accepted += accepted
        counts.tokens_out += len(request.token_ids) - start
        self._scheduler.register_prefix(request)
        if reason:
            self._scheduler.end(request, reason)
        new = (request.token_ids[start:], text, request.logprobs[start:], request.top[start:])
        return Event(request, *new, reason, self.version)

    def _append(
        self, request: Request, sampled: SampledTokens, row: int
    ) -> tuple[str, FinishReason | None]:
        """Append one token; returns the text that it completes, and why the answer ends, if so."""
        token, sampling = sampled.tokens[row], request.sampling
        if row in sampled.invalid:
            return "", "error"
        if token in sampling.stop_ids or (token in self._stops and not sampling.ignore_eos):
            request.stop_id = token
            return "", "stop"
        request.token_ids.append(token)
        request.logprobs.append(sampled.logprobs[row])
        request.drawn_logprobs.append(sampled.drawn_logprobs[row])
        request.top.append(sampled.top[row])
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
        return text, "length" if request.total >= request.max_length else None

    def _events_of(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Step until these requests have ended, and yield their events.

        The next `step` returns the events of other requests.
        """
        wanted, others = set(requests), list[Event]()
        try:
            while any(request.finish_reason is None for request in requests):
                if self._paused:
                    raise OpenQwenError("The engine is paused.", do="call resume() first")
                for event in self.step():
                    if event.request in wanted:
                        yield event
                    else:
                        others.append(event)
        finally:
            self._pending += others

    def _discard(self, requests: Sequence[Request]) -> None:
        """Cancel requests that have not ended, without events: their caller is gone."""
        for request in requests:
            self.cancel(request)
        self._pending = [event for event in self._pending if event.request not in requests]

    def _fingerprint(self) -> int:
        """A number that changes when a weight is changed in place, as optimizers do."""
        weights = (*self.model.parameters(), *self.model.buffers())
        return hash(tuple((w.data_ptr(), w._version) for w in weights if not w.is_inference()))
