"""Requests on their way: the queues, the pages that they hold, and what one step does.

Decoding requests go first, one token each; what is left of the token budget reads prompts, a chunk
at a time; what is left then may be drafted. Where no page is free for a decoding request, the
youngest gives its pages back and waits again (preemption by recompute: what it has written stays
written, and its pages can be found until they are reused).
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain as one_after_the_other
from time import monotonic

from openqwen.engine.config import EngineConfig
from openqwen.engine.generator import FinishReason
from openqwen.engine.pages import PagePool, chain
from openqwen.engine.request import Request, Stats


@dataclass
class Work:
    """Read `count` more tokens of a request, and draft up to `drafts` after them."""

    request: Request
    count: int
    drafts: int = 0


class Schedule:
    """Who waits and who runs, in their order, and the pool. A request is in one of the queues until
    it ends; every request fits the pool when alone."""

    def __init__(self, pool: PagePool, config: EngineConfig):
        self.pool, self._config = pool, config
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counts = Stats()

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._digest(request)
        insort(self.waiting, request, key=lambda r: r.order)

    def outgrown(self) -> Iterator[tuple[Request, int, list[int]]]:
        """Take what runs and has come to the end of its way on to the next. Of each request: how
        many of its pages hold turned keys already, since somebody else has turned the same, and the
        pages from which the caller fills those that follow, before it asks for the next request."""
        pool = self.pool
        for request in [r for r in self.running if r.computed >= r.until]:
            self._digest(request)
            held, full = request.pages, pool.needed(request.computed)
            known = pool.match(request.chains[request.stage + 1][:full])
            rest = held[len(known) : full]
            need = sum(not pool.references[page] for page in known) + sum(
                pool.references[page] > 1 for page in rest
            )
            if need > pool.available:
                self._requeue(request)
                continue
            pool.share(known)
            request.pages = known + pool.own(rest) + held[full:]
            request.stage, request.sealed = request.stage + 1, 0
            yield request, len(known), rest
            pool.release([old for old, new in zip(held, request.pages) if old != new])
            self.seal(request)

    def next(self, budget: int) -> list[Work]:
        """The next step: at most `budget` tokens to read, their pages held."""
        works, before = list[Work](), self.counts.preemptions
        for request in list(self.running):  # who was preempted meanwhile has no pages
            if (
                len(works) < budget
                and request.pages
                and request.left == 1
                and self._make_room(request)
            ):
                works.append(Work(request, 1))
        budget -= len(works)
        reading = (request for request in list(self.running) if request.left > 1)
        starting = self._started() if self.counts.preemptions == before else iter(())
        queue = one_after_the_other(reading, starting)
        while budget > 0 and (reader := next(queue, None)):
            if count := min(budget, reader.left, reader.until - reader.computed):
                works.append(Work(reader, count))
                budget -= count
        decoding = [work for work in works if work.request.left == work.count == 1]
        if (
            self._config.speculate
            and len(decoding) <= self._config.draft_below
            and not self.waiting
        ):
            self._draft(decoding, budget)
        return works

    def hold(self, request: Request, tokens: int) -> None:
        """Give a request pages for this many tokens."""
        request.pages += self.pool.take(max(0, self.pool.needed(tokens) - len(request.pages)))

    def stats(self) -> Stats:
        """The counts as they are now."""
        pool = self.pool
        return replace(
            self.counts,
            waiting=len(self.waiting),
            running=len(self.running),
            pages_free=pool.available - pool.cached,
            pages_cached=pool.cached,
            pages_used=pool.count - pool.available,
        )

    def seal(self, request: Request) -> None:
        """Let others find the pages that are full now."""
        full = request.computed // self.pool.page_size
        if full > request.sealed:
            self._digest(request)
            for number in range(request.sealed, full):
                self.pool.seal(request.pages[number], request.chains[request.stage][number])
            request.sealed = full

    def end(self, request: Request, reason: FinishReason) -> None:
        """Take a request out, wherever it is; its pages are free at once."""
        (self.running if request in self.running else self.waiting).remove(request)
        request.finish_reason, request.finished = reason, monotonic()
        self._let_go(request)

    def restart(self, version: int) -> None:
        """All that is cached is void.

        What runs waits again, to be read anew; what it has written stays.
        """
        self.counts.version = version
        self.pool.forget()
        for request in [*self.running, *self.waiting]:
            request.chains.clear()
        for request in list(self.running):
            self._requeue(request)
        for request in self.waiting:
            self._digest(request)

    def _make_room(self, request: Request) -> bool:
        """Hold a page for the next token of a decoding request; False where it was itself the
        youngest to give way.
        """
        while self.pool.needed(request.total) - len(request.pages) > self.pool.available:
            victim = self.running[-1]
            self.counts.preemptions += 1
            self._requeue(victim)
            if victim is request:
                return False
        self.hold(request, request.total)
        return True

    def _started(self) -> Iterator[Request]:
        """Start waiting requests in order while pages for all of their tokens are free, and one for
        each that runs.
        """
        pool, written = (
            self.pool,
            set[bytes](),
        )  # digests of the pages that running requests are about to fill
        if self.waiting:
            written = {d for r in self.running if r.left > 1 for d in r.chains[r.stage][r.sealed :]}
        for request in list(self.waiting):
            if len(self.running) >= self._config.max_running:
                return
            stage, digests, pages = self._known(request)
            if len(pages) < len(digests) and digests[len(pages)] in written:
                # somebody is reading the same prompt: wait a step or two, then share its pages
                continue
            pool.share(pages)
            if pool.needed(request.total) - len(pages) + len(self.running) > pool.available:
                pool.release(pages)
                return
            self.waiting.remove(request)
            insort(self.running, request, key=lambda r: r.order)
            request.stage, request.pages, request.sealed = stage, pages, len(pages)
            request.computed = len(pages) * pool.page_size
            if request.started is None:
                request.started = monotonic()
                request.cached_tokens = request.computed
                self.counts.tokens_in += len(request.prompt_ids)
                self.counts.cache_hits += request.cached_tokens
            written.update(digests[len(pages) :])
            self.hold(request, request.total)
            yield request

    def _known(self, request: Request) -> tuple[int, list[bytes], list[int]]:
        """The furthest stage in which a request can start, the digests that it could find there,
        the pages found.
        """
        for stage in reversed(range(len(request.chains))):
            most = (request.total - 1) // self.pool.page_size  # the last token is always read
            digests = request.chains[stage][:most]
            pages = [] if request.untold else self.pool.match(digests)
            if not stage or len(pages) * self.pool.page_size >= request.stages[stage - 1].until:
                break
        return stage, digests, pages

    def _draft(self, decoding: Sequence[Work], budget: int) -> None:
        """Share what is left among the decoding requests."""
        pool, free = self.pool, self.pool.available
        for number, work in enumerate(decoding):
            request, share = work.request, len(decoding) - number
            spare = len(request.pages) * pool.page_size - request.total
            most = min(
                self._config.speculate, budget // share, spare + free // share * pool.page_size
            )
            work.drafts = max(0, min(most, min(request.limit - 1, request.until) - request.total))
            budget -= work.drafts
            free -= pool.needed(max(work.drafts - spare, 0))

    def _requeue(self, request: Request) -> None:
        self.running.remove(request)
        self._let_go(request)
        self.add(request)

    def _let_go(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.computed, request.sealed = [], 0, 0

    def _digest(self, request: Request) -> None:
        """Digests of all full pages that the known tokens make; they stand for how the tokens are
        read, too.
        """
        size = self.pool.page_size
        for number, stage in enumerate(request.stages):
            if number and request.total <= request.stages[number - 1].until:
                break
            if number == len(request.chains):
                request.chains.append([])
            known, read = request.chains[number], (self.counts.version, request.profile, stage.way)
            parent = (
                known[-1] if known else chain(repr((*read, request.stages[:number])).encode(), [])
            )
            for page in range(len(known), min(request.total, stage.until) // size):
                parent = chain(parent, request.tokens(page * size, (page + 1) * size))
                known.append(parent)
