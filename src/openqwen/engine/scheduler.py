"""The scheduler: queues of requests, their pages, and what each step computes.

Decoding requests go first, with one token each. The rest of the token budget computes prompts, in
chunks; what is left then may be used for draft tokens. If no page is available for a decoding
request, the youngest running request is preempted: it releases its pages and waits. It keeps its
answer, which is computed again with its prompt, unless its pages are still in the prefix cache.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic

from openqwen.engine.config import EngineConfig
from openqwen.engine.generator import FinishReason
from openqwen.engine.pages import PagePool, prefix_hash
from openqwen.engine.request import Request, ScheduledRequest, Stats


class Scheduler:
    """Holds the waiting and the running requests, sorted, and the page pool.

    Every request fits into the pool when it runs alone.
    """

    def __init__(self, pool: PagePool, config: EngineConfig):
        self.pool, self._config = pool, config
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counts = Stats()

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._update_hashes(request)
        insort(self.waiting, request, key=lambda r: r.queue_key)

    def schedule(self, budget: int) -> list[ScheduledRequest]:
        """Plan a step of at most `budget` tokens, and allocate the pages of these tokens."""
        preemptions = self.counts.preemptions
        scheduled: list[ScheduledRequest] = []
        for request in list(self.running):
            # A request without pages was preempted for one before it.
            decodes = request.uncomputed == 1 and request.pages
            if decodes and len(scheduled) < budget and self._make_room(request):
                scheduled.append(ScheduledRequest(request, 1))
        budget -= len(scheduled)
        for request in self.running:
            if request.uncomputed > 1:
                budget -= self._compute(request, budget, scheduled)
        if self.counts.preemptions == preemptions:
            budget = self._start_waiting(budget, scheduled)
        decoding = [item for item in scheduled if item.request.uncomputed == item.count == 1]
        if not self.waiting and len(decoding) <= self._config.draft_below:
            self._share_drafts(decoding, budget)
        return scheduled

    def advance_scalings(self, rotate: Callable[[Request, int, list[int]], None]) -> None:
        """Move requests that outgrew their RoPE scaling to the next one.

        rotate(request, done, sources): called with the request under its new scaling. It fills the
        request's pages, but for the first `done`, with the content of the pages `sources`, and
        rotates the keys.
        """
        pool = self.pool
        for request in list(self.running):
            if request.computed < request.scaling_end:
                continue
            self._update_hashes(request)
            old, used = request.pages, pool.pages_for(request.computed)
            # Another request may have rotated the same pages before.
            rotated = pool.match(request.prefix_hashes[request.scaling + 1][:used])
            sources = old[len(rotated) : used]
            needed = sum(pool.references[page] == 0 for page in rotated)
            needed += sum(pool.references[page] > 1 for page in sources)
            if needed > pool.available:
                self._requeue(request)
                continue
            pool.share(rotated)
            request.pages = rotated + pool.writable(sources) + old[used:]
            request.scaling, request.registered = request.scaling + 1, 0
            rotate(request, len(rotated), sources)
            pool.release([a for a, b in zip(old, request.pages) if a != b])
            self.register_prefix(request)

    def allocate(self, request: Request, tokens: int) -> None:
        """Give a request enough pages for this many tokens."""
        missing = self.pool.pages_for(tokens) - len(request.pages)
        request.pages += self.pool.allocate(max(0, missing))

    def register_prefix(self, request: Request) -> None:
        """Let other requests share the pages that are full now."""
        full = request.computed // self.pool.page_size
        if full > request.registered:
            self._update_hashes(request)
            for number in range(request.registered, full):
                prefix = request.prefix_hashes[request.scaling][number]
                self.pool.register_prefix(request.pages[number], prefix)
            request.registered = full

    def end(self, request: Request, reason: FinishReason) -> None:
        """Remove a request from its queue and release its pages."""
        (self.running if request in self.running else self.waiting).remove(request)
        request.finish_reason, request.finished = reason, monotonic()
        self._release(request)

    def restart(self, version: int) -> None:
        """Drop all cached keys and values; running requests wait to be computed again.

        version: of the new weights.
        """
        self.counts.version = version
        self.pool.clear_prefixes()
        for request in [*self.running, *self.waiting]:
            request.prefix_hashes.clear()
        for request in list(self.running):
            self._requeue(request)
        for request in self.waiting:
            self._update_hashes(request)

    def stats(self) -> Stats:
        """The counts, and the state of queues and pages now."""
        pool = self.pool
        return replace(
            self.counts,
            waiting=len(self.waiting),
            running=len(self.running),
            pages_free=pool.available - pool.cached,
            pages_cached=pool.cached,
            pages_used=pool.count - pool.available,
        )

    def check_integrity(self) -> None:
        """Assert what holds between two steps: pages add up, and registered ≤ computed < total."""
        self.pool.check_integrity([request.pages for request in self.running])
        assert len(self.running) <= self._config.max_running
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=lambda r: r.queue_key)
        size = self.pool.page_size
        for request in self.running:
            assert request.registered * size <= request.computed < request.total
            assert request.computed <= min(len(request.pages) * size, request.scaling_end)
            assert request.total < request.max_length
        for request in self.waiting:
            assert not request.pages
            assert request.computed == request.registered == 0

    def _compute(self, request: Request, budget: int, into: list[ScheduledRequest]) -> int:
        """Schedule the next tokens of a prompt; returns their number."""
        room = request.scaling_end - request.computed
        count = min(budget, request.uncomputed, room)
        if count > 0:
            into.append(ScheduledRequest(request, count))
        return count

    def _make_room(self, request: Request) -> bool:
        """Allocate the page of a decoding request's next token; preempt requests if necessary.

        Returns False where the request itself, as the youngest, was preempted.
        """
        while self.pool.pages_for(request.total) - len(request.pages) > self.pool.available:
            victim = self.running[-1]
            self.counts.preemptions += 1
            self._requeue(victim)
            if victim is request:
                return False
        self.allocate(request, request.total)
        return True

    def _start_waiting(self, budget: int, into: list[ScheduledRequest]) -> int:
        """Start waiting requests in order, while budget and pages last; returns the budget left."""
        if not self.waiting or budget <= 0:
            return budget
        computing = set[bytes]()  # prefix hashes of pages that running requests are yet to fill
        for request in self.running:
            if request.uncomputed > 1:
                computing.update(request.prefix_hashes[request.scaling][request.registered :])
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._config.max_running:
                break
            scaling, hashes, pages = self._cached_prefix(request)
            if len(pages) < len(hashes) and hashes[len(pages)] in computing:
                continue  # another request computes the same prefix: wait, then share its pages
            if not self._start(request, scaling, pages):
                break
            computing.update(request.prefix_hashes[scaling][len(pages) :])
            budget -= self._compute(request, budget, into)
        return budget

    def _start(self, request: Request, scaling: int, pages: list[int]) -> bool:
        """Let a request run, with these pages of its prefix.

        Returns False if its other pages, and one for each running request, are not available.
        """
        pool = self.pool
        pool.share(pages)
        missing = pool.pages_for(request.total) - len(pages)
        if missing + len(self.running) > pool.available:
            pool.release(pages)
            return False
        self.waiting.remove(request)
        insort(self.running, request, key=lambda r: r.queue_key)
        request.pages = pages + pool.allocate(missing)
        request.scaling, request.registered = scaling, len(pages)
        request.computed = len(pages) * pool.page_size
        if request.started is None:
            request.started = monotonic()
            request.cached_tokens = request.computed
            self.counts.tokens_in += len(request.prompt_ids)
            self.counts.cache_hits += request.cached_tokens
        return True

    def _cached_prefix(self, request: Request) -> tuple[int, list[bytes], list[int]]:
        """The last scaling that a request can start in.

        Returns its index, the prefix hashes of pages that could be cached, and the cached pages.
        """
        size = self.pool.page_size
        most = request.reusable // size  # cached pages give no log-probabilities
        for scaling in reversed(range(len(request.prefix_hashes))):
            hashes = request.prefix_hashes[scaling][:most]
            pages = self.pool.match(hashes)
            if scaling == 0 or len(pages) * size >= request.scalings[scaling - 1].until:
                break
        return scaling, hashes, pages

    def _share_drafts(self, decoding: Sequence[ScheduledRequest], budget: int) -> None:
        """Divide the budget and the available pages among the drafts of decoding requests."""
        pool, available = self.pool, self.pool.available
        for number, item in enumerate(decoding):
            request, sharing = item.request, len(decoding) - number
            spare = len(request.pages) * pool.page_size - request.total
            room = spare + available // sharing * pool.page_size
            left = min(request.max_length - 1, request.scaling_end) - request.total
            most = min(self._config.speculate, budget // sharing, room, left)
            item.max_drafts = max(0, most)
            budget -= item.max_drafts
            available -= pool.pages_for(max(item.max_drafts - spare, 0))

    def _requeue(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.add(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.computed, request.registered = [], 0, 0

    def _update_hashes(self, request: Request) -> None:
        """Hash the pages that the known tokens fill, under each scaling that they reach.

        The first hash covers all else that the keys depend on: the version of the weights, the
        request's `cache_key`, and the scaling with those before it.
        """
        size, version = self.pool.page_size, self.counts.version
        for number, scaling in enumerate(request.scalings):
            before = request.scalings[:number]
            if before and request.total <= before[-1].until:
                break
            if number == len(request.prefix_hashes):
                request.prefix_hashes.append([])
            hashes = request.prefix_hashes[number]
            origin = repr((version, request.cache_key, scaling.way, before)).encode()
            parent = hashes[-1] if hashes else prefix_hash(origin, [])
            for page in range(len(hashes), min(request.total, scaling.until) // size):
                parent = prefix_hash(parent, request.tokens(page * size, (page + 1) * size))
                hashes.append(parent)
