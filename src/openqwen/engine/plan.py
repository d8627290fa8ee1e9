"""What one step does: a pure function of who waits, who runs, and which pages are free.

Decoding requests go first, one token each; what is left of the token budget reads prompts, a chunk at a time; what is
left then may be drafted. Where no page is free for a decoding request, the youngest gives its pages back and waits
again (preemption by recompute: what it has written stays written, and its pages can be found until they are reused).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from openqwen.engine.config import EngineConfig
from openqwen.engine.pages import PagePool
from openqwen.engine.request import Request


@dataclass
class Work:
    """Read `count` more tokens of a request, and draft up to `drafts` after them."""

    request: Request
    count: int
    drafts: int = 0


@dataclass
class Step:
    """preempted: to give their pages back. admitted: to start, at a stage, with the pages found. work: to read."""

    preempted: list[Request] = field(default_factory=list)
    admitted: list[tuple[Request, int, list[int]]] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


def plan(
    waiting: Sequence[Request], running: Sequence[Request], pool: PagePool, config: EngineConfig, budget: int
) -> Step:
    """The next step within `budget` tokens; both queues in their order. Every request fits the pool when alone."""
    step = Step()
    kept = list(running)
    free, budget = _decode(kept, pool, budget, step)
    for request in kept:
        if request.left > 1 and budget > 0:
            step.work.append(Work(request, min(budget, request.left, request.until - request.computed)))
            budget -= step.work[-1].count
    if not step.preempted:
        free, budget = _admit(waiting, kept, pool, config, (free, budget), step)
    decoding = [w for w in step.work if w.request.left == w.count == 1]
    if config.speculate and len(decoding) <= config.draft_below and not waiting:
        _draft(decoding, pool, config, (free, budget))
    return step


def _decode(kept: list[Request], pool: PagePool, budget: int, step: Step) -> tuple[int, int]:
    """One token of each decoding request; the youngest leave `kept` where pages are short. Returns (free, budget)."""
    free = pool.available
    given: Counter[int] = Counter()
    number = 0
    while number < len(kept) and budget > 0:
        request = kept[number]
        number += 1
        if request.left > 1:
            continue
        need = pool.needed(request.total) - len(request.pages)
        while need > free and len(kept) >= number:
            victim = kept.pop()
            step.preempted.append(victim)
            given.update(victim.pages)
            free += sum(given[page] == pool.references[page] for page in victim.pages)
        if len(kept) >= number:
            free -= need
            budget -= 1
            step.work.append(Work(request, 1))
    return free, budget


def _admit(
    waiting: Sequence[Request],
    kept: Sequence[Request],
    pool: PagePool,
    config: EngineConfig,
    room: tuple[int, int],
    step: Step,
) -> tuple[int, int]:
    """Start waiting requests in order while pages for all of their tokens are free, and one for each that runs."""
    free, budget = room
    written: set[bytes] | None = None  # digests of the pages that running requests are about to fill
    for request in waiting:
        count = len(kept) + len(step.admitted)
        if count >= config.max_running or budget <= 0:
            break
        if written is None:
            written = {d for r in kept if r.left > 1 for d in r.chains[r.stage][r.sealed :]}
        stage, digests, pages = _known(request, pool)
        if len(pages) < len(digests) and digests[len(pages)] in written:
            continue  # somebody is reading the same prompt: wait a step or two, then share its pages
        unheld = sum(not pool.references[page] for page in pages)
        need = pool.needed(request.total) - len(pages)
        if need + unheld + count > free:
            break
        free -= need + unheld
        step.admitted.append((request, stage, pages))
        left = min(request.total, request.stages[stage].until) - len(pages) * pool.page_size
        if left:  # else all up to the end of this stage is known
            step.work.append(Work(request, min(budget, left)))
            budget -= step.work[-1].count
        written.update(digests[len(pages) :])
    return free, budget


def _known(request: Request, pool: PagePool) -> tuple[int, list[bytes], list[int]]:
    """The furthest stage in which a request can start, the digests that it could find there, and the pages found."""
    for stage in reversed(range(len(request.chains))):
        digests = request.chains[stage][: (request.total - 1) // pool.page_size]  # the last token is always read
        pages = [] if request.untold else pool.match(digests)
        if not stage or len(pages) * pool.page_size >= request.stages[stage - 1].until:
            break
    return stage, digests, pages


def _draft(decoding: Sequence[Work], pool: PagePool, config: EngineConfig, room: tuple[int, int]) -> None:
    """Share what is left among the decoding requests."""
    free, budget = room
    for number, work in enumerate(decoding):
        request, share = work.request, len(decoding) - number
        spare = max(len(request.pages), pool.needed(request.total)) * pool.page_size - request.total
        most = min(config.speculate, budget // share, spare + free // share * pool.page_size)
        work.drafts = max(0, min(most, min(request.limit - 1, request.until) - request.total))
        budget -= work.drafts
        free -= pool.needed(max(work.drafts - spare, 0))
