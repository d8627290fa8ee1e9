"""Bradley-Terry ratings of models from comparisons of their answers, with control of style.

The log-odds that answer a beats answer b are the difference of the models' strengths, and with
control also a weighted sum of how the answers differ in style (Chatbot Arena's style control, Li et
al. 2024): their length, and how dense their Markdown headings, list items and bold words are. The
strengths are then those of answers of equal style. A tie is half a win.

Shapes: G games, M models without the baseline, S style features.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

STYLE = ("length", "headings", "list items", "bold")
_RIDGE = 1e-6  # keeps a model that wins every game finite
_STEPS = 100
_RESAMPLES = 500
_MARKS = [  # in text without code
    re.compile(r"^#{1,6}\s", re.M),
    re.compile(r"^\s*(?:[-*+]|\d+\.)\s", re.M),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
]


class Game(NamedTuple):
    """One comparison. outcome: 1 where a wins, 0 where b wins, 0.5 for a tie. group: its question.

    style: `style_difference` of the answers. weight: how many games it counts as.
    """

    group: str
    a: str
    b: str
    outcome: float
    weight: float = 1.0
    style: tuple[float, ...] = (0.0,) * len(STYLE)


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths in log-odds by model, 0 for the baseline, and the weight of each style feature.

    A feature's weight is per standard deviation of its differences.
    """

    strengths: dict[str, float]
    style: dict[str, float]

    def win_rate(self, model: str, other: str) -> float:
        """The chance that the model's answer beats the other's, from 0 to 1."""
        return float(1 / (1 + np.exp(self.strengths[other] - self.strengths[model])))


def style_of(text: str) -> list[float]:
    """Characters, headings, list items and bold words of an answer; Markdown in code is none."""
    plain = re.sub(r"```.*?(?:```|\Z)", "", text, flags=re.S)
    return [float(len(text)), *(float(len(mark.findall(plain))) for mark in _MARKS)]


def style_difference(a: str, b: str) -> tuple[float, ...]:
    """How two answers differ, from −1 to 1: (a − b) / (a + b) of lengths and of densities.

    Densities are counts in 100 characters; 1 is added to their sum, as in Arena-Hard.
    """
    (long_a, *marks_a), (long_b, *marks_b) = style_of(a), style_of(b)
    found = [(long_a - long_b) / max(1.0, long_a + long_b)]
    for one, other in zip(marks_a, marks_b):
        dense_a, dense_b = 100 * one / max(1.0, long_a), 100 * other / max(1.0, long_b)
        found.append((dense_a - dense_b) / (dense_a + dense_b + 1))
    return tuple(found)


def rate(games: Sequence[Game], baseline: str, control: bool = False) -> BradleyTerry:
    """Fit the strengths of all models in the games by maximum likelihood."""
    models, design_GF = _design(games, baseline, control)
    outcomes_G, weights_G = np.array([(game.outcome, game.weight) for game in games]).T
    return _ratings(models, baseline, logistic(design_GF, outcomes_G, weights_G))


def rate_resampled(
    games: Sequence[Game], baseline: str, control: bool = False
) -> list[BradleyTerry]:
    """The ratings of 500 bootstrap resamples of the questions, which are the same at every call.

    All games of a question are drawn together: they share its answers.
    """
    models, design_GF = _design(games, baseline, control)
    outcomes_G, weights_G = np.array([(game.outcome, game.weight) for game in games]).T
    _, group_G = np.unique([game.group for game in games], return_inverse=True)
    rng, groups = np.random.default_rng(0), int(group_G.max()) + 1
    found = []
    for _ in range(_RESAMPLES):
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups))
        found.append(
            _ratings(models, baseline, logistic(design_GF, outcomes_G, weights_G * drawn[group_G]))
        )
    return found


def logistic(design_GF: np.ndarray, outcomes_G: np.ndarray, weights_G: np.ndarray) -> np.ndarray:
    """Weights [F] of a logistic regression without intercept, by Newton's method.

    A step that lowers the likelihood is halved. outcomes may be shares from 0 to 1.
    """
    beta_F = np.zeros(design_GF.shape[1])
    ridge_FF = _RIDGE * np.eye(len(beta_F))

    def likelihood(at_F: np.ndarray) -> float:
        logits_G = design_GF @ at_F
        logs_G = outcomes_G * logits_G - np.logaddexp(0, logits_G)
        return float(weights_G @ logs_G - at_F @ ridge_FF @ at_F / 2)

    known = likelihood(beta_F)
    for _ in range(_STEPS):
        share_G = 1 / (1 + np.exp(-design_GF @ beta_F))
        slope_F = design_GF.T @ (weights_G * (outcomes_G - share_G)) - ridge_FF @ beta_F
        curve_G = weights_G * share_G * (1 - share_G)
        step_F = np.linalg.solve(design_GF.T @ (curve_G[:, None] * design_GF) + ridge_FF, slope_F)
        while (new := likelihood(beta_F + step_F)) < known and abs(step_F).max() > 1e-10:
            step_F = step_F / 2
        beta_F, known = beta_F + step_F, new
        if abs(step_F).max() < 1e-9:
            break
    return beta_F


def pairwise_scores(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """The win rate of one model against the baseline, from its judged rows.

    rows: with "id", "answer", "other" and "games", the strengths (−2 to 2) of its two verdicts. One
    of 2 counts as three games, as in Arena-Hard.

    Returns:
        score with low and high (95 %) by the Bradley-Terry model, style_controlled with the same
        and the features' weights, wins, ties and losses (games), and agreeing: the share of
        questions on which both orders of the answers got the same verdict (None: one order).
    """
    games = games_of(rows, "model", baseline)
    plain = _interval(games, "model", baseline, control=False)
    controlled = _interval(games, "model", baseline, control=True)
    signs = [[(strength > 0) - (strength < 0) for strength in row["games"]] for row in rows]
    both = [pair[0] == pair[1] for pair in signs if len(pair) == 2]
    return {
        **plain,
        "standard_error": (plain["high"] - plain["low"]) / (2 * 1.96),
        "baseline": baseline,
        "style_controlled": controlled | {"weights": rate(games, baseline, control=True).style},
        "games": {
            name: sum(game.outcome == outcome for game in games)
            for name, outcome in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))
        },
        "agreeing": sum(both) / len(both) if both else None,
    }


def games_of(rows: Sequence[Mapping[str, Any]], model: str, baseline: str) -> list[Game]:
    """The games of judged rows, see `pairwise_scores`."""
    games = []
    for row in rows:
        style = style_difference(row["answer"], row["other"])
        for strength in row["games"]:
            outcome = (1 + (strength > 0) - (strength < 0)) / 2
            weight = 3.0 if abs(strength) == 2 else 1.0
            games.append(Game(row["id"], model, baseline, outcome, weight, style))
    return games


def _interval(games: Sequence[Game], model: str, baseline: str, control: bool) -> dict[str, float]:
    score = rate(games, baseline, control).win_rate(model, baseline)
    drawn = [one.win_rate(model, baseline) for one in rate_resampled(games, baseline, control)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"score": score, "low": min(score, float(low)), "high": max(score, float(high))}


def _design(games: Sequence[Game], baseline: str, control: bool) -> tuple[list[str], np.ndarray]:
    """The models but for the baseline, and the games as rows of +1 for a, −1 for b, and style.

    Style features are divided by their standard deviation but not centred: the strengths are those
    at no difference, not at the mean difference, which one model's habits decide.
    """
    models = sorted({name for game in games for name in (game.a, game.b)} - {baseline})
    place = {name: index for index, name in enumerate(models)}
    design_GM = np.zeros((len(games), len(models)))
    for index, game in enumerate(games):
        for name, sign in ((game.a, 1.0), (game.b, -1.0)):
            if name != baseline:
                design_GM[index, place[name]] += sign
    if not control:
        return models, design_GM
    style_GS = np.array([game.style for game in games])
    spread_S = style_GS.std(axis=0)
    style_GS = np.divide(style_GS, spread_S, out=np.zeros_like(style_GS), where=spread_S > 1e-9)
    return models, np.hstack([design_GM, style_GS])


def _ratings(models: Sequence[str], baseline: str, beta_F: np.ndarray) -> BradleyTerry:
    strengths = {baseline: 0.0} | dict(zip(models, map(float, beta_F)))
    return BradleyTerry(strengths, dict(zip(STYLE, map(float, beta_F[len(models) :]))))
