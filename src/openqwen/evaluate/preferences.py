"""Near misses among preference pairs, and the win rate of one set of answers."""

import math
from collections.abc import Sequence
from typing import Any

from openqwen.evaluate.intervals import wilson_interval

_CORRECTNESS = {"correctness": 1}
_NEAR = 1.0  # a wrong answer sampled at this temperature or below is a near miss


def near_misses(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hard pairs, whose wrong answer was sampled from the model at temperature 1 or below.

    Pairs that differ in more than correctness, or in another criterion, are none.
    """
    wrong = [p for p in pairs if p.get("criteria", _CORRECTNESS) == _CORRECTNESS]
    return [pair for pair in wrong if pair["origin"].get("temperature", math.inf) <= _NEAR]


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float]) -> dict[str, float]:
    """How often A's score is above B's, with a 95 % interval; a tie counts half.

    The scores may be a reward model's, or 1 and 0 of a grader.

    Returns:
        {"win_rate", "low", "high", "ties", "n"}.
    """
    if not scores_a:
        raise ValueError("no answers to compare")
    wins = [_win(a, b) for a, b in zip(scores_a, scores_b, strict=True)]
    low, high = wilson_interval(sum(wins), len(wins))
    rate = sum(wins) / len(wins)
    return {"win_rate": rate, "low": low, "high": high, "ties": wins.count(0.5), "n": len(wins)}


def _win(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)
