"""Agreement of people: Krippendorff's alpha, Gwet's AC1, Cohen's kappa.

Sources: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011); Gwet, "Computing
inter-rater reliability and its variance in the presence of high agreement" (2008), with the form
for missing values of his "Handbook of Inter-Rater Reliability".
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]
Measure = Callable[["RatingTable", np.ndarray | None], float | None]
_RESAMPLES = 100


@dataclass(frozen=True)
class RatingTable:
    """Values that people gave to units, such as the preference between two responses.

    counts: how often each value was given, [units, values], units with one value or more.
    values: the values in ascending order. groups: the task of each unit, counted from 0.
    """

    counts: np.ndarray
    values: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, given: Iterable[tuple[int, int, float]]) -> "RatingTable":
        """From triples (task, unit, value)."""
        table = np.array(list(given), float).reshape(-1, 3)
        values, columns = np.unique(table[:, 2], return_inverse=True)
        units, first, rows = np.unique(table[:, 1], return_index=True, return_inverse=True)
        counts = np.zeros((len(units), len(values)))
        np.add.at(counts, (rows, columns), 1)
        _, groups = np.unique(table[first, 0], return_inverse=True)
        return cls(counts, values, groups)

    @property
    def overlapping(self) -> int:
        """The number of units with two values or more."""
        return int((self.counts.sum(1) > 1).sum())


def alpha(
    ratings: RatingTable, level: Level = "nominal", weights: np.ndarray | None = None
) -> float | None:
    """Krippendorff's alpha: 1 is full agreement, 0 is what chance gives.

    Args:
        level: how values differ: nominal (equal or not), ordinal (by ranks), interval (by size).
        weights: of the units, for a bootstrap.

    Returns:
        None where no unit has two values, or where all values are the same: alpha is then
        undefined, however well people agree.
    """
    counts = ratings.counts
    sizes = counts.sum(1)
    pairable = sizes > 1
    counts, sizes = counts[pairable], sizes[pairable]
    shares = 1 / (sizes - 1) if weights is None else weights[pairable] / (sizes - 1)
    coincidences = (counts * shares[:, None]).T @ counts - np.diag(shares @ counts)
    totals = coincidences.sum(1)
    n = totals.sum()
    distances = _distances(ratings.values, totals, level)
    expected = totals @ distances @ totals
    if n <= 1 or expected == 0:
        return None
    return float(1 - (n - 1) * (coincidences * distances).sum() / expected)


def _distances(values: np.ndarray, totals: np.ndarray, level: Level) -> np.ndarray:
    """The squared difference of each two values, [values, values]."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return (values[:, None] - values[None, :]) ** 2
    middle = np.cumsum(totals) - totals / 2  # of each value's ranks
    return (middle[:, None] - middle[None, :]) ** 2


def ac1(ratings: RatingTable, weights: np.ndarray | None = None) -> float | None:
    """Gwet's AC1, which does not collapse where nearly all values are the same.

    Returns:
        None where no unit has two values. 1 where all values are the same.
    """
    counts = ratings.counts
    sizes = counts.sum(1)
    weights = np.ones(len(sizes)) if weights is None else weights
    pairable = sizes > 1
    if not weights[pairable].sum():
        return None
    pairs = sizes[pairable] * (sizes[pairable] - 1)
    same = (counts[pairable] * (counts[pairable] - 1)).sum(1) / pairs
    observed = np.average(same, weights=weights[pairable])
    shares = np.average(counts / sizes[:, None], axis=0, weights=weights)
    if len(shares) < 2:
        return 1.0
    chance = (shares * (1 - shares)).sum() / (len(shares) - 1)
    return float((observed - chance) / (1 - chance))


def kappa(first: Iterable[float], second: Iterable[float]) -> float | None:
    """Cohen's kappa of two people's values for the same units; None where it is undefined."""
    a, b = np.array(list(first)), np.array(list(second))
    if not len(a):
        return None
    values = np.union1d(a, b)
    observed = float((a == b).mean())
    chance = float(sum((a == value).mean() * (b == value).mean() for value in values))
    return None if chance == 1 else (observed - chance) / (1 - chance)


def interval(ratings: RatingTable, measure: Measure, seed: int = 0) -> tuple[float, float] | None:
    """The 95% bootstrap interval of a measure; tasks are resampled, with all their units.

    None where too few resamples have a value.
    """
    count = int(ratings.groups.max()) + 1 if len(ratings.groups) else 0
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        value = measure(ratings, drawn[ratings.groups].astype(float))
        if value is not None:
            found.append(value)
    if len(found) < _RESAMPLES / 2:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
