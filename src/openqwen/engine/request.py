"""The engine's data: requests, what a step computes for them, what it produced, and counts."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from openqwen.engine.generator import FinishReason, Output, Sampling, TopTokens
from openqwen.engine.text import TextStream
from openqwen.model import LongContext
from openqwen.model.long_context import ContextStep

if TYPE_CHECKING:
    from openqwen.engine.adapters import Adapter
    from openqwen.engine.constrain import Matcher
    from openqwen.engine.drafter import DraftLength, PromptLookup


@dataclass(eq=False, kw_only=True)
class Request(Output):
    """One sequence and its progress: `computed` of its `total` tokens are in the cache.

    Args:
        id: number of the request, in order of arrival.
        max_length: most tokens of prompt and answer.
        scalings: how the sequence is read as it grows, in order of length.
        priority: requests of a larger priority go first.
        cache_key: what else the keys depend on; requests share pages only if theirs are equal.
        draft_length, lookup: how speculation goes; None before the first draft.
        top: of each answer token, the likeliest tokens at its position.
        prompt_top: the likeliest tokens at each position of `prompt_logprobs`.
        arrived, started, first_token, finished: seconds of `time.monotonic`.
        cached_tokens: prompt tokens that the prefix cache held when the request first started.
        pages: the cache pages that it references, in order.
        scaling: index of the scaling in use.
        computed: tokens whose keys and values are in the pages.
        registered: pages, from the first on, that the prefix cache knows.
        prefix_hashes: of each scaling, the prefix hashes of its full pages so far.
    """

    id: int
    sampling: Sampling
    seed: int
    max_length: int
    stream: TextStream
    matcher: "Matcher | None" = None
    adapter: "Adapter | None" = None
    scalings: Sequence[ContextStep] = (ContextStep(sys.maxsize, None),)
    priority: int = 0
    cache_key: tuple[object, ...] = ()
    draft_length: "DraftLength | None" = None
    lookup: "PromptLookup | None" = None

    top: list[TopTokens] = field(default_factory=list)
    prompt_top: list[TopTokens] = field(default_factory=list)

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0

    pages: list[int] = field(default_factory=list)
    scaling: int = 0
    computed: int = 0
    registered: int = 0
    prefix_hashes: list[list[bytes]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of known tokens: the prompt's and the answer's so far."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def uncomputed(self) -> int:
        """Number of tokens to compute before the next one can be sampled; 1 while decoding."""
        return self.total - self.computed

    @property
    def long_context(self) -> LongContext | None:
        """How the sequence is read now."""
        return self.scalings[self.scaling].way

    @property
    def scaling_end(self) -> int:
        """Most tokens that are computed under the scaling in use."""
        return self.scalings[self.scaling].until

    @property
    def unscored(self) -> range:
        """Positions of prompt tokens whose log-probabilities are wanted and not yet computed."""
        wanted = 0 if self.sampling.prompt_logprobs is None else len(self.prompt_ids)
        first = max(1, self.sampling.prompt_logprobs_from)
        return range(first + len(self.prompt_logprobs), wanted)

    @property
    def reusable(self) -> int:
        """Number of first tokens whose hidden states nobody needs: the cache may hold them."""
        return self.unscored.start - 1 if self.unscored else self.total - 1

    @property
    def queue_key(self) -> tuple[int, int]:
        """Sort key of the queues: higher priority first, then earlier arrival."""
        return -self.priority, self.id

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of the sequence (prompt and answer) from position `start` to before `stop`."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.token_ids[start - split : stop - split]
        return self.prompt_ids[start:stop] + self.token_ids[: max(stop - split, 0)]


@dataclass
class ScheduledRequest:
    """What one step does for a request: compute `count` tokens, and verify drafts after them.

    max_drafts: most draft tokens. drafts: the draft tokens.
    """

    request: Request
    count: int
    max_drafts: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute, which follow the request's computed ones."""
        start = self.request.computed
        return self.request.tokens(start, start + self.count) + self.drafts

    @property
    def scored(self) -> int:
        """Number of last positions whose scores are needed: none while tokens remain uncomputed."""
        return len(self.drafts) + 1 if self.count == self.request.uncomputed else 0


@dataclass(frozen=True)
class Event:
    """What one step produced for one request.

    text: complete characters; no stop text can remove them later. token_ids: without the token that
    ends the answer. version: of the weights that computed the tokens.
    """

    request: Request
    token_ids: list[int]
    text: str
    logprobs: list[float]
    top: list[TopTokens]
    finish_reason: FinishReason | None
    version: int


@dataclass
class Stats:
    """The engine's state now, and counts since its start.

    tokens_in: prompt tokens of started requests; cache_hits: those found in the prefix cache.
    drafted, accepted: draft tokens, and those that the model confirmed.
    """

    waiting: int = 0
    running: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_used: int = 0
    tokens_in: int = 0
    cache_hits: int = 0
    tokens_out: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    version: int = 0
