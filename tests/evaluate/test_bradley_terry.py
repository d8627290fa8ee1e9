"""Bradley-Terry against a closed form, against Hunter's iteration, and against scikit-learn."""

import math

import numpy as np
import pytest

from openqwen.evaluate.bradley_terry import (
    Game,
    games_of,
    logistic,
    pairwise_scores,
    rate,
    rate_resampled,
    style_difference,
    style_of,
)


def test_two_models_have_the_closed_form():
    games = [Game("q", "a", "b", 1.0)] * 7 + [Game("q", "a", "b", 0.0)] * 2
    games += [Game("q", "a", "b", 0.5, weight=2.0)]
    fitted = rate(games, "b")
    assert fitted.strengths["b"] == 0
    assert fitted.strengths["a"] == pytest.approx(math.log(8 / 3), abs=1e-5)
    assert fitted.win_rate("a", "b") == pytest.approx(8 / 11, abs=1e-6)


def hunter(wins):
    """Strengths by the iteration of Hunter (2004), MM algorithms, equation 3."""
    n = len(wins)
    gamma = np.ones(n)
    for _ in range(20_000):
        both = wins + wins.T
        sums = (both / (gamma[:, None] + gamma[None, :])).sum(1)
        gamma = wins.sum(1) / sums
        gamma /= gamma[0]
    return np.log(gamma)


def test_several_models_are_those_of_hunters_iteration():
    rng = np.random.default_rng(3)
    truth = np.array([0.0, 0.6, -0.4, 1.2])
    wins, games = np.zeros((4, 4)), []
    for _ in range(600):
        a, b = rng.choice(4, 2, replace=False)
        won = rng.random() < 1 / (1 + math.exp(truth[b] - truth[a]))
        outcome = 0.5 if rng.random() < 0.1 else float(won)
        games.append(Game("q", str(a), str(b), outcome))
        wins[a, b] += outcome
        wins[b, a] += 1 - outcome
    fitted = rate(games, "0")
    found = [fitted.strengths[str(n)] for n in range(4)]
    assert found == pytest.approx(list(hunter(wins)), abs=1e-4)


def test_the_regression_is_that_of_scikit_learn():
    """Runs where scikit-learn is installed, such as in lm-eval's environment."""
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(5)
    design = rng.normal(size=(400, 5))
    outcomes = (rng.random(400) < 1 / (1 + np.exp(-design @ [1, -1, 0.5, 0, 2]))).astype(float)
    weights = rng.integers(1, 4, 400).astype(float)
    theirs = linear.LogisticRegression(fit_intercept=False, C=1e9, tol=1e-10, max_iter=1000).fit(
        design, outcomes, weights
    )
    ours = logistic(design, outcomes, weights)
    assert ours == pytest.approx(theirs.coef_[0], abs=1e-4)


def test_a_model_that_always_wins_is_finite():
    fitted = rate([Game(str(n), "a", "b", 1.0) for n in range(9)], "b", control=True)
    assert 0.999 < fitted.win_rate("a", "b") <= 1
    assert math.isfinite(fitted.strengths["a"])


def test_style_is_counted_outside_of_code():
    text = "# Head\n- one\n* two\n1. three\n**bold** and __too__\n```\n# no\n- no\n**no**\n```\n"
    assert style_of(text) == [len(text), 1, 3, 2]
    assert style_of("a - b\n2.5 is no item") == [20, 0, 0, 0]
    assert style_difference(text, text) == (0, 0, 0, 0)
    longer = style_difference("a" * 300, "a" * 100)
    assert longer == (0.5, 0, 0, 0)
    assert style_difference("", "") == (0, 0, 0, 0)


def test_control_of_style_takes_away_what_length_alone_wins():
    """Wins depend on length alone: without control the longer model looks better."""
    rng = np.random.default_rng(1)
    games = []
    for n in range(2000):
        long, short = rng.uniform(50, 1000, 2) * (1.6, 1.0)
        gap = (long - short) / (long + short)
        outcome = float(rng.random() < 1 / (1 + math.exp(-3 * gap)))
        games.append(Game(str(n), "wordy", "base", outcome, 1.0, (gap, 0.0, 0.0, 0.0)))
    plain, controlled = rate(games, "base"), rate(games, "base", control=True)
    assert plain.win_rate("wordy", "base") > 0.6
    assert controlled.win_rate("wordy", "base") == pytest.approx(0.5, abs=0.03)
    spread = np.std([game.style[0] for game in games])
    assert controlled.style["length"] == pytest.approx(3 * spread, abs=0.15)
    assert controlled.style["bold"] == pytest.approx(0, abs=1e-6)


def test_intervals_are_those_of_resampled_questions():
    """Two games of one question are one draw: the interval is that of 60 questions, not of 120."""
    rng = np.random.default_rng(2)
    right = rng.random(60) < 0.6
    games = [Game(str(n), "a", "b", float(won)) for n, won in enumerate(right) for _ in range(2)]
    rates = [one.win_rate("a", "b") for one in rate_resampled(games, "b")]
    share = right.mean()
    assert np.std(rates) == pytest.approx(math.sqrt(share * (1 - share) / 60), rel=0.15)
    again = [one.win_rate("a", "b") for one in rate_resampled(games, "b")]
    assert rates == again


def row(number, games, answer="x", other="y"):
    return {"id": str(number), "games": games, "answer": answer, "other": other}


def test_scores_of_judged_rows():
    rows = [row(1, [2, 1]), row(2, [1, -1]), row(3, [0, 0]), row(4, [-2, -1])]
    scores = pairwise_scores(rows, "base")
    # Wins 3 + 1 + 1, ties 2 at a half, losses 1 + 3 + 1.
    assert scores["score"] == pytest.approx(0.5, abs=1e-6)
    assert scores["games"] == {"wins": 3, "ties": 2, "losses": 3}
    assert scores["agreeing"] == 0.75
    assert scores["low"] < 0.5 < scores["high"]
    assert set(scores["style_controlled"]) == {"score", "low", "high", "weights"}
    assert [game.weight for game in games_of(rows, "m", "base")] == [3, 1, 1, 1, 1, 1, 3, 1]
    single = pairwise_scores([row(1, [1]), row(2, [-1])], "base")
    assert single["agreeing"] is None
