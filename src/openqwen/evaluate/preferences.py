"""Preferences: how often a scorer agrees with given pairs, and how often one set of answers beats
another.
"""

from collections.abc import Callable, Sequence
from typing import Any

from openqwen.evaluate.intervals import grouped_interval, wilson_interval

Message = dict[str, str]
Score = Callable[
    [list[list[Message]]], list[float]
]  # conversations → one number each, higher is better

NEAR = 1.0  # a wrong answer drawn at no more than this temperature is a near miss


def near_misses(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hard ones: the wrong answer is the model's own, drawn at a temperature of `NEAR` at
    most.
    """
    return [pair for pair in pairs if pair["origin"].get("temperature", NEAR + 1) <= NEAR]


def pair_accuracy(score: Score, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often `score` puts the chosen answer above the rejected one; a tie counts half.

    pairs: preferences P. Returns {"pair_accuracy", "pair_accuracy_low", "pair_accuracy_high" (95
    %), "n", "pair_accuracy_by_task": {task: {"accuracy", "n"}}}. Pairs of one prompt are not
    independent: the interval knows it.
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
    """Share of places where A's score is above B's, ties counting half, with a 95 % interval.

    The scores may be a reward model's, or 1 and 0 of a check. Returns {"win_rate", "low", "high",
    "ties", "n"}.
    """
    if not scores_a:
        raise ValueError("no answers to compare")
    wins = [_win(a, b) for a, b in zip(scores_a, scores_b, strict=True)]
    low, high = wilson_interval(sum(wins), len(wins))
    rate = sum(wins) / len(wins)
    return {"win_rate": rate, "low": low, "high": high, "ties": wins.count(0.5), "n": len(wins)}


def _win(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)
