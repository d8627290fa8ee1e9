"""Records with a reward model's scores: conversations, preferences, and lists of answers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from openqwen.engine.score import RewardModel, criteria_scores
from openqwen.support.errors import OpenQwenError, located
from openqwen.support.records import Record
from openqwen.tokenizer.answers import encode_answer
from openqwen.tokenizer.messages import demonstration
from openqwen.train.conversations import encode_sides

REWARD, BY_CRITERION = "reward", "reward_by_criterion"  # fields of a scored record
SIDES = ("_chosen", "_rejected")  # what the fields of a preference end with
_PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
_Encoded = dict[str, list[list[int]]]  # the end of a field's name -> the ids of its answers


def score_records(
    model: RewardModel, records: Iterable[tuple[str, Record]], batch_tokens: int = 8_192
) -> Iterator[Record]:
    """Yield each record with the scores of its answers, in order.

    A conversation gets the field `reward`, a preference `reward_chosen` and `reward_rejected`,
    which are lists where `chosen` or `rejected` is a list of answers. With several criteria there
    are `reward_by_criterion` and so on too: {criterion: score}. An answer that is longer than the
    model's window has the reward None.

    Args:
        records: (place, record), as `read_records` yields them.
        batch_tokens: tokens that are collected before they are scored.

    Raises:
        OpenQwenError: a record has no answer to score, or a score is not finite.
    """
    batch: list[tuple[str, Record, _Encoded]] = []
    tokens = 0
    for where, record in records:
        sides = _encode(model, record, where)
        batch.append((where, record, sides))
        tokens += sum(len(ids) for answers in sides.values() for ids in answers)
        if tokens >= batch_tokens:
            yield from _score(model, batch, batch_tokens)
            batch, tokens = [], 0
    yield from _score(model, batch, batch_tokens)


def rewards(record: Record, end: str = "") -> list[float | None]:
    """The rewards of a scored record's answers. end: one of `SIDES` for a preference."""
    value = record[REWARD + end]
    return value if isinstance(value, list) else [value]


def _encode(model: RewardModel, record: Record, where: str) -> _Encoded:
    if any(record.get(name) is not None for name in _PREFERENCE):
        sides = zip(SIDES, encode_sides(model.tokenizer, record, where))
        return {end: [list(ids) for ids, _ in samples] for end, samples in sides}
    with located(where):
        messages, tools = demonstration(record)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            what = "A conversation to score must end with an assistant's answer."
            raise OpenQwenError(what, do="give messages that do, or chosen and rejected")
        return {"": [encode_answer(model.tokenizer, messages[:-1], messages[-1], tools)[0]]}


def _score(
    model: RewardModel, batch: list[tuple[str, Record, _Encoded]], batch_tokens: int
) -> Iterator[Record]:
    longest = model.scorer.config.max_position_embeddings
    every = [ids for _, _, sides in batch for answers in sides.values() for ids in answers]
    fitting = [ids for ids in every if len(ids) <= longest]
    scores_BC = criteria_scores(model.scorer, fitting, batch_tokens)
    if not scores_BC.isfinite().all():
        where = f"{batch[0][0]} to {batch[-1][0]}"
        raise OpenQwenError("The reward model gives scores that are not finite.", where)
    rows = iter(zip(model.scorer.reward(scores_BC).tolist(), scores_BC.tolist()))
    for _, given, sides in batch:
        record = dict(given)
        for end, answers in sides.items():
            found = [next(rows) if len(ids) <= longest else (None, []) for ids in answers]
            values: list[Any] = [reward for reward, _ in found]
            named: list[Any] = [dict(zip(model.scorer.criteria, scores)) for _, scores in found]
            # A side is a list of answers if the record's own is; see `answer_sides`.
            side = record.get(end.removeprefix("_"))
            several = isinstance(side, list) and not isinstance(side[0], Mapping)
            record[REWARD + end] = values if several else values[0]
            if len(model.scorer.criteria) > 1:
                record[BY_CRITERION + end] = named if several else named[0]
        yield record
