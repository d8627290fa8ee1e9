"""Charts in numbers: scales, ticks and points. `templates/charts.html.j2` draws them as SVG.

Every chart is drawn at about the width at which it is shown (340 px), so that its text stays
readable on a phone. Colours come from the page's style sheet, so that they follow light and dark.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openqwen.recipe.report.text import count, number, scientific

POINTS = 400  # of one curve at most
WIDTH, LEFT, RIGHT, TOP = (
    340,
    46,
    328,
    10,
)  # of the picture, and the sides of the part with the curves

Point = tuple[float, float]


@dataclass(frozen=True)
class LineChart:
    """Curves over training steps, as places in the picture.

    bottom: where the steps' axis lies. y_ticks: (place, text). x_rows: what stands under the axis,
    (name, (place, text) of each tick). reference: the place of a level and its name. curves: class
    of the style sheet and points.
    """

    title: str
    height: int
    bottom: int
    y_ticks: list[tuple[float, str]]
    x_rows: list[tuple[str, list[tuple[float, str]]]]
    reference: tuple[float, str] | None
    curves: list[tuple[str, list[Point]]]


def line_chart(
    steps: Sequence[float] | np.ndarray,
    curves: Mapping[str, Sequence[float] | np.ndarray],
    title: str,
    tokens: np.ndarray | None = None,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    height: int = 180,
) -> LineChart | None:
    """Curves by the class that they have in the style sheet ("raw", "smooth"); None where nothing
    is finite.

    tokens: seen by each step, written under the steps. reference: a level and its name, such as
    chance. y_range: fixed bounds; otherwise the curves' own.
    """
    points = {style: downsampled(steps, values) for style, values in curves.items()}
    xs, ys = ([point[i] for drawn in points.values() for point in drawn] for i in (0, 1))
    if not xs:
        return None
    bottom = height - (24 if tokens is None else 40)
    y_low, y_high = y_range or _padded([*ys, reference[0]] if reference else ys)
    across, up = _scale(min(xs), max(xs), LEFT, RIGHT), _scale(y_low, y_high, bottom, TOP)
    marks = ticks(y_low, y_high)
    apart = marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) or 1.0
    # A mark in the corner would meet the row's name.
    along = [x for x in ticks(min(xs), max(xs)) if across(x) > LEFT + 24 and x == int(x)] or [
        max(xs)
    ]
    rows = [("step", [(across(x), count(x)) for x in along])]
    if tokens is not None:
        rows.append(
            (
                "tokens",
                [
                    (across(x), count(n))
                    for x, n in zip(along, np.interp(along, steps, tokens).tolist())
                ],
            )
        )
    return LineChart(
        title,
        height,
        bottom,
        [(up(value), _tick(value, apart)) for value in marks],
        rows,
        (up(reference[0]), reference[1]) if reference else None,
        [
            (style, [(across(x), up(y)) for x, y in drawn])
            for style, drawn in points.items()
            if drawn
        ],
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values in [low, high] to places in [start, end]."""
    return lambda value: (
        start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def smoothed(values: Sequence[float] | np.ndarray, share: float = 1 / 40) -> np.ndarray:
    """The mean over `share` of the curve (two values at least) before and after each place.

    At the start the window is as short after a place as before it, so that a steep beginning is not
    flattened. Values that are not finite are left out; where a window has no other, the mean is
    NaN.
    """
    n = len(values)
    reach, place, finite = max(2, round(n * share)), np.arange(n), np.isfinite(values)
    sums = np.cumsum([0.0, *np.where(finite, values, 0.0)])
    counts = np.cumsum([0, *finite])
    low, high = (
        np.maximum(place - reach, 0),
        np.minimum(place + np.minimum(reach, place), n - 1) + 1,
    )
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def downsampled(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, points: int = POINTS
) -> list[Point]:
    """At most `points` finite points: the lowest and the highest of each stretch, so that spikes
    survive.
    """
    pairs = np.array([x, y], float).T
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) > points:
        stretches = np.array_split(np.arange(len(pairs)), points // 2)
        ends = {
            i
            for part in stretches
            for i in (part[pairs[part, 1].argmin()], part[pairs[part, 1].argmax()])
        }
        pairs = pairs[sorted(ends)]
    return [(a, b) for a, b in pairs.tolist()]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values that lie within [low, high], a step of 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _tick(value: float, step: float) -> str:
    """A tick with the decimals that its distance from the next one calls for."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(value) < step / 2:
        return "0"
    if digits > 3:
        return scientific(value)
    return count(value) if abs(value) >= 1e4 else number(value, digits)
