import math
import re

import numpy as np
import pytest

from openqwen.support.page import environment
from openqwen.support.page.charts import downsampled, line_chart, smoothed, ticks
from openqwen.support.page.text import count, number, shortened, size, visible


def test_downsampling_keeps_ends_and_spikes():
    y = np.sin(np.arange(10_000) / 500)
    y[6543] = 40.0
    points = downsampled(list(range(10_000)), list(y))
    assert len(points) <= 400
    assert (6543, 40.0) in points
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert downsampled([1, 2], [3.0, math.inf]) == [(1, 3.0)]


def test_smoothing_of_a_constant_is_that_constant():
    np.testing.assert_allclose(smoothed([2.5] * 300), 2.5)
    np.testing.assert_allclose(smoothed([1.0, math.nan, 1.0]), 1.0)


def test_smoothing_is_a_centred_mean():
    values = np.random.default_rng(0).random(400)
    smooth = smoothed(list(values))
    np.testing.assert_allclose(smooth[200], values[190:211].mean())
    assert smooth[0] == values[0]
    np.testing.assert_allclose(smooth[-1], values[-11:].mean())


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1.93, 8.31), (-0.4, 1.7), (1, 1500), (3e-5, 3e-4), (5, 5)]
)
def test_ticks_are_few_even_and_inside(low, high):
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 6
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    if len(marks) > 2:
        np.testing.assert_allclose(np.diff(marks), marks[1] - marks[0])


@pytest.mark.parametrize(
    "values", [[], [1.0], [2.0] * 5, [math.nan] * 3, [1e-9, 2e-9], [1e12, -1e12]]
)
def test_charts_survive_degenerate_curves(values):
    chart = line_chart(list(range(len(values))), {"smooth": values}, "a <title>")
    drawn = (
        environment("openqwen.recipe.report")
        .get_template("charts.html.j2")
        .module.line_chart(chart)
    )
    assert ("<svg" in drawn) == bool(np.isfinite(values).any())
    assert "nan" not in re.sub(r"<p.*", "", drawn)
    assert "<title>" not in drawn


def test_texts_and_numbers():
    assert visible("a\x00b\tc\nd\u200b\x7f é 語") == "a‹U+0000›b\tc\nd‹U+200B›‹U+007F› é 語"
    assert shortened("abcdef", 4) == ("abcd", "cut: 4 of 6 characters")
    assert [count(n) for n in (0, 9999, 12_345, 4_100_000)] == ["0", "9,999", "12.3k", "4.1M"]
    assert [size(n) for n in (12, 1500, 21_400_000)] == ["12\u202fB", "1.5\u202fkB", "21.4\u202fMB"]
    assert [number(n) for n in (1.23456, 0.00012, None, math.nan)] == [
        "1.235",
        "1.2e-4",
        "–",
        "nan",
    ]
