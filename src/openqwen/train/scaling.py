"""A scaling law for learning rate and batch size, fitted to many small trainings.

Qwen2.5 sets both by such a law, lr*(N, D) and B*(N, D), and does not publish its constants (report,
section 3.2). The form here is that of published laws (DeepSeek LLM 2024, section 3.1; Step Law, Li
et al. 2025): at each size N and amount of data D the loss is a bowl in (ln lr, ln B), and the
optima follow a power law in N and D. N counts the parameters that a token passes, without the
embedding and output tables; D and B count tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_POINTS = 201  # points along an axis at which a bowl is evaluated
_LOW, _HIGH = 5, 95  # percentiles of the interval


@dataclass(frozen=True)
class Cell:
    """One finished training."""

    parameters: float
    tokens: float
    learning_rate: float
    batch_tokens: float
    loss: float


@dataclass(frozen=True)
class Optimum:
    """The minimum of one bowl. rate_fault, batch_fault: why a coordinate is unknown, or empty."""

    parameters: float
    tokens: float
    learning_rate: float
    batch_tokens: float
    loss: float
    rate_fault: str
    batch_fault: str


class Bowl:
    """A quadratic in (ln lr, ln B), fitted to the losses of the cells of one size.

    The loss is quadratic only near its minimum, so a cell's weight falls with its excess over the
    best loss: 1 / (1 + excess/τ)², with τ the lower quartile of the excess. A curvature needs three
    values along its axis; without one the minimum lies on the edge of the grid.
    """

    def __init__(self, cells: Sequence[Cell]):
        self.cells = [c for c in cells if math.isfinite(c.loss)]
        points = np.log([[c.learning_rate, c.batch_tokens] for c in self.cells])
        self._low, self._high = points.min(0), points.max(0)
        self._steps = [len(np.unique(axis)) for axis in points.T.round(9)]
        self.losses = np.array([c.loss for c in self.cells])
        excess = self.losses - self.losses.min()
        self._weights = 1 / (1 + excess / max(float(np.quantile(excess, 0.25)), 1e-9))
        self._terms = self._quadratic_terms(points)
        self.spare = len(self.cells) - self._terms.shape[1]  # degrees of freedom

    def _quadratic_terms(self, points: np.ndarray) -> np.ndarray:
        """The quadratic's terms at points [..., 2]."""
        middle, half = (self._high + self._low) / 2, (self._high - self._low) / 2
        x, y = np.moveaxis((points - middle) / np.where(half > 0, half, 1.0), -1, 0)
        terms = [np.ones_like(x), x, y, x * y, x * x, y * y]
        rates, batches = self._steps
        known = [True, rates > 1, batches > 1, min(rates, batches) > 1, rates > 2, batches > 2]
        return np.stack([term for term, fits in zip(terms, known, strict=True) if fits], axis=-1)

    def fit(self, losses: np.ndarray) -> np.ndarray:
        """Coefficients of the terms."""
        weighted = self._terms * self._weights[:, None]
        return np.linalg.lstsq(weighted, losses * self._weights, rcond=None)[0]

    def resampled(self, generator: np.random.Generator) -> np.ndarray:
        """Losses with other noise, for the bootstrap: fitted values plus resampled residuals."""
        fitted = self._terms @ self.fit(self.losses)
        inflation = math.sqrt(len(self.losses) / max(self.spare, 1))
        noise = (self.losses - fitted) * self._weights * inflation
        return fitted + generator.choice(noise, len(noise)) / self._weights

    def curve(self, batch_tokens: float) -> list[list[float]]:
        """[learning rate, fitted loss] over the grid's learning rates, at one batch size."""
        rates = np.linspace(self._low[0], self._high[0], 40)
        points = np.stack([rates, np.full(len(rates), math.log(batch_tokens))], axis=-1)
        return np.stack(
            [np.exp(rates), self._quadratic_terms(points) @ self.fit(self.losses)], axis=1
        ).tolist()

    def bottom(self, losses: np.ndarray) -> Optimum:
        """The minimum within the grid. On the edge it is unknown, since it may lie beyond."""
        points, terms = self._surface
        surface = terms @ self.fit(losses)
        at = np.unravel_index(int(surface.argmin()), surface.shape)
        names = ("learning rate", "batch size")
        faults = [
            self._fault(name, int(place), places)
            for name, place, places in zip(names, at, surface.shape, strict=True)
        ]
        rate, batch = map(float, np.exp(points[at]))
        cell = self.cells[0]
        return Optimum(cell.parameters, cell.tokens, rate, batch, float(surface[at]), *faults)

    @cached_property
    def _surface(self) -> tuple[np.ndarray, np.ndarray]:
        """Points all over the grid, and the quadratic's terms there."""
        axes = [
            np.linspace(a, b, _POINTS) if b > a else np.array([a])
            for a, b in zip(self._low, self._high)
        ]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        return points, self._quadratic_terms(points)

    def _fault(self, name: str, place: int, places: int) -> str:
        if self.spare < 0:
            return f"{len(self.cells)} cells are too few for a bowl"
        if places == 1:
            return f"the grid has one {name} only"
        edge = {0: "lower", places - 1: "upper"}.get(place)
        return f"the best {name} lies at the {edge} edge of the grid" if edge else ""


@dataclass(frozen=True)
class Law:
    """value = exp(constant) · N^of_parameters · D^of_tokens.

    An exponent is NaN where there was one size or one amount of data only.
    """

    constant: float
    of_parameters: float
    of_tokens: float

    def at(self, parameters: float, tokens: float) -> float:
        """The value at a size and an amount of data."""
        powers = ((self.of_parameters, parameters), (self.of_tokens, tokens))
        return math.exp(self.constant + sum(p * math.log(x) for p, x in powers if math.isfinite(p)))

    def __str__(self) -> str:
        powers = (("N", self.of_parameters), ("D", self.of_tokens))
        factors = [f"{name}^{power:.3f}" for name, power in powers if math.isfinite(power)]
        return " · ".join([f"{math.exp(self.constant):.3g}", *factors])

    @classmethod
    def through(cls, points: Sequence[tuple[float, float, float]]) -> "Law | None":
        """Fit (N, D, value) by least squares in logarithms; None where points are missing."""
        if not points:
            return None
        logs = np.log(np.array(points))
        varying = [n for n in (0, 1) if np.ptp(logs[:, n]) > 1e-9]
        terms = np.stack([np.ones(len(logs)), *(logs[:, n] for n in varying)], axis=1)
        if np.linalg.matrix_rank(terms) < terms.shape[1]:
            return None
        constant, *powers = map(float, np.linalg.lstsq(terms, logs[:, 2], rcond=None)[0])
        exponents = dict(zip(varying, powers, strict=True))
        return cls(constant, exponents.get(0, math.nan), exponents.get(1, math.nan))


@dataclass(frozen=True)
class Fit:
    """A law for one quantity.

    resamples: the laws of the bootstrap. held: the share of its draws that gave a law.
    """

    law: Law | None
    resamples: list[Law]
    held: float

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """The 5th and 95th percentile of the resampled laws' predictions; NaN without any."""
        if not self.resamples:
            return math.nan, math.nan
        values = [law.at(parameters, tokens) for law in self.resamples]
        low, high = np.percentile(values, [_LOW, _HIGH])
        return float(low), float(high)


def fit_laws(
    cells: Sequence[Cell], draws: int, generator: np.random.Generator
) -> tuple[list[Bowl], list[Optimum], Fit, Fit]:
    """Fit a bowl to each size, and the laws to the known minima.

    Returns:
        The bowls, their minima, and the fits for the learning rate and for the batch size.
    """
    sizes = sorted({(c.parameters, c.tokens) for c in cells if math.isfinite(c.loss)})
    bowls = [Bowl([c for c in cells if (c.parameters, c.tokens) == size]) for size in sizes]
    optima = [bowl.bottom(bowl.losses) for bowl in bowls]
    drawn = [
        _laws([bowl.bottom(bowl.resampled(generator)) for bowl in bowls if bowl.spare > 0])
        for _ in range(draws)
    ]
    rate, batch = _laws(optima)
    return bowls, optima, _fit(rate, [r for r, _ in drawn]), _fit(batch, [b for _, b in drawn])


def _laws(optima: Sequence[Optimum]) -> tuple[Law | None, Law | None]:
    """The laws of the learning rate and of the batch size."""
    rates = [(o.parameters, o.tokens, o.learning_rate) for o in optima if not o.rate_fault]
    batches = [(o.parameters, o.tokens, o.batch_tokens) for o in optima if not o.batch_fault]
    return Law.through(rates), Law.through(batches)


def _fit(law: Law | None, drawn: Sequence[Law | None]) -> Fit:
    """A law with the resampled laws that have the same exponents."""
    resamples = [x for x in drawn if x and law and _exponents(x) == _exponents(law)]
    return Fit(law, resamples, len(resamples) / max(len(drawn), 1))


def _exponents(law: Law) -> tuple[bool, bool]:
    return math.isfinite(law.of_parameters), math.isfinite(law.of_tokens)
