"""95 % intervals of shares, of differences between two models, and of ratios."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927).

    Half successes (ties) vary less than full ones: with them the interval is too wide, never too
    narrow.
    """
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return min(share, low), max(share, high)  # rounding must not put the share outside


def grouped_interval(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of the mean of values in [0, 1] that come in groups.

    It uses the cluster-robust standard error: values of one group, such as pairs of one prompt, are
    not independent.
    """
    mean, half = math.fsum(values) / len(values), _half_width(values, groups)
    return max(0.0, mean - half), min(1.0, mean + half)


def paired_gain(
    before: Sequence[float], after: Sequence[float], groups: Sequence[str]
) -> tuple[float, float, float]:
    """(gain, low, high): the mean of after − before on the same items, with its 95 % interval.

    groups: one for each item; items of one group are not independent. For right and wrong answers
    in groups of one this is McNemar's comparison: only the items that changed count.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    gain, half = math.fsum(changes) / len(changes), _half_width(changes, groups)
    return gain, gain - half, gain + half


def _half_width(values: Sequence[float], groups: Sequence[str]) -> float:
    """Half the width of the mean's 95 % interval; infinite where there is only one group."""
    mean = math.fsum(values) / len(values)
    totals: dict[str, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        totals[group] += value - mean
    if len(totals) < 2:
        return math.inf
    spread = math.fsum(total**2 for total in totals.values()) * len(totals) / (len(totals) - 1)
    return _Z * math.sqrt(spread) / len(values)


def ratio_interval(parts: Sequence[float], totals: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of Σ parts / Σ totals over items such as documents.

    The percentile bootstrap (Efron 1979) with 2,000 resamples, which are the same at every call.
    """
    rng, pairs = np.random.default_rng(0), np.array([parts, totals])
    ratios = []
    for _ in range(2_000):
        part, total = pairs[:, rng.integers(len(parts), size=len(parts))].sum(axis=1)
        ratios.append(part / total)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
