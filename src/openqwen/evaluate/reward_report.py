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
    """Two answers of which one is better by a criterion.

    prompt: its digest. kind: the task, or RewardBench's subset. gap: score of the better answer −
    score of the other. longer: the same of their lengths, in characters.
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

    Rows are {"accuracy", "low", "high", "n"}: the share of n pairs that are ranked right, where a
    tie counts half, and its 95 % interval, which takes account of pairs that share a prompt.

    Returns:
        pair_accuracy, pair_accuracy_low, _high, _n: the row of all pairs.
        list_accuracy: the share of prompts of which all pairs are ranked right.
        pair_accuracy_by_task, by_criterion: name -> row.
        calibration: rows by "predicted", the probability σ(|gap|) that the model gives to its own
            ranking. calibration_error: the mean of |predicted − accuracy|.
        by_length: rows by how many characters the chosen answer is longer, "from" and "to".
        prefers_longer, chosen_longer: of the pairs whose lengths differ, the share whose longer
            answer scores higher, and the share whose longer answer is the chosen one.
    """
    every = [pair for record in records for pair in scored_pairs(record)]
    pairs = [pair for pair in every if pair.criterion == OVERALL]
    if not pairs:
        return {}
    total = _row(pairs)
    report: dict[str, Any] = {"pair_accuracy": total.pop("accuracy")}
    report |= {f"pair_accuracy_{name}": value for name, value in total.items()}
    lists = _groups(pairs, lambda pair: pair.prompt).values()
    report["list_accuracy"] = mean(min(pair.right for pair in group) for group in lists)
    kinds = _groups(pairs, lambda pair: pair.kind)
    report["pair_accuracy_by_task"] = {name: _row(group) for name, group in kinds.items()}
    named = _groups([p for p in every if p.criterion != OVERALL], lambda pair: pair.criterion)
    report["by_criterion"] = {name: _row(group) for name, group in named.items()}

    bins = []
    for part in _bins(pairs, lambda pair: abs(pair.gap)):
        predicted = mean(1 / (1 + math.exp(-abs(pair.gap))) for pair in part)
        bins.append({"predicted": predicted, **_row(part)})
    report["calibration"] = bins
    error = sum(b["n"] * abs(b["predicted"] - b["accuracy"]) for b in bins)
    report["calibration_error"] = error / len(pairs)

    parts = _bins(pairs, lambda pair: pair.longer)
    report["by_length"] = [
        {"from": part[0].longer, "to": part[-1].longer, **_row(part)} for part in parts
    ]
    if unequal := [pair for pair in pairs if pair.longer]:
        agreed = [pair.right if pair.longer > 0 else 1 - pair.right for pair in unequal]
        report["prefers_longer"] = mean(agreed)
        report["chosen_longer"] = mean(float(pair.longer > 0) for pair in unequal)
    return report


def scored_pairs(record: Record) -> list[ScoredPair]:
    """The pairs of a scored preference, of all answers that have a score."""
    if REWARD + SIDES[0] not in record:  # a conversation
        return []
    answers, origin = answer_sides(record), record.get("origin") or {}
    kind = str(record.get("subset") or origin.get("task") or "other")
    prompt = hashlib.sha256(str(answers.prompt).encode()).hexdigest()[:16]
    criteria = list(record.get("criteria") or {})
    said = judgements(record, criteria, "a scored record")
    sides = []
    for end, side in zip(SIDES, (answers.chosen, answers.rejected)):
        given, named = rewards(record, end), record.get(BY_CRITERION + end) or {}
        named = named if isinstance(named, list) else [named] * len(given)
        lengths = [len(message["content"]) for message in side]
        sides.append([answer for answer in zip(given, named, lengths) if answer[0] is not None])
    pairs = []
    for pair, (criterion, better, _) in product(product(*sides), said):
        name = OVERALL if criterion < 0 else criteria[criterion]
        (good, good_by, good_length), (bad, bad_by, bad_length) = pair[better], pair[1 - better]
        gap = good_by.get(name, good) - bad_by.get(name, bad)
        pairs.append(ScoredPair(prompt, kind, name, gap, good_length - bad_length))
    return pairs


def _row(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """The share that is ranked right, with the wider one of two intervals at each end."""
    right = [pair.right for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    lows, highs = zip(wilson_interval(sum(right), len(right)), grouped_interval(right, prompts))
    return {"accuracy": mean(right), "low": min(lows), "high": max(highs), "n": len(right)}


def _groups(
    pairs: Sequence[ScoredPair], name: Callable[[ScoredPair], str]
) -> dict[str, list[ScoredPair]]:
    groups: dict[str, list[ScoredPair]] = {}
    for pair in sorted(pairs, key=name):
        groups.setdefault(name(pair), []).append(pair)
    return groups


def _bins(
    pairs: Sequence[ScoredPair], value: Callable[[ScoredPair], float]
) -> list[list[ScoredPair]]:
    """The pairs in order of a value, in bins of equally many."""
    ordered = sorted(pairs, key=value)
    parts = np.array_split(np.arange(len(ordered)), min(_BINS, len(ordered)))
    return [[ordered[i] for i in part] for part in parts]
