"""Small SVG charts. Colours come from the page's style sheet, so that they follow light and dark.

Every chart is drawn at about the width at which it is shown (340 px), so that its text stays readable on a phone.
Text goes through Markup.format, which escapes it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from openqwen.recipe.report.text import count, number, percent, scientific, visible

POINTS = 400  # of one curve at most

_WIDTH = 340
_LEFT, _RIGHT, _TOP = 46, 12, 10


@dataclass(frozen=True)
class Series:
    """One curve. style: a class of the style sheet ("raw", "smooth")."""

    x: Sequence[float]
    y: Sequence[float]
    style: str = "smooth"


def smoothed(values: Sequence[float], share: float = 1 / 40) -> list[float]:
    """The mean over `share` of the curve (two values at least) before and after each place.

    At the start the window is as short after a place as before it, so that a steep beginning is not flattened. Values
    that are not finite are left out; where a window has no other, the mean is NaN.
    """
    reach = max(2, round(len(values) * share))
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    out = []
    for i in range(len(values)):
        low, high = max(i - reach, 0), min(i + min(reach, i), len(values) - 1) + 1
        known = counts[high] - counts[low]
        out.append((sums[high] - sums[low]) / known if known else math.nan)
    return out


def downsampled(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> list[tuple[float, float]]:
    """At most `points` finite points: the lowest and the highest of each stretch, so that spikes survive."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) <= points:
        return pairs
    stretches = points // 2
    chosen: list[tuple[float, float]] = []
    for i in range(stretches):
        stretch = pairs[i * len(pairs) // stretches : (i + 1) * len(pairs) // stretches]
        chosen += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return chosen


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values that lie within [low, high], a step of 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    title: str,
    second_axis: Callable[[float], float] | None = None,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    height: int = 180,
) -> Markup:
    """Curves over training steps.

    second_axis: maps a step to the tokens seen by then, written under the steps. reference: a level and its name, such
    as chance. y_range: fixed bounds; otherwise the curves' own.
    """
    curves = [(s, downsampled(s.x, s.y)) for s in series]
    drawn = [point for _, points in curves for point in points]
    if not drawn:
        return Markup('<p class="note">no finite values to draw</p>')
    x_low, x_high = _bounds([p[0] for p in drawn])
    levels = [p[1] for p in drawn] + ([reference[0]] if reference else [])
    y_low, y_high = y_range or _padded(*_bounds(levels))
    bottom = height - (40 if second_axis else 24)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), bottom - up * (bottom - _TOP)

    parts = [_y_axis(y_low, y_high, place), _x_axis(x_low, x_high, bottom, place, second_axis)]
    if reference:
        _, y = place(x_low, reference[0])
        right = _WIDTH - _RIGHT
        parts += [_across("reference", y), _text("end", right, y - 4, reference[1])]
    parts += [_curve(s.style, [place(*point) for point in points]) for s, points in curves if points]
    svg = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(svg).format(_WIDTH, height, visible(title), Markup("").join(parts))


def _across(style: str, y: float) -> Markup:
    line = '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
    return Markup(line).format(style, _LEFT, _WIDTH - _RIGHT, y, y)


def _text(style: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, visible(text))


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _curve(style: str, places: list[tuple[float, float]]) -> Markup:
    if len(places) == 1:  # a line of one point would be invisible
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(style, *places[0])
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return Markup('<polyline class="{}" points="{}"/>').format(style, points)


def _y_axis(low: float, high: float, place: Callable[[float, float], tuple[float, float]]) -> Markup:
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) or 1.0
    parts = []
    for value in marks:
        _, y = place(0.0, value)
        parts += [_across("grid", y), _text("end", _LEFT - 6, y + 3.5, _tick(value, step))]
    return Markup("").join(parts)


def _tick(value: float, step: float) -> str:
    """A tick with the decimals that its distance from the next one calls for."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(value) < step / 2:
        return "0"
    if digits > 3:
        return scientific(value)
    return count(value) if abs(value) >= 1e4 else number(value, digits)


def _x_axis(
    low: float,
    high: float,
    bottom: float,
    place: Callable[[float, float], tuple[float, float]],
    second: Callable[[float], float] | None,
) -> Markup:
    # A mark in the corner would meet the row's name.
    marks = [mark for mark in ticks(low, high) if place(mark, 0)[0] > _LEFT + 24 and mark == int(mark)] or [high]
    rows = [("step", bottom + 15, [count(mark) for mark in marks])]
    if second:
        rows.append(("tokens", bottom + 30, [count(second(mark)) for mark in marks]))
    parts = [_across("axis", bottom)]
    for name, y, labels in rows:
        parts.append(_text("start", 0, y, name))
        for mark, label in zip(marks, labels, strict=True):
            x, _ = place(mark, 0)
            at_edge = x > _WIDTH - _RIGHT - 8
            parts.append(_text("end" if at_edge else "middle", _WIDTH if at_edge else x, y, label))
    return Markup("").join(parts)


def bar(share: float, style: str = "") -> Markup:
    """A bar that fills `share` (0 to 1) of the space it is given."""
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    svg = (
        '<svg class="bar {}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/><rect class="fill" width="{:.2f}" height="8"/></svg>'
    )
    return Markup(svg).format(style, width)


def dots(points: Sequence[tuple[str, float]], title: str) -> Markup:
    """A few labelled values from 0 to 1 on one path, such as accuracy from chance through the stages."""
    width, height, edge = 300, 84, 30
    step = (width - 2 * edge) / max(len(points) - 1, 1)
    top = max([value for _, value in points] + [0.01]) * 1.15
    places = [(edge + i * step, 52 - 34 * max(value, 0.0) / top) for i, (_, value) in enumerate(points)]
    parts = [_curve("smooth", places)] if len(places) > 1 else []
    for i, ((label, value), (x, y)) in enumerate(zip(points, places, strict=True)):
        style = "mark" if i else "mark first"
        parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(style, x, y))
        parts += [_text("middle value", x, y - 8, percent(value, 0)), _text("middle", x, height - 8, label)]
    svg = '<svg class="chart dots" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(svg).format(width, height, visible(title), Markup("").join(parts))


def load_map(rows: Sequence[Sequence[float]], layers: Sequence[int], title: str) -> Markup:
    """How busy each expert is: a row for each sparse layer, a cell for each expert, darker with more tokens.

    rows: the load of each expert over an even share. A cell is as dark as it gets at three times that; an expert
    without a token is struck through.
    """
    left, pitch, gap = 46, 14, 1
    width, height = (_WIDTH - left) / max(map(len, rows)), pitch * len(rows) + 20
    cell = '<rect class="load" x="{:.2f}" y="{}" width="{:.2f}" height="{}" fill-opacity="{:.3f}"/>'
    dead = '<line class="dead" x1="{:.2f}" x2="{:.2f}" y1="{}" y2="{}"/>'
    parts = []
    for place, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        y = place * pitch
        parts.append(_text("start", 0, y + 10, f"layer {layer}"))
        for i, load in enumerate(row):
            x, wide = left + i * width, max(width - gap, 0.5)
            parts.append(Markup(cell).format(x, y, wide, pitch - gap, min(load / 3, 1.0)))
            if load == 0:
                parts.append(Markup(dead).format(x, x + wide, y + pitch - gap, y))
    parts.append(_text("start", left, height - 6, "expert 0"))
    parts.append(_text("end", _WIDTH, height - 6, f"expert {len(rows[0]) - 1}"))
    svg = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(svg).format(_WIDTH, height, visible(title), Markup("").join(parts))
