"""Accuracy of a scorer on preference pairs, and the win rate of one set of answers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from openqwen.evaluate.intervals import grouped_interval, wilson_interval

# Conversations (lists of messages) → one score each; higher is better.
ScoreFunction = Callable[[list[list[dict[str, str]]]], list[float]]

_NEAR = 1.0  # a wrong answer sampled at this temperature or below is a near miss


def near_misses(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hard pairs, whose wrong answer was sampled from the model at temperature 1 or below."""
    return [pair for pair in pairs if pair["origin"].get("temperature", math.inf) <= _NEAR]


def pair_accuracy(score: ScoreFunction, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often `score` puts the chosen answer above the rejected one; a tie counts half.

    pairs: preferences P.

    Returns:
        {"pair_accuracy", "pair_accuracy_low", "pair_accuracy_high", "n", "pair_accuracy_by_task":
        {task: {"accuracy", "n"}}}. The 95 % interval takes account of pairs that share a prompt.
    """
    if not pairs:
        raise ValueError("no pairs to score")
    chosen = [pair["prompt"] + pair["chosen"] for pair in pairs]
    rejected = [pair["prompt"] + pair["rejected"] for pair in pairs]
    scores = score(chosen + rejected)
    wins = [_win(a, b) for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]
    by_task: dict[str, list[float]] = {}
    for pair, win in zip(pairs, wins):
        by_task.setdefault(pair["origin"].get("task", "other"), []).append(win)
    prompts = [str(pair["prompt"]) for pair in pairs]
    low, high = grouped_interval(wins, prompts)
    return {
        "pair_accuracy": sum(wins) / len(wins),
        "pair_accuracy_low": low,
        "pair_accuracy_high": high,
        "n": len(wins),
        "pair_accuracy_by_task": {
            task: {"accuracy": sum(won) / len(won), "n": len(won)}
            for task, won in sorted(by_task.items())
        },
    }


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
