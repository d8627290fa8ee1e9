"""How good a reward model is, from scored preferences: accuracy, calibration, length bias."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from openqwen.evaluate.intervals import grouped_interval, wilson_interval
from openqwen.evaluate.scored_records import BY_CRITERION, REWARD, SIDES, rewards
from openqwen.support.records import Record
from openqwen.tokenizer.messages import answer_sides
from openqwen.train.comparisons import OVERALL, judgements

_BINS = 6  # of equally many pairs, in the calibration curve and by length


class ScoredPair(NamedTuple):
    """A chosen and a rejected answer, or two that are compared by a criterion.

    gap: score of the better one − score of the other. longer: the same of their lengths, in
    characters. kind: the pair's task or RewardBench's subset.
    """

    prompt: str
    kind: str
    criterion: str
    gap: float
    longer: int

    @property
    def right(self) -> float:
        """1 where the better answer scores higher, 0.5 for a tie."""
        return 0.5 if self.gap == 0 else float(self.gap > 0)


def reward_report(records: Iterable[Record]) -> dict[str, Any]:
    """Statistics of scored preferences (see `score_records`); empty where there is no pair.

    Returns:
        pair_accuracy: share of pairs whose chosen answer scores higher; a tie counts half.
            pair_accuracy_low, pair_accuracy_high: its 95 % interval, which takes account of pairs
            that share a prompt. pair_accuracy_n: how many pairs.
        list_accuracy: share of records whose highest score is a chosen answer's.
        pair_accuracy_by_task, by_criterion: name -> {"accuracy", "low", "high", "n"}.
        calibration: {"predicted", "accuracy", "low", "high", "n"} of pairs by the probability
            σ(|gap|) that the model gives to its own ranking. calibration_error: the mean of
            |predicted − accuracy|.
        by_length: {"from", "to", "accuracy", "low", "high", "n"} of pairs by how many characters
            the chosen answer is longer than the rejected one.
        prefers_longer, chosen_longer: of the pairs whose lengths differ, the share whose longer
            answer scores higher, and the share whose longer answer is the chosen one.
    """
    every: list[ScoredPair] = []
    best: list[float] = []
    for record in records:
        if REWARD + SIDES[0] not in record:  # a conversation
            continue
        every += scored_pairs(record)
        best += _best_is_chosen(record)
    pairs = [pair for pair in every if pair.criterion == OVERALL]
    if not pairs:
        return {}
    total = _accuracy(pairs)
    report: dict[str, Any] = {"pair_accuracy": total.pop("accuracy")}
    report |= {f"pair_accuracy_{name}": value for name, value in total.items()}
    if best:
        report["list_accuracy"] = mean(best)
    report["pair_accuracy_by_task"] = _by(pairs, lambda pair: pair.kind)
    named = [pair for pair in every if pair.criterion != OVERALL]
    report["by_criterion"] = _by(named, lambda pair: pair.criterion)

    bins = []
    for part in _bins(pairs, lambda pair: abs(pair.gap)):
        predicted = mean(1 / (1 + math.exp(-abs(pair.gap))) for pair in part)
        bins.append({"predicted": predicted, **_accuracy(part)})
    report["calibration"] = bins
    error = sum(b["n"] * abs(b["predicted"] - b["accuracy"]) for b in bins)
    report["calibration_error"] = error / len(pairs)

    by_length = _bins(pairs, lambda pair: pair.longer)
    report["by_length"] = [
        {"from": part[0].longer, "to": part[-1].longer, **_accuracy(part)} for part in by_length
    ]
    unequal = [pair for pair in pairs if pair.longer]
    if unequal:
        agreed = [pair.right if pair.longer > 0 else 1 - pair.right for pair in unequal]
        report["prefers_longer"] = mean(agreed)
        report["chosen_longer"] = mean(float(pair.longer > 0) for pair in unequal)
    return report


def scored_pairs(record: Record) -> list[ScoredPair]:
    """The comparisons of a scored preference, of all answers that have a score."""
    answers, origin = answer_sides(record), record.get("origin") or {}
    kind = str(record.get("subset") or origin.get("task") or "other")
    prompt = hashlib.sha256(str(answers.prompt).encode()).hexdigest()[:16]
    criteria = list(record.get("criteria") or {})
    said = judgements(record, criteria, "a scored record")
    sides = [
        [(scores, len(message["content"])) for scores, message in zip(_scores(record, end), side)]
        for end, side in zip(SIDES, (answers.chosen, answers.rejected))
    ]
    pairs = []
    for pair in product(*sides):
        for criterion, better, _ in said if all(scores for scores, _ in pair) else ():
            name = OVERALL if criterion < 0 else criteria[criterion]
            (good, good_length), (bad, bad_length) = pair[better], pair[1 - better]
            gap = good.get(name, good[OVERALL]) - bad.get(name, bad[OVERALL])
            pairs.append(ScoredPair(prompt, kind, name, gap, good_length - bad_length))
    return pairs


def _scores(record: Record, end: str) -> list[dict[str, float]]:
    """The scores of each answer of a side by criterion, empty for one without scores."""
    given = rewards(record, end)
    named = record.get(BY_CRITERION + end) or {}
    named = named if isinstance(named, list) else [named] * len(given)
    return [{} if x is None else {**by, OVERALL: x} for x, by in zip(given, named)]


def _best_is_chosen(record: Record) -> list[float]:
    """[1] where a chosen answer has the highest score, [0.5] for a tie, [] without all scores."""
    chosen, rejected = (
        [-math.inf if x is None else x for x in rewards(record, end)] for end in SIDES
    )
    if -math.inf in [*chosen, *rejected]:
        return []
    return [0.5 if max(chosen) == max(rejected) else float(max(chosen) > max(rejected))]


def _accuracy(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """The share of pairs that are ranked right, with the wider one of two intervals at each end."""
    right = [pair.right for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    lows, highs = zip(wilson_interval(sum(right), len(right)), grouped_interval(right, prompts))
    return {"accuracy": mean(right), "low": min(lows), "high": max(highs), "n": len(right)}


def _by(
    pairs: Sequence[ScoredPair], name: Callable[[ScoredPair], str]
) -> dict[str, dict[str, float]]:
    names = sorted({name(pair) for pair in pairs})
    return {each: _accuracy([pair for pair in pairs if name(pair) == each]) for each in names}


def _bins(
    pairs: Sequence[ScoredPair], value: Callable[[ScoredPair], float]
) -> list[list[ScoredPair]]:
    """The pairs in order of a value, in bins of equally many."""
    ordered = sorted(pairs, key=value)
    parts = np.array_split(np.arange(len(ordered)), min(_BINS, len(ordered)))
    return [[ordered[i] for i in part] for part in parts]
