"""The engine's data: how to choose tokens, a request and how far it has come, what a step made, and an answer."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from openqwen.engine.text import TextStream
from openqwen.model import LongContext
from openqwen.model.long_context import Stage
from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.engine.adapters import Adapter
    from openqwen.engine.constrain import Matcher
    from openqwen.engine.drafter import Pace

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or messages
FinishReason = Literal["stop", "length", "cancelled", "error"]
TopTokens = list[tuple[int, float]]  # (id, log-probability), likeliest first


@dataclass(frozen=True)
class Structure:
    """What an answer must look like to the last byte.

    kind: "json_schema" (`source` is the schema, as JSON text; see `schema.ready`), "regex", or
    "grammar" (Lark's notation, as llguidance reads it).
    """

    kind: Literal["json_schema", "regex", "grammar"]
    source: str


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop.

    max_tokens: most tokens to write; None: what the context holds. temperature: 0 takes the likeliest token. Cuts, in
    this order: top_k (0: none) keeps the likeliest tokens, top_p the first that hold this share of what is left, min_p
    those at least this share as likely as the likeliest. repetition_penalty divides the scores of tokens that prompt or
    answer hold (Keskar et al. 2019); presence_penalty and frequency_penalty are taken off the scores of tokens that the
    answer holds, once and once an occurrence. logit_bias: (id, what is added to its score). seed: of the draws. stop:
    texts that end the answer and are left out of it. stop_ids: token ids that end it, besides the
    checkpoint's own unless ignore_eos. top_logprobs: how many of the likeliest tokens to tell at
    each position. prompt_logprobs: the same of the prompt, with the log-probabilities of its own
    tokens; None tells nothing of it. structure: what the answer must look like. long_context: how
    the sequence is read; None: as its length, the engine's settings and the model's configuration
    say (`Admission.stages`).
    """

    max_tokens: int | None = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    long_context: LongContext | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite
        for name, good, wanted in (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (no cut) or more"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", finite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", finite(self.frequency_penalty), "a finite number"),
            ("top_logprobs", self.top_logprobs >= 0, "0 or more"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "0 or more"),
            ("stop", "" not in self.stop, "texts that are not empty"),
            ("logit_bias", all(i >= 0 and finite(b) for i, b in self.logit_bias), "ids of 0 or more, finite numbers"),
        ):
            if not good:
                value = getattr(self, name)
                raise OpenQwenError(f"{name} cannot be {value}.", where=f"sampling, {name}", do=f"give {wanted}")

    @cached_property
    def penalised(self) -> bool:
        """Whether scores depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def cut(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(eq=False)
class Output:
    """One answer. `token_ids` leaves out the stop token; `logprobs` has one entry for each id. stop_id: the token that
    ended it, if one did. prompt_logprobs: where they were asked for, of each prompt token but the first."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    stop_id: int | None = None

    @property
    def written_ids(self) -> list[int]:
        """All that the model wrote: `token_ids`, and the token that ended it."""
        return self.token_ids if self.stop_id is None else [*self.token_ids, self.stop_id]


@dataclass(eq=False, kw_only=True)
class Request(Output):
    """One sequence and how far it has come: `computed` of its `total` tokens have keys and values in its `pages`.

    stages: how it is read as it grows, `stage` the one at work: while up to its `until` tokens are computed.
    cached_tokens: prompt tokens found in the cache at the start. limit: tokens it may come to hold. Times are those of
    `time.monotonic`. Of each output token: its log-probability under the model's own distribution (`logprobs`), under
    the one that it was drawn from (`drawn_logprobs`: penalties, temperature and cuts applied), the likeliest tokens
    there (`top`), and the weights that made it (`versions`). prompt_top: the likeliest at each place of
    `prompt_logprobs`.
    """

    id: int
    sampling: Sampling
    seed: int
    limit: int
    stream: TextStream
    matcher: "Matcher | None" = None
    pace: "Pace | None" = None
    adapter: "Adapter | None" = None
    stages: Sequence[Stage] = (Stage(sys.maxsize, None),)
    priority: int = 0
    profile: tuple[object, ...] = ()  # what else its keys depend on: requests of different profiles share no pages

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
    chains: list[list[bytes]] = field(default_factory=list)  # digests of the full pages of each stage, so far

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
        """Prompt tokens whose log-probabilities are still to be told; what is cached cannot tell them."""
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

    text: complete characters, which no stop text can take back. The token that ends an answer is not among token_ids.
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

    tokens_in: of the prompts started; cache_hits: those of them found in the cache. drafted, accepted: guessed tokens,
    and those that were right.
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
