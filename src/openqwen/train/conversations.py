"""Conversations to token ids and targets: only what the assistant wrote is learned, its
`<|im_end|>` included.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from torch import Tensor

from openqwen.support.errors import OpenQwenError, located
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.messages import (
    Message,
    Tools,
    demonstration,
    is_learned,
    preference,
    prompt,
)
from openqwen.train.rows import Sample

Messages = list[dict[str, Any]]
TooLong = Literal["leave out", "truncate", "refuse"]


def _ending(ids: Sequence[int], mask: Sequence[int]) -> int:
    """One past the last learned token: the newline after the last `<|im_end|>` predicts nothing."""
    return len(mask) - next((n for n, learned in enumerate(reversed(mask)) if learned), len(mask))


def encode_demonstration(tokenizer: Tokenizer, record: dict[str, Any], where: str) -> Sample:
    """A demonstration in any form: every assistant turn is learned, but those marked otherwise."""
    with located(where):
        messages, tools = demonstration(record)
        ids, mask = tokenizer.encode_chat(messages, tools=tools)
        mask = _without_unlearned(messages, mask)
        end = _ending(ids, mask)
        if end == 0:
            raise OpenQwenError(
                "No assistant turn to learn from.", do="give messages with an assistant turn"
            )
        return ids[:end], mask[:end]


def _without_unlearned(messages: Messages, mask: list[int]) -> list[int]:
    """The mask without the turns that the record marks as not to be learned."""
    wanted = [is_learned(message) for message in messages if message["role"] == "assistant"]
    if all(wanted):
        return mask
    runs = [(learned, len(list(run))) for learned, run in groupby(mask)]
    if sum(learned for learned, _ in runs) != len(wanted):
        raise OpenQwenError(
            (
                "This chat template does not give each assistant message a turn, so that one "
                "cannot be left out."
            ),
            do="leave out weight, loss and train",
        )
    turns = iter(wanted)
    return [
        value for learned, count in runs for value in [int(bool(learned) and next(turns))] * count
    ]


def says_nothing(record: dict[str, Any]) -> bool:
    """Whether an assistant's turn is blank and calls no tool: it teaches to stop at once."""
    said = (
        m for m in demonstration(record)[0] if m["role"] == "assistant" and not m.get("tool_calls")
    )
    return any(not m["content"].strip() for m in said)


def encode_prompt(tokenizer: Tokenizer, record: dict[str, Any], where: str) -> list[int]:
    """The ids of a prompt in any form, up to where the answer begins."""
    with located(where):
        messages, tools = prompt(record)
        return tokenizer.encode_chat(messages, add_generation_prompt=True, tools=tools)[0]


def encode_answer(
    tokenizer: Tokenizer,
    asked: Messages,
    reply: Message,
    tools: Tools = None,
    sampled: Sequence[int] = (),
) -> Sample:
    """A prompt and one answer to it: only the answer is learned.

    The prompt is encoded as the engine encodes it, so that the answer's log-probability is the one
    it was sampled at.
    sampled: the ids that the answer was sampled as, its end token among them; they count where they
    say the same text.
    """
    start, _ = tokenizer.encode_chat(asked, add_generation_prompt=True, tools=tools)
    # Another tokenizer would read other words in these ids.
    if sampled and tokenizer.decode(sampled).strip() == reply["content"].strip():
        return start + list(sampled), [0] * len(start) + [1] * len(sampled)
    ids, mask = tokenizer.encode_chat([*asked, reply], tools=tools)
    end = _ending(ids, mask)
    if ids[: len(start)] == start:
        return ids[:end], [0] * len(start) + mask[len(start) : end]
    # A newline that opens the answer can merge with the template's own; the engine would never see
    # that token.
    end_token = [
        i for i in ids[end - 1 : end] if tokenizer.is_hidden(i)
    ]  # that the template writes
    written = tokenizer.encode(reply["content"]) + end_token
    return start + written, [0] * len(start) + [1] * len(written)


def encode_preference(
    tokenizer: Tokenizer, record: dict[str, Any], where: str
) -> tuple[Sample, Sample]:
    """A preference in any form: the chosen and the rejected answer."""
    with located(where):
        asked, chosen, rejected, tools = preference(record)
        return (
            encode_answer(tokenizer, asked, chosen, tools, _sampled(record, "chosen")),
            encode_answer(tokenizer, asked, rejected, tools, _sampled(record, "rejected")),
        )


def _sampled(record: dict[str, Any], side: str) -> list[int]:
    """The ids that `openqwen prefer` sampled for a side, where the record tells them."""
    ids = origin(record).get(f"{side}_ids")
    return ids if isinstance(ids, list) and all(isinstance(i, int) for i in ids) else []


def origin(record: dict[str, Any]) -> dict[str, Any]:
    """How a record came to be, as far as it tells."""
    told = record.get("origin")
    return told if isinstance(told, dict) else {}


@dataclass
class PreferenceGroup:
    """A prompt and different answers to it, as token ids. pairs: numbers of a chosen and a rejected
    answer.
    """

    prompt: list[int]
    answers: list[list[int]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens, the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))

    def add(self, chosen: list[int], rejected: list[int]) -> None:
        """Add a pair, once."""
        numbers = []
        for answer in (chosen, rejected):
            if answer not in self.answers:
                self.answers.append(answer)
            numbers.append(self.answers.index(answer))
        if (found := (numbers[0], numbers[1])) not in self.pairs:
            self.pairs.append(found)

    def to_first_difference(self) -> "PreferenceGroup":
        """The same pairs, each answer cut behind the first token at which the two differ.

        Rafailov's loss on "begins like this" in place of "is this". As in Step-DPO (Lai et al.
        2024) the common beginning cancels, and what a wrong answer holds behind its first error is
        neither praised nor blamed.
        """
        cut = PreferenceGroup(self.prompt)
        for chosen, rejected in ((self.answers[c], self.answers[r]) for c, r in self.pairs):
            end = next(
                (n for n, (a, b) in enumerate(zip(chosen, rejected), 1) if a != b),
                len(chosen) + len(rejected),
            )
            cut.add(chosen[:end], rejected[:end])
        return cut


def group_by_prompt(pairs: Iterable[tuple[Sample, Sample]]) -> list[PreferenceGroup]:
    """Pairs of (prompt with chosen answer, prompt with rejected answer), gathered by prompt, in
    order.
    """
    groups: dict[tuple[int, ...], PreferenceGroup] = {}
    for (chosen, mask), (rejected, _) in pairs:
        start = list(mask).index(1)
        group = groups.setdefault(tuple(chosen[:start]), PreferenceGroup(list(chosen[:start])))
        group.add(list(chosen[start:]), list(rejected[start:]))
    return list(groups.values())


def pair_indices(groups: Sequence[PreferenceGroup]) -> Tensor:
    """Numbers of the chosen and the rejected answer of every pair, counted over all groups: [pairs,
    2].
    """
    starts = accumulate((len(group.answers) for group in groups), initial=0)
    return torch.tensor(
        [(start + c, start + r) for start, group in zip(starts, groups) for c, r in group.pairs]
    )


def fit(sample: Sample, limit: int, too_long: TooLong, where: str) -> Sample | None:
    """The sample where it has at most `limit` tokens; else what is chosen: None, its first turns
    that fit, an error.

    A truncated conversation ends with an assistant's turn; where not even the first fits, it is
    left out.
    """
    ids, mask = sample
    if len(ids) <= limit or too_long == "leave out":
        return sample if len(ids) <= limit else None
    if too_long == "refuse":
        raise OpenQwenError(
            f"This conversation has {len(ids)} tokens, and {limit} fit.",
            where=where,
            do="raise max_length, or shorten it",
        )
    end = next((e for e in range(limit, 0, -1) if mask[e - 1] and not mask[e]), 0)
    return (ids[:end], mask[:end]) if end else None


def fitting(samples: list[Any], lengths: list[int], limit: int, where: str) -> list[Any]:
    """Samples no longer than `limit` tokens; none left is an error that names the shortest."""
    if not samples:
        raise OpenQwenError("There are no records.", where=where, do="give a file with some")
    kept = [s for s, n in zip(samples, lengths) if n <= limit]
    if not kept:
        raise OpenQwenError(
            (
                f"None of the {len(samples)} records fits in {limit} tokens (the shortest has "
                f"{min(lengths)})."
            ),
            where=where,
            do="raise max_length",
        )
    return kept
