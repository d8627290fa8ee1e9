"""Regressions from the mixture of a training to its held-out losses, and the mixture they prefer.

RegMix (Liu et al. 2024, arXiv 2407.01492) fits small runs with random mixtures by LightGBM or by a
linear regression. Here the logarithm of a source's loss is a quadratic polynomial of the weights or
of their logarithms, fitted by ridge regression: with a few dozen runs a smooth function of few
numbers errs less than trees do, and the loss of a source falls with its weight as a power or an
exponential (Ye et al. 2024, arXiv 2403.16952). The leave-one-out error of each source decides
between weights and logarithms, and how strong the ridge is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openqwen.support.errors import OpenQwenError

_RIDGES = 10.0 ** np.arange(-6, 4)
_FLOOR = 0.01  # added to a weight before its logarithm is taken
_MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "weights": lambda weights: weights,
    "log": lambda weights: np.log(weights + _FLOOR),
}


@dataclass(frozen=True)
class LossFit:
    """The loss of one source as a function of the mixture.

    form: "weights" or "log". error: root mean square of the leave-one-out errors, in nats.
    rank: Spearman's correlation of the leave-one-out predictions with the losses.
    """

    form: str
    ridge: float
    error: float
    rank: float
    coefficients: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    level: float

    def at(self, weights_MS: np.ndarray) -> np.ndarray:
        """The loss for each mixture: [M], nats per token."""
        features = (_quadratic(_MAPS[self.form](weights_MS)) - self.center) / self.spread
        return np.exp(features @ self.coefficients + self.level)


def _quadratic(values_MS: np.ndarray) -> np.ndarray:
    """All values, their squares and their products: [M, S + S (S + 1) / 2]."""
    first, second = np.triu_indices(values_MS.shape[1])
    return np.concatenate([values_MS, values_MS[:, first] * values_MS[:, second]], axis=1)


def fit_loss(weights_RS: np.ndarray, losses_R: np.ndarray) -> LossFit:
    """The best fit of one source's losses in R runs."""
    logs = np.log(losses_R)
    level = float(logs.mean())
    best: LossFit | None = None
    for form, transform in _MAPS.items():
        features = _quadratic(transform(weights_RS))
        center, spread = features.mean(0), features.std(0)
        spread = np.where(spread > 0, spread, 1.0)
        left, values, right = np.linalg.svd((features - center) / spread, full_matrices=False)
        for ridge in _RIDGES.tolist():
            shrunk = values / (values**2 + ridge)
            coefficients = right.T @ (shrunk * (left.T @ (logs - level)))
            # The hat matrix gives every leave-one-out residual without another fit.
            leverage = (left**2 * (values * shrunk)).sum(1) + 1 / len(logs)
            residuals = logs - level - left @ (values * shrunk * (left.T @ (logs - level)))
            left_out = np.exp(logs - residuals / np.maximum(1 - leverage, 1e-6))
            error = float(np.sqrt(np.mean((left_out - losses_R) ** 2)))
            if best is None or error < best.error:
                rank = spearman(left_out, losses_R)
                best = LossFit(form, ridge, error, rank, coefficients, center, spread, level)
    assert best is not None
    return best


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of the ranks of two lists of different numbers; 0 where one is constant."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    if any(np.ptp(values) == 0 for values in (first, second)):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def draw_mixtures(
    natural_S: np.ndarray, strength: tuple[float, float], count: int, rng: np.random.Generator
) -> np.ndarray:
    """Mixtures around the natural one: Dirichlet draws, [count, S].

    strength: smallest and largest sum of a draw's parameters, over the number of sources. RegMix's
    draws have 0.1 to 5: with 0.1 one source is nearly all of a mixture.
    """
    # Half of the mass is even: a source with a small share must be seen with a large one too.
    base = (natural_S + 1 / len(natural_S)) / 2 * len(natural_S)
    low, high = np.log(strength).tolist()
    scales = np.exp(rng.uniform(low, high, count))
    gammas = rng.standard_gamma(scales[:, None] * base) + 1e-12
    drawn: np.ndarray = gammas / gammas.sum(1, keepdims=True)
    return drawn


def capped(weights_MS: np.ndarray, most_S: np.ndarray) -> np.ndarray:
    """Mixtures in which no source has more than its most; the others share what it gives up.

    Raises:
        OpenQwenError: all sources at their most are less than a whole.
    """
    if most_S.sum() < 1:
        raise OpenQwenError(
            f"All sources together last for {most_S.sum():.0%} of the tokens.",
            where="target_tokens, most_epochs",
            do="raise most_epochs, lower target_tokens, or add text",
        )
    result = weights_MS.copy()
    for _ in range(len(most_S)):  # each round fixes one source or more
        full = result >= most_S - 1e-12
        result = np.where(full, most_S, result)
        free = np.where(full, 0.0, result)
        room = 1 - np.where(full, most_S, 0.0).sum(1, keepdims=True)
        total = free.sum(1, keepdims=True)
        result = np.where(full, most_S, free * room / np.where(total > 0, total, 1.0))
    return result / result.sum(1, keepdims=True)


def within(mixtures_MS: np.ndarray, seen_RS: np.ndarray) -> np.ndarray:
    """The mixtures in which each source has a weight in the range of those seen.

    Beyond it a quadratic polynomial promises what no training has shown. All of them are returned
    where none is in the range, as with a cap that no proxy had.
    """
    inside = (mixtures_MS >= seen_RS.min(0)) & (mixtures_MS <= seen_RS.max(0))
    found = mixtures_MS[inside.all(1)]
    return found if len(found) else mixtures_MS


def best_mixture(
    fits: Sequence[LossFit], targets_S: np.ndarray, mixtures_MS: np.ndarray, best: int
) -> np.ndarray:
    """The mean of the mixtures with the lowest predicted losses: [S]; `best` of them (RegMix)."""
    predicted = np.stack([fit.at(mixtures_MS) for fit in fits], axis=1) @ targets_S
    chosen: np.ndarray = mixtures_MS[np.argsort(predicted, kind="stable")[:best]].mean(0)
    return chosen
