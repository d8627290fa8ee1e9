"""Strengths from comparisons (Bradley and Terry 1952), with intervals.

The chance that i beats j is sigmoid(s_i - s_j). A tie counts as half a win for both. A normal prior
keeps the strengths finite where one response wins always; they add up to 0.
"""

from dataclasses import dataclass

import numpy as np

PRIOR = 0.5  # precision of the prior on one task's few comparisons: as half a comparison or so
_STEPS = 50
_LARGEST_STEP = 2.0
_Z = 1.959964


@dataclass(frozen=True)
class Strengths:
    """Maximum a posteriori strengths [..., k] and their 95% intervals by Fisher information."""

    scores: np.ndarray
    low: np.ndarray
    high: np.ndarray
    covariance: np.ndarray


def fit(wins: np.ndarray, prior: float = PRIOR) -> Strengths:
    """Fit by Newton's method, many problems at once.

    Args:
        wins: how often i beat j, [..., k, k]; a tie is half a win for both.
        prior: the precision of the normal prior, above 0.
    """
    count = wins.shape[-1]
    played = wins + np.swapaxes(wins, -1, -2)
    won = wins.sum(-1)
    scores = np.zeros(wins.shape[:-1])
    identity = np.eye(count)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(scores[..., None, :] - scores[..., :, None]))
        gradient = won - (played * chance).sum(-1) - prior * scores
        information = _information(played, chance) + prior * identity
        step = np.linalg.solve(information, gradient[..., None])[..., 0]
        largest = np.abs(step).max(-1, keepdims=True)
        scores = scores + step * np.minimum(1, _LARGEST_STEP / np.maximum(largest, 1e-300))
        if largest.size == 0 or largest.max() < 1e-10:
            break
    chance = 1 / (1 + np.exp(scores[..., None, :] - scores[..., :, None]))
    covariance = np.linalg.inv(_information(played, chance) + prior * identity)
    error = _Z * np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    return Strengths(scores, scores - error, scores + error, covariance)


def _information(played: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Fisher's information of the comparisons, [..., k, k]."""
    weight = played * chance * (1 - chance)
    return weight.sum(-1)[..., None] * np.eye(weight.shape[-1]) - weight


def bootstrap(
    wins: np.ndarray, prior: float, resamples: int = 200, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The 95% bootstrap interval of strengths; wins: of each task, [tasks, k, k]."""
    rng = np.random.default_rng(seed)
    tasks = len(wins)
    drawn = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=resamples)
    samples = fit(np.tensordot(drawn.astype(float), wins, 1), prior).scores
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return low, high
