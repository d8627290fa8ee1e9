"""The engine's data: a request and how far it has come, what a step made, and counts."""

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
    from openqwen.engine.drafter import Pace


@dataclass(eq=False, kw_only=True)
class Request(Output):
    """One sequence and how far it has come: `computed` of its `total` tokens have keys and values
    in its `pages`.

    stages: how it is read as it grows, `stage` the one at work: while up to its `until` tokens are
    computed.
    cached_tokens: prompt tokens found in the cache at the start. limit: tokens it may come to hold.
    Times are those of `time.monotonic`. Of each output token: its log-probability under the model's
    own distribution (`logprobs`), under the one that it was drawn from (`drawn_logprobs`:
    penalties, temperature and cuts applied), the likeliest tokens there (`top`), and the weights
    that made it (`versions`). prompt_top: the likeliest at each place of `prompt_logprobs`.
    """

    id: int
    sampling: Sampling
    seed: int
    limit: int
    stream: TextStream
    matcher: "Matcher | None" = None
    pace: "Pace | None" = None
    adapter: "Adapter | None" = None
    stages: Sequence[ContextStep] = (ContextStep(sys.maxsize, None),)
    priority: int = 0
    profile: tuple[
        object, ...
    ] = ()  # what else its keys depend on: requests of different profiles share no pages

    drawn_logprobs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    prompt_top: list[TopTokens] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0

    pages: list[int] = field(default_factory=list)
    stage: int = 0
    computed: int = 0
    sealed: int = 0  # pages that others may find
    chains: list[list[bytes]] = field(
        default_factory=list
    )  # digests of the full pages of each stage, so far

    @property
    def total(self) -> int:
        """Tokens known: the prompt's and the answer's so far."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def left(self) -> int:
        """Tokens still to be read before the next can be chosen; 1 while it decodes."""
        return self.total - self.computed

    @property
    def long_context(self) -> LongContext | None:
        """How it is read now."""
        return self.stages[self.stage].way

    @property
    def until(self) -> int:
        """Tokens that can be read so."""
        return self.stages[self.stage].until

    @property
    def untold(self) -> range:
        """Prompt tokens whose log-probabilities are still to be told; what is cached cannot tell
        them.
        """
        told = 1 + len(self.prompt_logprobs)
        return range(told, told if self.sampling.prompt_logprobs is None else len(self.prompt_ids))

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return -self.priority, self.id

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids of prompt and answer, laid end to end, from `start` to before `stop`."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.token_ids[start - split : stop - split]
        return self.prompt_ids[start:stop] + self.token_ids[: max(stop - split, 0)]


@dataclass(frozen=True)
class Event:
    """What one step made of one request.

    text: complete characters, which no stop text can take back. The token that ends an answer is
    not among token_ids.
    version: of the weights that made the tokens.
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
    """Where the engine stands, and what it has done since its start.

    tokens_in: of the prompts started; cache_hits: those of them found in the cache. drafted,
    accepted: guessed tokens, and those that were right.
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
