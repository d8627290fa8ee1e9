"""Agreement and Bradley-Terry against published examples, a GPL peer, and closed forms."""

import math
import random

import numpy as np
import pytest

from openqwen.instruct.collaborate import agreement, bradley_terry
from openqwen.instruct.collaborate.agreement import RatingTable

# Krippendorff 2011, section C: four observers, twelve units, missing values.
OBSERVERS = """\
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""


def ratings(rows):
    """From one list of values a person; None where a unit has no value."""
    return RatingTable.of(
        (unit, unit, value) for row in rows for unit, value in enumerate(row) if value is not None
    )


@pytest.fixture
def published():
    return ratings(
        [[None if v == "." else int(v) for v in line.split()] for line in OBSERVERS.splitlines()]
    )


@pytest.mark.parametrize(
    ("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_the_published_example(published, level, value):
    assert agreement.alpha(published, level) == pytest.approx(value, abs=0.0005)


def test_alpha_equals_the_peer():
    """Values that krippendorff 0.9.0 (GPL, never a dependency) gave for these drawn tables."""
    peer = pytest.importorskip("krippendorff", reason="the peer krippendorff is not installed")
    rng = random.Random(0)
    for _ in range(30):
        rows = [
            [rng.choice([None, *range(rng.randint(2, 5))]) for _ in range(20)]
            for _ in range(rng.randint(2, 5))
        ]
        table = [[np.nan if v is None else v for v in row] for row in rows]
        for level in ("nominal", "ordinal", "interval"):
            wanted = peer.alpha(reliability_data=table, level_of_measurement=level)
            assert agreement.alpha(ratings(rows), level) == pytest.approx(wanted, abs=1e-9)


def test_alpha_is_undefined_where_all_values_are_the_same_and_ac1_is_not():
    rows = [[1] * 50, [1] * 50]
    assert agreement.alpha(ratings(rows)) is None
    assert agreement.ac1(ratings(rows)) == 1
    rows[1][0] = 0
    assert agreement.alpha(ratings(rows)) == pytest.approx(0, abs=1e-9)
    assert agreement.ac1(ratings(rows)) > 0.97


def test_ac1_and_kappa_of_the_published_example():
    """Gwet 2008, table 2's form: 118 cases (+,+), 5 (+,-), 2 (-,+), 0 (-,-): AC1 0.94, kappa -0.02."""
    first = [1] * 118 + [1] * 5 + [0] * 2
    second = [1] * 118 + [0] * 5 + [1] * 2
    assert agreement.ac1(ratings([first, second])) == pytest.approx(0.941, abs=0.001)
    assert agreement.kappa(first, second) == pytest.approx(-0.0234, abs=0.0005)


def test_the_bootstrap_interval_holds_the_value_and_narrows():
    rng = random.Random(1)

    def drawn(count):
        truth = [rng.choice([-1, 0, 1]) for _ in range(count)]
        return ratings(
            [[v if rng.random() < 0.8 else rng.choice([-1, 0, 1]) for v in truth] for _ in range(3)]
        )

    few, many = drawn(40), drawn(1600)
    widths = []
    for table in (few, many):
        low, high = agreement.interval(table, agreement.ac1)
        assert low < agreement.ac1(table) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_two_responses_have_the_closed_form():
    """Without a prior: log(wins / losses), standard error of the difference sqrt(1/w + 1/l)."""
    wins = np.array([[0, 30], [10, 0]], float)
    found = bradley_terry.fit(wins, prior=1e-9)
    assert found.scores[0] - found.scores[1] == pytest.approx(math.log(3), abs=1e-6)
    spread = bradley_terry.fit(wins, prior=1e-7).covariance
    error = math.sqrt(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    assert error == pytest.approx(math.sqrt(1 / 30 + 1 / 10), rel=1e-4)


def test_strengths_are_found_again_and_the_interval_holds_them():
    rng = np.random.default_rng(0)
    truth = np.array([1.0, 0.2, -0.3, -0.9])
    wins = np.zeros((500, 4, 4))
    for task in range(500):
        for a in range(4):
            for b in range(a + 1, 4):
                won = rng.random() < 1 / (1 + math.exp(truth[b] - truth[a]))
                wins[task, a, b], wins[task, b, a] = won, not won
    found = bradley_terry.fit(wins.sum(0), prior=0.01)
    low, high = bradley_terry.bootstrap(wins, prior=0.01)
    assert np.abs(found.scores - truth).max() < 0.2
    for bounds in ((found.low, found.high), (low, high)):
        assert (bounds[0] < truth).all()
        assert (truth < bounds[1]).all()


def test_many_problems_at_once_equal_one_by_one_and_hard_ones_converge():
    rng = np.random.default_rng(1)
    wins = rng.integers(0, 3, (50, 5, 5)).astype(float)
    wins[0] = np.triu(np.full((5, 5), 1000.0), 1)  # one order, always
    together = bradley_terry.fit(wins)
    for n in (0, 7, 49):
        alone = bradley_terry.fit(wins[n])
        assert together.scores[n] == pytest.approx(alone.scores, abs=1e-6)
        assert sum(alone.scores) == pytest.approx(0, abs=1e-6)
    assert list(np.argsort(-together.scores[0])) == [0, 1, 2, 3, 4]
