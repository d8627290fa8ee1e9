"""Speculative decoding: draft tokens, which one forward call then verifies all at once.

A draft token is accepted if the sampler, with the random draw that belongs to its position, chooses
it. So an answer is the same with drafts as without, sampled ones too; for drafts by prompt lookup
this is rejection sampling (Leviathan et al. 2023). A draft model samples with the same draws, which
makes its tokens right more often.
"""

from collections.abc import Mapping, Sequence

from openqwen.engine.adapters import Adapters
from openqwen.engine.generator import Sampling
from openqwen.engine.pages import PagePool
from openqwen.engine.request import Request, ScheduledRequest
from openqwen.engine.runner import Runner
from openqwen.engine.sampler import SamplingRow, sample
from openqwen.model import Qwen2

_GRAM = 3  # prompt lookup matches this many tokens
_FIRST_LENGTH = 4  # draft tokens
_PAUSE = 32  # steps without drafts after drafts have failed
_CHUNK = 512  # tokens that a draft model computes in one call


class DraftLength:
    """Adapts the number of draft tokens of one request to how many were accepted.

    It doubles after a draft that was accepted to its end and halves after one that failed at its
    first token. When a single token fails, there are no drafts for a while.
    """

    def __init__(self, longest: int):
        self._longest, self._length, self._pause = longest, min(_FIRST_LENGTH, longest), 0

    def next(self, most: int) -> int:
        """The number of tokens to draft now, at most `most`."""
        self._pause = max(0, self._pause - 1)
        return 0 if self._pause else min(self._length, most)

    def update(self, drafted: int, accepted: int) -> None:
        """Adapt to the outcome of the last draft."""
        if accepted == drafted:
            self._length = min(2 * self._length, self._longest)
        elif accepted == 0 and self._length > 1:
            self._length //= 2
        elif accepted == 0:
            self._pause = _PAUSE


class PromptLookup:
    """Drafts what followed the last tokens at their previous occurrence (Saxena 2023)."""

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}  # where each n-gram occurred last
        self._ids: list[int] = []

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens to follow `ids`, which begin with the ids of the last call."""
        for token in ids[len(self._ids) :]:
            # An n-gram is added when the token after it is known, so that it never finds itself.
            if len(self._ids) >= _GRAM:
                self._end_of[tuple(self._ids[-_GRAM:])] = len(self._ids)
            self._ids.append(token)
        end = self._end_of.get(tuple(self._ids[-_GRAM:]), len(self._ids))
        return self._ids[end : end + most]


class Drafter:
    """Drafts for the requests of a step.

    Tokens that a structure forces come first; otherwise a draft model writes them, or prompt lookup
    finds them.
    """

    def __init__(self, longest: int, model: "DraftModel | None"):
        self._longest, self.model = longest, model

    def draft(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Set each request's `drafts`: at most `max_drafts` tokens that fit its structure."""
        lengths: dict[Request, int] = {}
        for item in scheduled:
            if item.max_drafts:
                request = item.request
                request.draft_length = request.draft_length or DraftLength(self._longest)
                if request.matcher and (forced := request.matcher.forced()):
                    item.drafts, lengths[request] = forced[: item.max_drafts], 0
                else:
                    lengths[request] = request.draft_length.next(item.max_drafts)
        written = self.model.draft(lengths) if self.model and lengths else {}
        for item in scheduled:
            request = item.request
            if length := lengths.get(request):
                drafts = written[request] if self.model else _looked_up(request, length)
                item.drafts = request.matcher.fitting(drafts) if request.matcher else drafts


def _looked_up(request: Request, length: int) -> list[int]:
    request.lookup = request.lookup or PromptLookup()
    return request.lookup.draft(request.tokens(0, request.total), length)


class DraftModel:
    """A small model with the same vocabulary that writes drafts. It has a cache of its own.

    tokens: that its cache holds; requests beyond it get no drafts.
    """

    def __init__(self, model: Qwen2, vocabulary: int, page_size: int, tokens: int):
        self._vocabulary = vocabulary
        self._pool = PagePool(-(-tokens // page_size), page_size)
        self._runner = Runner(model, Adapters(model), vocabulary, self._pool.count, page_size)
        self._twins: dict[Request, Request] = {}  # each request as this model has computed it

    def draft(self, lengths: Mapping[Request, int]) -> dict[Request, list[int]]:
        """The next tokens of each request, as many as `lengths` says, sampled from this model."""
        for request in [r for r in self._twins if r not in lengths]:
            self._pool.release(self._twins.pop(request).pages)
        drafts: dict[Request, list[int]] = {request: [] for request in lengths}
        twins = {request: self._twin(request, n) for request, n in lengths.items() if n}
        for ahead in range(max(lengths.values())):
            active = [r for r, twin in twins.items() if twin.pages and lengths[r] > ahead]
            if not active:
                break
            scheduled, rows = [], []
            for r in active:
                scheduled.append(ScheduledRequest(twins[r], twins[r].uncomputed))
                answer = r.token_ids + drafts[r]
                rows.append(SamplingRow(r.sampling, r.seed, len(answer), r.prompt_ids, answer))
            sampled = sample(self._runner.run(scheduled), rows, self._vocabulary)
            for request, token in zip(active, sampled.tokens):
                twin = twins[request]
                twin.computed = twin.total
                twin.token_ids.append(token)
                drafts[request].append(token)
        return drafts

    def check_integrity(self) -> None:
        """Assert that the pages add up."""
        self._pool.check_integrity([twin.pages for twin in self._twins.values()])

    def _twin(self, request: Request, length: int) -> Request:
        """The request's twin, computed but for its last tokens, with room for `length` more.

        It has no pages where too few are available.
        """
        if request not in self._twins:
            new = Request(id=0, sampling=Sampling(), seed=0, max_length=0, stream=request.stream)
            self._twins[request] = new
        twin, ids = self._twins[request], request.tokens(0, request.total)
        # The last draft's tokens were computed; those that were not accepted are dropped.
        most = min(twin.computed, len(ids) - 1)
        first = min(len(twin.prompt_ids), most)  # a request only appends: those before are equal
        known = enumerate(twin.tokens(first, most), first)
        twin.computed = next((n for n, token in known if token != ids[n]), most)
        twin.prompt_ids, twin.token_ids = ids, []
        missing = max(0, self._pool.pages_for(len(ids) + length) - len(twin.pages))
        if missing > self._pool.available:
            self._pool.release(twin.pages)
            twin.pages, twin.computed = [], 0
            return twin
        twin.pages += self._pool.allocate(missing)
        while twin.uncomputed > _CHUNK:
            self._runner.run([ScheduledRequest(twin, _CHUNK)])
            twin.computed += _CHUNK
        return twin
