import itertools
import math

import numpy as np
import pytest

from openqwen.evaluate import paired_gain, wilson_interval
from openqwen.evaluate.intervals import (
    bootstrap_difference,
    grouped_interval,
    mcnemar,
    pass_at_k,
    ratio_interval,
    standard_error,
)


def alone(n):
    """Every item a group of its own."""
    return [str(i) for i in range(n)]


@pytest.mark.parametrize("n", [1, 10, 400])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_wilson_interval_ends_where_the_score_test_does(n, share):
    """The ends are the p with |share − p| = z·√(p(1−p)/n); the definition, not the formula."""
    low, high = wilson_interval(share * n, n)
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        assert abs(share - p) == pytest.approx(1.95996398454 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_ratio_interval_is_that_of_the_delta_method_where_items_are_many():
    """Var(Σb / Σs) = Σ (b − r·s)² / (Σs)² (Cochran 1977); and items that are all alike leave no
    doubt.
    """
    rng = np.random.default_rng(3)
    sizes = rng.integers(200, 4_000, 900).astype(float)
    bits = sizes * rng.normal(2.5, 0.4, 900)
    ratio = bits.sum() / sizes.sum()
    half = 1.95996398454 * math.sqrt(((bits - ratio * sizes) ** 2).sum()) / sizes.sum()
    low, high = ratio_interval(bits.tolist(), sizes.tolist())
    assert (ratio - low, high - ratio) == pytest.approx((half, half), rel=0.08)
    assert ratio_interval(bits.tolist(), sizes.tolist()) == (low, high)
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0))


def test_paired_gain_counts_only_items_that_changed_sides():
    """For right and wrong the variance is McNemar's: (b + c − (b − c)² / n) / n², b up and c down
    of n.
    """
    before = [1.0] * 300 + [0.0] * 100
    after = [1.0] * 280 + [0.0] * 20 + [1.0] * 60 + [0.0] * 40
    n, up, down = 400, 60, 20
    gain, low, high = paired_gain(before, after, alone(n))
    assert gain == pytest.approx((up - down) / n)
    half = 1.95996398454 * math.sqrt(up + down - (up - down) ** 2 / n) / n
    assert (high - gain, gain - low) == pytest.approx((half, half), rel=2e-3)  # n − 1 in place of n


def test_paired_gain_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        before = rng.random(500) < 0.4
        after = np.where(
            rng.random(500) < 0.2, rng.random(500) < 0.7, before
        )  # 0.2 × (0.7 − 0.4) better
        _, low, high = paired_gain(before.astype(float), after.astype(float), alone(500))
        covered += low <= 0.06 <= high
    assert 0.93 < covered / 1000 < 0.97


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired_gain([1.0, 0.0], [1.0], ["a", "b"])


def test_a_grouped_interval_covers_the_truth_where_members_of_a_group_agree():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        shares = rng.beta(2, 1, 200)  # mean 2/3
        sizes = rng.integers(1, 6, 200)
        groups = np.repeat(np.arange(200), sizes)
        values = rng.random(len(groups)) < shares[groups]
        low, high = grouped_interval(
            values.astype(float).tolist(), [str(group) for group in groups]
        )
        covered += low <= 2 / 3 <= high
    assert 0.92 < covered / 500 < 0.98


def test_a_grouped_interval_of_single_members_is_the_plain_one():
    values = [1.0] * 60 + [0.0] * 40
    low, high = grouped_interval(values, [str(n) for n in range(100)])
    half = 1.95996398454 * math.sqrt(0.6 * 0.4 / 99)
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half))


def test_a_gain_on_wordings_of_few_problems_is_no_surer_than_the_problems():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        change = np.repeat(rng.choice([-1.0, 0.0, 1.0], 60, p=[0.1, 0.6, 0.3]), 8)
        groups = np.repeat(np.arange(60), 8).astype(str).tolist()
        _, low, high = paired_gain(np.zeros(480).tolist(), change.tolist(), groups)
        covered += low <= 0.2 <= high
    assert 0.92 < covered / 500 < 0.98


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, right):
    marks = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        drawn = [any(part) for part in itertools.combinations(marks, k)]
        assert pass_at_k(samples, right, k) == pytest.approx(sum(drawn) / len(drawn))
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, right, samples + 1)


def test_mcnemar_is_the_share_of_fair_coins_that_are_as_one_sided():
    """All ways in which 7 items on which the models differ could have gone, each as likely."""
    before, after = [1, 0, 1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1, 1, 1, 1]
    ways = list(itertools.product([0, 1], repeat=7))
    extreme = [way for way in ways if abs(sum(way) - 3.5) >= abs(6 - 3.5)]
    assert mcnemar(before, after) == pytest.approx(len(extreme) / len(ways))
    assert mcnemar([1, 0], [1, 0]) == 1.0
    assert mcnemar([0] * 3000, [1] * 3000) < 1e-200


def test_the_paired_bootstrap_agrees_with_the_normal_test_where_items_are_many():
    rng = np.random.default_rng(5)
    before = rng.random(900)
    after = before + rng.normal(0.0, 0.2, 900)
    changes = after - before
    z = abs(changes.mean()) / (changes.std(ddof=1) / math.sqrt(900))
    normal = math.erfc(z / math.sqrt(2))
    assert 0.01 < normal < 0.6
    assert bootstrap_difference(before, after) == pytest.approx(normal, abs=0.03)
    assert bootstrap_difference([0.5] * 40, [0.5] * 40) == 1.0
    assert bootstrap_difference([0.5], [0.9]) == 1.0


def test_the_standard_error_is_that_of_the_mean():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert standard_error(values, alone(5)) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
