"""Requests on their way: the queues, and the pages that they hold."""

from bisect import insort
from dataclasses import replace
from time import monotonic

from openqwen.engine.config import EngineConfig
from openqwen.engine.pages import PagePool, chain
from openqwen.engine.plan import Work, plan
from openqwen.engine.request import FinishReason, Request, Stats


class Schedule:
    """Who waits and who runs, in their order, and the pool. A request is in one of the queues until it ends."""

    def __init__(self, pool: PagePool, config: EngineConfig):
        self.pool, self._config = pool, config
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counts = Stats()

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._digest(request)
        insort(self.waiting, request, key=lambda r: r.order)

    def next(self, budget: int) -> list[Work]:
        """Plan a step of at most `budget` tokens and make it so: what is to be read, its pages held."""
        step = plan(self.waiting, self.running, self.pool, self._config, budget)
        for request in step.preempted:
            self.counts.preemptions += 1
            request.preemptions += 1
            self._requeue(request)
        for request, pages in step.admitted:
            self.waiting.remove(request)
            self.pool.share(pages)
            request.pages, request.sealed = pages, len(pages)
            request.computed = len(pages) * self.pool.page_size
            insort(self.running, request, key=lambda r: r.order)
            if request.started is None:
                request.started = monotonic()
                request.cached_tokens = request.computed
                self.counts.tokens_in += len(request.prompt_ids)
                self.counts.cache_hits += request.cached_tokens
        for work in step.work:
            self.hold(work.request, work.request.total)
        return step.work

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
                self.pool.seal(request.pages[number], request.digests[number])
            request.sealed = full

    def end(self, request: Request, reason: FinishReason) -> None:
        """Take a request out, wherever it is; its pages are free at once."""
        (self.running if request in self.running else self.waiting).remove(request)
        request.finish_reason, request.finished = reason, monotonic()
        self._let_go(request)

    def restart(self, version: int) -> None:
        """All that is cached is void. What runs waits again, to be read anew; what it has written stays."""
        self.counts.version = version
        self.pool.forget()
        for request in [*self.running, *self.waiting]:
            request.digests.clear()
        for request in list(self.running):
            self._requeue(request)
        for request in self.waiting:
            self._digest(request)

    def _requeue(self, request: Request) -> None:
        self.running.remove(request)
        self._let_go(request)
        self.add(request)

    def _let_go(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.computed, request.sealed = [], 0, 0

    def _digest(self, request: Request) -> None:
        """Digests of all full pages that the known tokens make; they stand for how the tokens are read, too."""
        size, known = self.pool.page_size, request.digests
        parent = known[-1] if known else chain(repr((self.counts.version, request.profile)).encode(), [])
        for number in range(len(known), request.total // size):
            parent = chain(parent, request.tokens(number * size, (number + 1) * size))
            known.append(parent)
