"""BLEU of a benchmark of translations: of each direction as a whole, then the mean over them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openqwen.support.generators import Generators
from openqwen.tasks.translation import bleu, counts

_DRAWS = 1_000  # of the bootstrap (Koehn 2004)


def bleu_scores(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The scores of graded translations.

    rows: with "id", "category" (the direction), "answer" and "reference"; what was extracted from
    an answer is "extracted", and an answer without a result counts as an empty one.

    Returns:
        score, standard_error, low and high (95 %, sentences drawn with replacement within each
        direction) from 0 to 1, and categories with the same and n.
    """
    directions: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        directions.setdefault(row["category"], []).append(row)
    draw = Generators(seed)["bleu"]
    scores, drawn, categories = [], np.zeros(_DRAWS), {}
    for name, group in sorted(directions.items()):
        sentences = np.array([counts(_said(row), row["reference"]) for row in group])
        score = bleu(sentences.sum(0))
        # How often each sentence is drawn: the sums of all draws are one product.
        times = draw.multinomial(len(group), np.full(len(group), 1 / len(group)), size=_DRAWS)
        resampled = np.array([bleu(total) for total in times @ sentences])
        scores.append(score)
        drawn += resampled
        categories[name] = _interval(score, resampled) | {"n": len({row["id"] for row in group})}
    found: dict[str, Any] = _interval(float(np.mean(scores)), drawn / len(directions))
    return found | {"categories": categories if len(categories) > 1 else {}}


def _said(row: Mapping[str, Any]) -> str:
    if row["status"] == "no_answer":
        return ""
    return str(row.get("extracted", row["answer"])).strip()


def _interval(score: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    error = float(drawn.std(ddof=1))
    # Repeated sentences shorten the tail of rare n-grams, so the draws may all lie on one side.
    bounds = {"low": min(score, float(low)), "high": max(score, float(high))}
    return {"score": score, "standard_error": error, **bounds}
