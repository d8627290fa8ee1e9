"""Guesses of what comes next, which one call then checks all at once.

A guess is right where the sampler, with the draw that belongs to its place, chooses the guessed
token. So an answer is the same with guesses as without, sampled ones too: for guesses by lookup
this is rejection sampling (Leviathan et al.
2023), and even the draws are those of the plain run. A draft model guesses with the same draws, so
it is often right.
"""

from collections.abc import Sequence

from openqwen.engine.adapters import Adapters
from openqwen.engine.generator import Sampling
from openqwen.engine.pages import PagePool
from openqwen.engine.request import Request
from openqwen.engine.runner import Read, Runner
from openqwen.engine.sampler import Row, choose
from openqwen.engine.schedule import Work
from openqwen.model import Qwen2

_GRAM = 3  # tokens that must have come before in the same order
_PAUSE = 32  # tokens without drafts after guesses have failed
_CHUNK = 512  # tokens that a draft model reads in one call


class Pace:
    """How far to guess ahead in one request, and where its n-grams have come before.

    Twice as far after a guess that was right to its end, half as far after one that failed at once;
    when even one token was too far, not at all for a while.
    """

    def __init__(self, most: int):
        self._most, self._length, self._pause = most, min(4, most), 0
        self._after: dict[
            tuple[int, ...], int
        ] = {}  # where the latest occurrence of each n-gram ends
        self._known: list[int] = []

    def lookup(self, ids: Sequence[int], most: int) -> list[int]:
        """Prompt lookup (Saxena 2023): the last tokens, where they have come before, go on as they
        did then.

        `ids` begin with those of the last call.
        """
        for token in ids[len(self._known) :]:
            # An n-gram becomes known when its successor comes: it never finds itself.
            if len(self._known) >= _GRAM:
                self._after[tuple(self._known[-_GRAM:])] = len(self._known)
            self._known.append(token)
        at = self._after.get(tuple(self._known[-_GRAM:]), len(self._known))
        return self._known[at : at + most]

    def length(self, most: int) -> int:
        """How far to guess now."""
        self._pause -= self._pause > 0
        return 0 if self._pause else min(self._length, most)

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of the last guess were right."""
        if right == guessed:
            self._length = min(2 * self._length, self._most)
        elif right == 0:
            self._length //= 2
            if not self._length:
                self._length, self._pause = 1, _PAUSE


class Drafter:
    """Guesses for the requests of a step: what a structure forces, else what a draft model writes
    or lookup finds.
    """

    def __init__(self, most: int):
        self._most = most
        self.draft: DraftModel | None = None

    def guess(self, works: Sequence[Work]) -> list[list[int]]:
        """Up to `drafts` tokens of each, all of which fit the request's structure."""
        far: dict[Request, int] = {}
        for work in works:
            if work.drafts:
                work.request.pace = work.request.pace or Pace(self._most)
                far[work.request] = work.request.pace.length(work.drafts)
        written = self.draft.guess(far) if self.draft and far else {}
        return [
            self._of(work, far.get(work.request, 0), written.get(work.request)) for work in works
        ]

    def _of(self, work: Work, length: int, written: list[int] | None) -> list[int]:
        request = work.request
        if request.matcher and work.drafts and (forced := request.matcher.forced()):
            return forced[: work.drafts]
        if not length or not request.pace:
            return []
        guess = (
            request.pace.lookup(request.tokens(0, request.total), length)
            if written is None
            else written
        )
        return request.matcher.fitting(guess) if request.matcher else guess


class DraftModel:
    """A small model of the same vocabulary that writes ahead, with a cache of its own for a few
    requests.
    """

    def __init__(self, model: Qwen2, vocabulary: int, page_size: int, tokens: int):
        self._vocabulary = vocabulary
        self._pool = PagePool(-(-tokens // page_size), page_size)
        self._runner = Runner(model, Adapters(model), vocabulary, self._pool.count, page_size)
        self._shadows: dict[Request, Request] = {}  # what it has read of each

    def guess(self, lengths: dict[Request, int]) -> dict[Request, list[int]]:
        """The next tokens of each request, as this model would have the sampler choose them."""
        for request in [r for r in self._shadows if r not in lengths]:
            self._pool.release(self._shadows.pop(request).pages)
        guesses: dict[Request, list[int]] = {request: [] for request in lengths}
        going = {r: self._shadow(r, length) for r, length in lengths.items() if length}
        for ahead in range(max(lengths.values())):
            going = {
                r: shadow for r, shadow in going.items() if shadow.pages and lengths[r] > ahead
            }
            if not going:
                break
            reads = [Read(s, s.tokens(s.computed, s.total), 1) for s in going.values()]
            rows = [
                Row(
                    r.sampling,
                    r.seed,
                    len(r.token_ids) + ahead,
                    r.prompt_ids,
                    r.token_ids + guesses[r],
                )
                for r in going
            ]
            choice = choose(self._runner.run(reads), rows, self._vocabulary)
            for (request, shadow), token in zip(going.items(), choice.tokens):
                shadow.computed = shadow.total
                shadow.token_ids.append(token)
                guesses[request].append(token)
        return guesses

    def _shadow(self, request: Request, length: int) -> Request:
        """What stands for the request here, read up to its last few tokens; without pages where
        there is no room.
        """
        blank = Request(id=0, sampling=Sampling(), seed=0, limit=0, stream=request.stream)
        shadow = self._shadows.setdefault(request, blank)
        ids = request.tokens(0, request.total)
        known = shadow.tokens(
            0, min(shadow.computed, len(ids) - 1)
        )  # the last guess was read, and may not have come
        shadow.computed = next(
            (n for n, pair in enumerate(zip(known, ids)) if pair[0] != pair[1]), len(known)
        )
        shadow.prompt_ids, shadow.token_ids = ids, []
        need = max(0, self._pool.needed(len(ids) + length) - len(shadow.pages))
        if need > self._pool.available:
            self._pool.release(shadow.pages)
            shadow.pages, shadow.computed = [], 0
            return shadow
        shadow.pages += self._pool.take(need)
        while shadow.left > _CHUNK:
            self._runner.run(
                [Read(shadow, shadow.tokens(shadow.computed, shadow.computed + _CHUNK), 0)]
            )
            shadow.computed += _CHUNK
        return shadow
