"""The fitted scaling law: a known one is found again, with an honest interval; what is not known is
said.
"""

import math

import numpy as np
import pytest

from openqwen.train.scaling import Bowl, Cell, Law, fit_laws

SIZES = (2e6, 8e6, 32e6)
TOKENS = (1e8, 4e8)


def best_rate(n, d):
    return 1.79 * n**-0.713 * d**0.307  # Step Law


def best_batch(n, d):
    return 0.58 * d**0.571


def trained(
    noise=0.0,
    seed=0,
    reach=8.0,
    skew=0.0,
    sizes=SIZES,
    tokens=TOKENS,
    batches=4,
    rates=6,
    shift=1.0,
):
    """Trainings under a known law; the bowl is steeper towards large rates by `skew`."""
    generator = np.random.default_rng(seed)
    cells = []
    for n in sizes:
        for d in tokens:
            for rate in (
                np.geomspace(best_rate(n, d) / reach, best_rate(n, d) * reach, rates) * shift
            ):
                for batch in np.geomspace(best_batch(n, d) / 6, best_batch(n, d) * 6, batches):
                    x, y = math.log(rate / best_rate(n, d)), math.log(batch / best_batch(n, d))
                    loss = (
                        1.7
                        + 400 * n**-0.34
                        + 0.03 * x * x
                        + 0.02 * y * y
                        - 0.01 * x * y
                        + skew * max(x, 0) ** 3
                    )
                    cells.append(
                        Cell(n, d, float(rate), float(batch), loss + noise * generator.normal())
                    )
    return cells


def test_a_known_law_is_found_again():
    _, optima, rate, batch = fit_laws(trained(), 20, np.random.default_rng(0))
    assert [o.rate_fault + o.batch_fault for o in optima] == [""] * 6
    assert rate.law.of_parameters == pytest.approx(-0.713, abs=0.01)
    assert rate.law.of_tokens == pytest.approx(0.307, abs=0.02)
    assert batch.law.of_tokens == pytest.approx(0.571, abs=0.02)
    assert batch.law.of_parameters == pytest.approx(0, abs=0.01)
    assert rate.law.at(1e9, 1e10) == pytest.approx(best_rate(1e9, 1e10), rel=0.05)
    assert rate.held == batch.held == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(25):
        _, _, rate, _ = fit_laws(trained(0.005, seed), 40, np.random.default_rng(seed))
        low, high = rate.interval(5e8, 1e10)
        covered += low <= best_rate(5e8, 1e10) <= high
        assert low < high
    assert covered >= 17  # of 22.5 expected


def test_a_bowl_that_bends_away_from_its_bottom_is_still_found():
    _, _, rate, _ = fit_laws(trained(skew=0.05), 5, np.random.default_rng(0))
    assert rate.law.of_parameters == pytest.approx(-0.713, abs=0.05)
    assert rate.law.at(32e6, 4e8) == pytest.approx(best_rate(32e6, 4e8), rel=0.35)


def test_diverged_cells_are_left_out():
    cells = trained()
    worst = max(range(len(cells)), key=lambda n: cells[n].learning_rate)
    cells[worst] = Cell(cells[worst].parameters, cells[worst].tokens, 1.0, 1.0, math.nan)
    _, _, rate, _ = fit_laws(cells, 2, np.random.default_rng(0))
    assert rate.law.of_parameters == pytest.approx(-0.713, abs=0.01)


def test_a_best_value_at_the_edge_is_not_taken_for_known():
    _, optima, rate, batch = fit_laws(trained(shift=20.0), 5, np.random.default_rng(0))
    assert {o.rate_fault for o in optima} == {
        "the best learning rate lies at the lower edge of the grid"
    }
    assert rate.law is None
    assert rate.resamples == []
    assert all(math.isnan(value) for value in rate.interval(1e9, 1e10))
    assert batch.law is not None or all(o.batch_fault for o in optima)


def test_one_batch_size_gives_a_law_for_the_rate_alone():
    cells = trained(batches=1)
    _, optima, rate, batch = fit_laws(cells, 5, np.random.default_rng(0))
    assert {o.batch_fault for o in optima} == {"the grid has one batch size only"}
    assert batch.law is None
    assert rate.law is not None


def test_one_amount_of_data_leaves_its_exponent_open():
    _, _, rate, _ = fit_laws(trained(tokens=(1e8,)), 5, np.random.default_rng(0))
    assert rate.law.of_parameters == pytest.approx(-0.713, abs=0.01)
    assert math.isnan(rate.law.of_tokens)


def test_sizes_and_data_that_grow_together_cannot_be_told_apart():
    cells = [
        c
        for n, d in ((2e6, 1e8), (8e6, 4e8), (32e6, 16e8))
        for c in trained(sizes=(n,), tokens=(d,))
    ]
    assert fit_laws(cells, 5, np.random.default_rng(0))[2].law is None


def test_too_few_cells_are_said():
    five = Bowl([trained(rates=3, batches=3)[n] for n in (0, 1, 3, 4, 8)])
    assert "too few" in five.bottom(five.losses).rate_fault
    two = Bowl([c for c in trained(rates=2, batches=2) if (c.parameters, c.tokens) == (2e6, 1e8)])
    assert "edge" in two.bottom(two.losses).rate_fault
    assert "edge" in two.bottom(two.losses).batch_fault


def test_a_law_through_no_point():
    assert Law.through([]) is None
    assert Law.through([(1e6, 1e8, 3e-3)]).at(5e9, 7e9) == pytest.approx(3e-3)
