"""Records to token ids and targets.

Targets are what the assistant wrote, with the token that ends its turn (`<|im_end|>` or what the
template prints).
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openqwen.support.errors import OpenQwenError, located
from openqwen.support.records import Record
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.answers import encode_answer, end_of_targets
from openqwen.tokenizer.messages import (
    answer_sides,
    demonstration,
    is_learned,
    preference,
    prompt,
)
from openqwen.train.packed_batch import Sample

Messages = list[dict[str, Any]]
TooLong = Literal["leave out", "truncate", "refuse"]


def encode_demonstration(tokenizer: Tokenizer, record: Record, where: str) -> Sample:
    """The conversation of a record in any form; its targets are the assistant's turns.

    Turns that the record marks as not to be learned are no targets. The sample ends with its last
    target. Raises OpenQwenError, which names `where`, if there is no target.
    """
    with located(where):
        messages, tools = demonstration(record)
        ids, mask = tokenizer.encode_chat(messages, tools=tools)
        mask = _without_unlearned(messages, mask)
        end = end_of_targets(mask)
        if end == 0:
            raise OpenQwenError(
                "No assistant turn to learn from.", do="give messages with an assistant turn"
            )
        return ids[:end], mask[:end]


def _without_unlearned(messages: Messages, mask: list[int]) -> list[int]:
    """The mask with 0 in the turns that the record marks as not to be learned."""
    wanted = [is_learned(message) for message in messages if message["role"] == "assistant"]
    if all(wanted):
        return mask
    runs = [(learned, len(list(run))) for learned, run in groupby(mask)]
    if sum(learned for learned, _ in runs) != len(wanted):
        raise OpenQwenError(
            "This chat template does not give each assistant message a turn, so that one cannot be"
            " left out.",
            do="leave out weight, loss and train",
        )
    turns = iter(wanted)
    kept: list[int] = []
    for learned, count in runs:
        kept += [int(next(turns)) if learned else 0] * count
    return kept


def says_nothing(record: Record) -> bool:
    """Whether an assistant's turn is blank and calls no tool: it teaches to stop at once."""
    for message in demonstration(record)[0]:
        blank = not message["content"].strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and blank:
            return True
    return False


def encode_prompt(tokenizer: Tokenizer, record: Record, where: str) -> list[int]:
    """The ids of a prompt in any form, up to where the answer begins."""
    with located(where):
        messages, tools = prompt(record)
        return tokenizer.encode_chat(messages, add_generation_prompt=True, tools=tools)[0]


def encode_preference(tokenizer: Tokenizer, record: Record, where: str) -> tuple[Sample, Sample]:
    """A preference in any form: the prompt with the chosen answer, and with the rejected one."""
    with located(where):
        asked, chosen, rejected, tools = preference(record)
        return (
            encode_answer(tokenizer, asked, chosen, tools, _sampled_ids(record, "chosen")),
            encode_answer(tokenizer, asked, rejected, tools, _sampled_ids(record, "rejected")),
        )


def encode_sides(
    tokenizer: Tokenizer, record: Record, where: str
) -> tuple[list[Sample], list[Sample]]:
    """The same for a record whose sides may each be a list of answers: all chosen, all rejected."""
    with located(where):
        sides = answer_sides(record)
        samples: list[list[Sample]] = []
        for name, replies in (("chosen", sides.chosen), ("rejected", sides.rejected)):
            sampled = _sampled_ids(record, name)
            samples.append(
                [encode_answer(tokenizer, sides.prompt, r, sides.tools, sampled) for r in replies]
            )
        return samples[0], samples[1]


def _sampled_ids(record: Record, side: str) -> list[int]:
    """The ids that `openqwen prefer` sampled for a side, empty where the record has none."""
    ids = origin(record).get(f"{side}_ids")
    return ids if isinstance(ids, list) and all(isinstance(i, int) for i in ids) else []


def origin(record: Record) -> dict[str, Any]:
    """How a record came to be; empty where it does not say."""
    given = record.get("origin")
    return given if isinstance(given, dict) else {}


def whole_turns(mask: np.ndarray, limit: int) -> int:
    """Tokens of the first turns, at most `limit`, up to the end of an assistant's turn.

    mask: which tokens are targets, [tokens], more than `limit`. 0 where not even one turn fits.
    """
    ends = np.flatnonzero(mask[:limit] & ~mask[1 : limit + 1]) + 1
    return int(ends[-1]) if len(ends) else 0


def check_some_fit(lengths: Sequence[int] | np.ndarray, limit: int, where: str | Path) -> None:
    """Raise OpenQwenError if there are no records, or if none has at most `limit` tokens."""
    if not len(lengths):
        raise OpenQwenError("There are no records.", where=where, do="give a file with some")
    if min(lengths) > limit:
        raise OpenQwenError(
            f"None of the {len(lengths)} records fits in {limit} tokens (the shortest has"
            f" {min(lengths)}).",
            where=where,
            do="raise max_length",
        )
