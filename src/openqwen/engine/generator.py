"""The interface of generators: prompts and sampling in, outputs out.

`Engine` generates in this process, `Endpoint` asks a server. Code that only generates takes a
`Generator`. Importing this file does not load torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.model import LongContext
    from openqwen.support.progress import Progress

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or messages
FinishReason = Literal["stop", "length", "cancelled", "error"]
TopTokens = list[tuple[int, float]]  # (id, log-probability), likeliest first


@dataclass(frozen=True)
class Structure:
    """A form that the whole answer must have.

    kind: "json_schema" (`source` is the schema as JSON text, see `schema.ready`), "regex", or
    "grammar" (in Lark's notation, as llguidance reads it).
    """

    kind: Literal["json_schema", "regex", "grammar"]
    source: str


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop.

    The cuts are applied in this order: top_k, top_p, min_p.

    Args:
        max_tokens: most tokens of the answer; None: as many as the context holds.
        temperature: 0, or less than 0.001, takes the likeliest token.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities add up to this share of what is left.
        min_p: keep the tokens that are at least this share as likely as the likeliest.
        seed: of the random draws.
        stop: texts that end the answer and are not part of it.
        stop_ids: token ids that end it, in addition to the checkpoint's.
        ignore_eos: do not end at the checkpoint's stop tokens.
        repetition_penalty: divides the scores of tokens that are in prompt or answer
            (Keskar et al. 2019).
        presence_penalty: subtracted once from the score of each token that is in the answer.
        frequency_penalty: the same, once for each occurrence.
        logit_bias: pairs of an id and a number that is added to its score.
        top_logprobs: how many of the likeliest tokens to report at each position.
        prompt_logprobs: report the log-probabilities of the prompt's tokens, and this many of
            the likeliest at each position; None reports nothing of the prompt.
        prompt_logprobs_from: index of the first prompt token to report. Tokens before the one that
            predicts it may come from the prefix cache.
        structure: a form that the answer must have.
        long_context: how the sequence is read; None: as its length, the engine's settings and
            the model's configuration require (`Admission.scalings_for`).

    Raises:
        OpenQwenError: a value is out of range.
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
    prompt_logprobs_from: int = 0
    structure: Structure | None = None
    long_context: "LongContext | None" = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken. Logits over a tiny temperature would overflow."""
        return self.temperature < 1e-3

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
            ("prompt_logprobs_from", self.prompt_logprobs_from >= 0, "0 or more"),
            ("stop", "" not in self.stop, "texts that are not empty"),
            (
                "logit_bias",
                all(i >= 0 and finite(b) for i, b in self.logit_bias),
                "ids of 0 or more, finite numbers",
            ),
        ):
            if not good:
                value = getattr(self, name)
                what = f"{name} cannot be {value}."
                raise OpenQwenError(what, where=f"sampling, {name}", do=f"give {wanted}")

    @cached_property
    def penalised(self) -> bool:
        """Whether scores depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def cut(self) -> bool:
        """Whether unlikely tokens are removed."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(eq=False)
class Output:
    """One answer.

    Args:
        text: the answer without control tokens and without the stop text.
        token_ids: the answer's tokens, without the token that ended it.
        logprobs: the log-probability of each of token_ids, under the model's own distribution.
        finish_reason: "stop" where a stop token or stop text ended it, "length" where a limit did.
        prompt_ids: the prompt's tokens.
        prompt_logprobs: if requested, the log-probability of each prompt token but the first, or
            of those from `Sampling.prompt_logprobs_from` on.
        stop_id: the token that ended the answer, if one did.
        versions: of each of token_ids, the version of the weights that computed it.
        drawn_logprobs: of each of token_ids, its log-probability under the distribution that it was
            drawn from, with penalties, temperature and cuts; empty if a server does not tell.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    stop_id: int | None = None
    versions: list[int] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)

    @property
    def written_ids(self) -> list[int]:
        """All tokens that the model wrote: `token_ids`, and the token that ended the answer."""
        return self.token_ids if self.stop_id is None else [*self.token_ids, self.stop_id]

    def detached(self) -> "Output":
        """The answer alone, if this is a request of an engine, which knows much more."""
        return Output(*(getattr(self, one.name) for one in fields(Output)))


class Continuation(NamedTuple):
    """Log-probabilities of a continuation's tokens, and whether each is the likeliest."""

    logprobs: list[float]
    greedy: bool


_GREEDY = Sampling()


class Generator(Protocol):
    """Answers prompts. `Engine` and `Endpoint` are generators."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = _GREEDY,
        seeds: Sequence[int] | None = None,
        progress: "Progress | None" = None,
    ) -> list[Output]:
        """Answer every prompt.

        Args:
            prompts: texts to continue, token ids to continue, or messages to answer.
            seeds: one for each prompt; None: derived from `sampling.seed` and each prompt's index.
            progress: advanced by 1 with each answer.

        Returns:
            One output for each prompt, in order.

        Raises:
            OpenQwenError: a prompt or the sampling cannot be used; nothing more is generated.
        """
        ...
