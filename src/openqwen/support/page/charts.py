"""Scales, ticks and points of charts; `templates/charts.html.j2` draws them as SVG.

Every chart is drawn at about the width at which it is shown (340 px), so that its text stays
readable on a phone. Colours come from the page's style sheet and follow light and dark mode.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from openqwen.support.page.text import count, number, scientific

POINTS = 400  # the most points of one curve
WIDTH = 340  # of the picture
LEFT, RIGHT, TOP = 46, 328, 10  # the sides of the area with the curves

Point = tuple[float, float]


@dataclass(frozen=True)
class LineChart:
    """Curves over training steps, in coordinates of the picture.

    bottom: y of the steps' axis. y_ticks: (y, text). x_rows: rows under the axis, each a name and
    (x, text) of its ticks. reference: y and name of a reference level. curves: class in the style
    sheet, and points. bars: x of an interval, and y of its two ends.
    """

    title: str
    height: int
    bottom: int
    y_ticks: list[tuple[float, str]]
    x_rows: list[tuple[str, list[tuple[float, str]]]]
    reference: tuple[float, str] | None
    curves: list[tuple[str, list[Point]]]
    bars: list[tuple[float, float, float]] = field(default_factory=list)


def line_chart(
    steps: Sequence[float] | np.ndarray,
    curves: Mapping[str, Sequence[float] | np.ndarray],
    title: str,
    tokens: np.ndarray | None = None,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    height: int = 180,
) -> LineChart | None:
    """Return a chart of curves, or None where no value is finite.

    Args:
        steps: The x values.
        curves: Class in the style sheet ("raw", "smooth") -> y values.
        title: The chart's title.
        tokens: The tokens seen up to each step, shown under the steps.
        reference: A reference level and its name, such as chance.
        y_range: Fixed bounds; None: those of the curves.
        height: Of the picture.
    """
    points = {style: downsampled(steps, values) for style, values in curves.items()}
    xs, ys = ([point[i] for drawn in points.values() for point in drawn] for i in (0, 1))
    if not xs:
        return None
    bottom = height - (24 if tokens is None else 40)
    y_low, y_high = y_range or _padded([*ys, reference[0]] if reference else ys)
    across, up = scale(min(xs), max(xs), LEFT, RIGHT), scale(y_low, y_high, bottom, TOP)
    marks = ticks(y_low, y_high)
    apart = marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) or 1.0
    # A tick in the corner would overlap the row's name.
    whole = [x for x in ticks(min(xs), max(xs)) if x == int(x)]
    along = [x for x in whole if across(x) > LEFT + 24] or [max(xs)]
    rows = [("step", [(across(x), count(x)) for x in along])]
    if tokens is not None:
        seen = np.interp(along, steps, tokens).tolist()
        rows.append(("tokens", [(across(x), count(n)) for x, n in zip(along, seen)]))
    drawn = {style: [(across(x), up(y)) for x, y in curve] for style, curve in points.items()}
    return LineChart(
        title,
        height,
        bottom,
        y_ticks=[(up(value), _tick(value, apart)) for value in marks],
        x_rows=rows,
        reference=(up(reference[0]), reference[1]) if reference else None,
        curves=[(style, curve) for style, curve in drawn.items() if curve],
    )


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the linear function from values in [low, high] to coordinates in [start, end]."""
    if not high > low:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * ((value - low) / (high - low))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def smoothed(values: Sequence[float] | np.ndarray, share: float = 1 / 40) -> np.ndarray:
    """Return the moving mean over `share` of the curve (at least 2 values) on both sides.

    At the start the window reaches as far forwards as backwards, so that a steep beginning is not
    flattened. Values that are not finite are left out; the mean of no values is NaN.
    """
    n = len(values)
    reach, place, finite = max(2, round(n * share)), np.arange(n), np.isfinite(values)
    sums = np.cumsum([0.0, *np.where(finite, values, 0.0)])
    counts = np.cumsum([0, *finite])
    low = np.maximum(place - reach, 0)
    high = np.minimum(place + np.minimum(reach, place), n - 1) + 1
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def downsampled(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, points: int = POINTS
) -> list[Point]:
    """Return at most `points` finite points: the lowest and the highest of each stretch."""
    pairs = np.array([x, y], float).T
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) > points:
        kept: set[int] = set()
        for part in np.array_split(np.arange(len(pairs)), points // 2):
            kept |= {part[pairs[part, 1].argmin()], part[pairs[part, 1].argmax()]}
        pairs = pairs[sorted(kept)]
    return [(a, b) for a, b in pairs.tolist()]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round values within [low, high], spaced by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick(value: float, step: float) -> str:
    """Format a tick with as many decimals as the distance between ticks needs."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(value) < step / 2:
        return "0"
    if digits > 3:
        return scientific(value)
    return count(value) if abs(value) >= 1e4 else number(value, digits)
