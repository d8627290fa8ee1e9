"""A small classifier of documents, distilled from a model's ratings (FineWeb-Edu's method).

Qwen2 and Qwen2.5 let instruct models rate documents along several dimensions. Rating all of a
corpus costs a forward pass of a large model for each document. So a few thousand documents are
rated, and a linear model on hashed words and pairs of words learns to rate the rest, at megabytes a
second. Its agreement with ratings that it did not see is part of the result.

Shapes: N documents, F features, C dimensions of quality.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file, save_file

from openqwen.corpus.words import hash_words
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json
from openqwen.support.progress import notice
from openqwen.support.records import read_records
from openqwen.support.settings import Settings
from openqwen.support.stage import Effort, Stage, StageRun
from openqwen.tokenizer.fast import text_batches

WEIGHTS, ABOUT = "quality.safetensors", "quality.json"
_LEAST_RATINGS = 20
_ITERATIONS = 100


class QualityConfig(Settings):
    """How the classifier is trained."""

    bits: int = Field(18, ge=8, le=24, description="log2 of the number of hashed features")
    characters: int = Field(20_000, gt=0, description="characters of a document that are read")
    regularization: float = Field(1.0, gt=0, description="weight of the squared norm (ridge)")
    heldout: float = Field(0.2, gt=0, lt=1, description="share of the ratings held out, to check")
    threshold: float = Field(
        3.0, description="a rating from here on is good; for the precision and recall of a filter"
    )


class Features(NamedTuple):
    """A sparse matrix [N, F]: the columns and values of each row, laid end to end.

    first: [N + 1], where the entries of each row begin.
    """

    columns: np.ndarray
    values: np.ndarray
    first: np.ndarray

    def dot(self, weights_F: np.ndarray) -> np.ndarray:
        """The product with a vector, [N]."""
        sums = np.concatenate([[0.0], np.cumsum(self.values * weights_F[self.columns])])
        return sums[self.first[1:]] - sums[self.first[:-1]]

    def transposed_dot(self, values_N: np.ndarray, size: int) -> np.ndarray:
        """The product of the transposed matrix with a vector, [F]; size: F."""
        spread = np.repeat(values_N, np.diff(self.first))
        return np.bincount(self.columns, weights=self.values * spread, minlength=size)


def features(texts: Sequence[str], bits: int, characters: int) -> Features:
    """Hashed words and pairs of neighbours: log(1 + count), each row of length 1.

    The hash of a word says its column, so no vocabulary has to be kept.
    """
    words = hash_words([text[:characters] for text in texts], all_scripts=True)
    shift = np.uint64(64 - bits)
    row = np.repeat(np.arange(len(texts)), np.diff(words.first))
    pairs = words.starts(2)
    cells = np.concatenate(
        [
            row << bits | (words.hashes >> shift).astype(np.int64),
            row[pairs] << bits | (words.ngrams(2)[pairs] >> shift).astype(np.int64),
        ]
    )
    cells, counts = np.unique(cells, return_counts=True)
    values, rows = np.log1p(counts), cells >> bits
    first = np.searchsorted(rows, np.arange(len(texts) + 1))
    norms = np.sqrt(np.bincount(rows, weights=values**2, minlength=len(texts)))
    return Features(cells & ((1 << bits) - 1), values / norms[rows], first)


def all_features(texts: Iterable[str], bits: int, characters: int) -> Features:
    """As `features`, in batches: the hashes of all words at once would not fit into memory."""
    parts = [features(batch, bits, characters) for batch in text_batches(texts)]
    counts = np.concatenate([np.diff(part.first) for part in parts])
    first = np.concatenate([[0], np.cumsum(counts)])
    columns, values = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return Features(columns, values, first)


@dataclass(frozen=True)
class QualityClassifier:
    """Ratings of documents by a linear model.

    Args:
        dimensions: their C names.
        weights_CF: float32.
        offsets_C: the mean rating of each dimension.
        low, high: the ratings that occurred; scores stay between them.
        bits, characters: as in `features`.
    """

    dimensions: tuple[str, ...]
    weights_CF: np.ndarray
    offsets_C: np.ndarray
    low: float
    high: float
    bits: int
    characters: int

    def scores(self, texts: Iterable[str]) -> Iterator[dict[str, float]]:
        """The rating of each text by dimension, in order."""
        for batch in text_batches(texts):
            scores_NC = self._scores(features(batch, self.bits, self.characters))
            for row in scores_NC.tolist():
                yield dict(zip(self.dimensions, row, strict=True))

    def _scores(self, rows: Features) -> np.ndarray:
        columns = [rows.dot(weights_F) for weights_F in self.weights_CF]
        return np.clip(np.stack(columns, axis=1) + self.offsets_C, self.low, self.high)

    @classmethod
    def fit(
        cls, texts: Sequence[str], ratings: Sequence[Mapping[str, float]], config: QualityConfig
    ) -> "QualityClassifier":
        """Ridge regression on the ratings of each dimension, by conjugate gradients."""
        dimensions = tuple(sorted(ratings[0]))
        rated_NC = np.array([[row[name] for name in dimensions] for row in ratings], np.float64)
        offsets_C = rated_NC.mean(0)
        rows = all_features(texts, config.bits, config.characters)
        weights = [
            _ridge(rows, rated_N - offset, 1 << config.bits, config.regularization)
            for rated_N, offset in zip(rated_NC.T, offsets_C, strict=True)
        ]
        low, high = float(rated_NC.min()), float(rated_NC.max())
        matrix = np.stack(weights).astype(np.float32)
        return cls(dimensions, matrix, offsets_C, low, high, config.bits, config.characters)

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the weights, and a JSON file that says what they are."""
        tensors = {"weights": self.weights_CF, "offsets": self.offsets_C.astype(np.float32)}
        save_file(tensors, folder / WEIGHTS)
        sizes = {"bits": self.bits, "characters": self.characters}
        range_ = {"low": self.low, "high": self.high}
        write_json(folder / ABOUT, {"dimensions": self.dimensions, **sizes, **range_, **about})

    @classmethod
    def load(cls, folder: Path) -> "QualityClassifier":
        """Read what `save` wrote. Raises OpenQwenError where the folder holds no classifier."""
        if not (folder / ABOUT).is_file():
            do = "give the output folder of `openqwen quality`"
            raise OpenQwenError(f"There is no {ABOUT}.", folder, do)
        about, tensors = read_json(folder / ABOUT), load_file(folder / WEIGHTS)
        sizes = (about[key] for key in ("low", "high", "bits", "characters"))
        return cls(tuple(about["dimensions"]), tensors["weights"], tensors["offsets"], *sizes)


def _ridge(rows: Features, target_N: np.ndarray, size: int, weight: float) -> np.ndarray:
    """Minimise |X w − y|² + weight |w|² by conjugate gradients on the normal equations, [F]."""
    solution_F = np.zeros(size)
    residual_F = rows.transposed_dot(target_N, size)
    direction_F, square = residual_F.copy(), float(residual_F @ residual_F)
    end = 1e-12 * square
    for _ in range(_ITERATIONS):
        if square <= end:
            break
        image_F = rows.transposed_dot(rows.dot(direction_F), size) + weight * direction_F
        step = square / float(direction_F @ image_F)
        solution_F += step * direction_F
        residual_F -= step * image_F
        before, square = square, float(residual_F @ residual_F)
        direction_F = residual_F + square / before * direction_F
    return solution_F


def agreement(
    predicted_N: Sequence[float], rated_N: Sequence[float], threshold: float
) -> dict[str, float]:
    """How well predictions match ratings: rank correlation, R², and F1 as a filter.

    R² is against always predicting the mean; F1 is for ratings of at least `threshold`.
    """
    predicted, rated = np.asarray(predicted_N, float), np.asarray(rated_N, float)
    total = float(((rated - rated.mean()) ** 2).sum())
    found, good = predicted >= threshold, rated >= threshold
    both = float((found & good).sum())
    return {
        "spearman": _correlation(_ranks(predicted), _ranks(rated)),
        "r2": 1 - float(((rated - predicted) ** 2).sum()) / total if total else 0.0,
        "precision": both / float(found.sum()) if found.any() else 0.0,
        "recall": both / float(good.sum()) if good.any() else 0.0,
        "f1": 2 * both / float(found.sum() + good.sum()) if found.any() or good.any() else 0.0,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values; equal values share their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[group]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def read_ratings(path: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Texts and their ratings: records {"text": ..., "scores": {dimension: number}}.

    Raises:
        OpenQwenError: a record has no text or no scores, has other dimensions than the first one,
            or there are too few records.
    """
    texts: list[str] = []
    ratings: list[dict[str, float]] = []
    do = 'give records {"text": ..., "scores": {dimension: number}}'
    for where, record in read_records(path):
        text, scores = record.get("text"), record.get("scores")
        if not isinstance(text, str) or not isinstance(scores, dict) or not scores:
            raise OpenQwenError("The record has no rated text.", where, do)
        if not all(isinstance(x, int | float) and np.isfinite(x) for x in scores.values()):
            raise OpenQwenError("A score is not a number.", where, do)
        if ratings and scores.keys() != ratings[0].keys():
            what = f"The scores are for {', '.join(scores)}; others are for {', '.join(ratings[0])}"
            raise OpenQwenError(f"{what}.", where, "rate all records along the same dimensions")
        texts.append(text)
        ratings.append(scores)
    if len(texts) < _LEAST_RATINGS:
        what = f"{len(texts)} ratings are too few to learn from."
        raise OpenQwenError(what, path, f"rate at least {_LEAST_RATINGS} documents, better 2,000")
    return texts, ratings


def _tell_constant(ratings: Sequence[Mapping[str, float]], path: Path) -> None:
    """Tell dimensions in which all ratings are alike. Raises OpenQwenError where all are."""
    same = {name: x for name, x in ratings[0].items() if all(row[name] == x for row in ratings)}
    told = ", ".join(f"{name} {x:g}" for name, x in same.items())
    if len(same) == len(ratings[0]):
        what = f"All {len(ratings)} documents have the same ratings: {told}."
        raise OpenQwenError(what, path, "let a larger model rate them: it must tell them apart")
    if same:
        notice(f"all {len(ratings)} ratings are the same ({told}): nothing is learnt", path)


def run_quality(run: StageRun) -> dict[str, float]:
    """Ratings → a classifier, with its agreement on the ratings that are held out."""
    # It imports torch, which the processes that filter a corpus do not need.
    from openqwen.support.generators import Generators

    config: QualityConfig = run.config
    texts, ratings = read_ratings(run.data("ratings"))
    _tell_constant(ratings, run.data("ratings"))
    order = Generators(run.seed)["heldout"].permutation(len(texts)).tolist()
    held, rest = np.split(order, [max(1, round(config.heldout * len(order)))])
    part = QualityClassifier.fit([texts[i] for i in rest], [ratings[i] for i in rest], config)
    predicted = list(part.scores([texts[i] for i in held]))
    checked: dict[str, dict[str, float]] = {}
    for name in part.dimensions:
        pairs = [row[name] for row in predicted], [ratings[i][name] for i in held]
        checked[name] = agreement(*pairs, config.threshold)
    final = QualityClassifier.fit(texts, ratings, config)
    final.save(run.output, {"ratings": len(texts), "heldout": len(held), "agreement": checked})
    means = {
        key: sum(values[key] for values in checked.values()) / len(checked)
        for key in ("spearman", "r2", "f1")
    }
    return {**means, "ratings": len(texts)}


STAGE = Stage(
    name="quality",
    help="Train a small classifier of documents from a model's ratings.",
    config=QualityConfig,
    inputs={"ratings": 'Rated documents: records {"text": ..., "scores": {dimension: number}}.'},
    outputs=["quality"],
    run=run_quality,
    estimate=lambda recipe, roles: Effort(seconds=30),
)
