"""Requests on their way: the queues, and the pages that they hold."""

from bisect import insort
from collections.abc import Iterator
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

    def outgrown(self) -> Iterator[tuple[Request, int, list[int]]]:
        """Take what runs and has come to the end of its way on to the next. Of each request: how many of its pages hold
        turned keys already, since somebody else has turned the same, and the pages from which the caller fills those
        that follow, before it asks for the next request."""
        pool = self.pool
        for request in [r for r in self.running if r.computed >= r.until]:
            self._digest(request)
            held, full = request.pages, pool.needed(request.computed)
            known = pool.match(request.chains[request.stage + 1][:full])
            rest = held[len(known) : full]
            need = sum(not pool.references[page] for page in known) + sum(pool.references[page] > 1 for page in rest)
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
        """Plan a step of at most `budget` tokens and make it so: what is to be read, its pages held."""
        step = plan(self.waiting, self.running, self.pool, self._config, budget)
        for request in step.preempted:
            self.counts.preemptions += 1
            request.preemptions += 1
            self._requeue(request)
        for request, stage, pages in step.admitted:
            self.waiting.remove(request)
            self.pool.share(pages)
            request.stage, request.pages, request.sealed = stage, pages, len(pages)
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
                self.pool.seal(request.pages[number], request.chains[request.stage][number])
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
            request.chains.clear()
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
        size = self.pool.page_size
        for number, stage in enumerate(request.stages):
            if number and request.total <= request.stages[number - 1].until:
                break
            if number == len(request.chains):
                request.chains.append([])
            known, read = request.chains[number], (self.counts.version, request.profile, stage.way)
            parent = known[-1] if known else chain(repr((*read, request.stages[:number])).encode(), [])
            for page in range(len(known), min(request.total, stage.until) // size):
                parent = chain(parent, request.tokens(page * size, (page + 1) * size))
                known.append(parent)
