"""95 % intervals of shares, differences and ratios; pass@k; significance of a difference."""

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


def standard_error(values: Sequence[float], groups: Sequence[str]) -> float:
    """The cluster-robust standard error of the mean; infinite where there is only one group."""
    mean = math.fsum(values) / len(values)
    totals: dict[str, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        totals[group] += value - mean
    if len(totals) < 2:
        return math.inf
    spread = math.fsum(total**2 for total in totals.values()) * len(totals) / (len(totals) - 1)
    return math.sqrt(spread) / len(values)


def _half_width(values: Sequence[float], groups: Sequence[str]) -> float:
    return _Z * standard_error(values, groups)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that one of k samples is right, unbiased: 1 − C(n−c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} samples with {right} right")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """The two-sided p-value that two models are equally often right on the same items (0 or 1).

    Exact: of the items on which they differ, each model is right on half (McNemar 1947).
    """
    won = sum(b > a for a, b in zip(before, after, strict=True))
    changed = sum(b != a for a, b in zip(before, after))
    tail = sum(math.comb(changed, i) for i in range(min(won, changed - won) + 1))
    return min(1.0, 2 * tail / 2**changed)


def bootstrap_difference(before: Sequence[float], after: Sequence[float]) -> float:
    """The two-sided p-value of the mean difference on the same items, by the paired bootstrap.

    10,000 resamples of the differences around zero, which are the same at every call; 1 where there
    are fewer than two items, which tell nothing.
    """
    if len(before) < 2:
        return 1.0
    changes = np.array(after, float) - np.array(before, float)
    rng, centred = np.random.default_rng(0), changes - changes.mean()
    extreme = 0
    for _ in range(100):
        means = centred[rng.integers(len(changes), size=(100, len(changes)))].mean(axis=1)
        extreme += int((abs(means) >= abs(changes.mean()) - 1e-12).sum())
    return (extreme + 1) / 10_001


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
