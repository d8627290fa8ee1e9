"""How far a share, or the difference of two, may be from the truth: 95 % intervals."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927).

    Half successes (ties) vary less than whole ones, so with them the interval is wider than it need
    be, never narrower.
    """
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return min(share, max(0.0, centre - half)), max(
        share, min(1.0, centre + half)
    )  # rounding never crosses the share


def grouped_interval(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of the mean of values in [0, 1] that come in groups, by the spread between
    groups alone.

    (The cluster-robust standard error: pairs of one prompt share what makes the prompt hard.)
    """
    mean = math.fsum(values) / len(values)
    half = _half(values, groups)
    return max(0.0, mean - half), min(1.0, mean + half)


def paired_gain(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[str],
) -> tuple[float, float, float]:
    """(gain, low, high): the mean of after − before on the same items, with its 95 % interval.

    For right and wrong answers in groups of one this is McNemar's comparison: only the items that
    changed sides count.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    gain, half = math.fsum(changes) / len(changes), _half(changes, groups)
    return gain, gain - half, gain + half


def _half(values: Sequence[float], groups: Sequence[str]) -> float:
    """Half the width of the mean's interval; infinite for one group, which says nothing of
    others.
    """
    mean = math.fsum(values) / len(values)
    totals: dict[str, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        totals[group] += value - mean
    if len(totals) < 2:
        return math.inf
    spread = math.fsum(total**2 for total in totals.values()) * len(totals) / (len(totals) - 1)
    return _Z * math.sqrt(spread) / len(values)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of Σ parts / Σ wholes over items such as documents.

    The percentile bootstrap (Efron 1979) of 2,000 resamples, the same at every call.
    """
    rng, pairs = np.random.default_rng(0), np.array([parts, wholes])
    draws = []
    for _ in range(2_000):
        part, whole = pairs[:, rng.integers(len(parts), size=len(parts))].sum(axis=1)
        draws.append(part / whole)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
