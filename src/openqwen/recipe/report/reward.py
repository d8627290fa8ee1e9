"""The reward model's section: calibration, accuracy by length difference and by criterion."""

from collections.abc import Sequence
from typing import Any

from openqwen.recipe.report.run import Run
from openqwen.support.page.charts import LEFT, RIGHT, TOP, LineChart, scale, ticks
from openqwen.support.page.text import number, percent

_HEIGHT = 190


def reward_section(run: Run) -> dict[str, Any] | None:
    """Return charts and tables of the test pairs' scores (see `evaluate.reward_report`)."""
    scores = run.scores("reward")
    bins, by_length = scores.get("test_calibration"), scores.get("test_by_length")
    if not bins or not by_length:
        return None
    largest = max(row["predicted"] for row in bins)
    across = scale(0.5, largest, LEFT, RIGHT)
    along = [(across(x), percent(x, 0)) for x in ticks(0.5, largest) if x > 0.5]
    calibration = _chart(
        "Accuracy by predicted probability",
        [across(row["predicted"]) for row in bins],
        bins,
        [("predicted", along)],
        diagonal=[(0.5, across(0.5)), (largest, across(largest))],
    )
    across = scale(-0.5, len(by_length) - 0.5, LEFT, RIGHT)
    places = [across(n) for n in range(len(by_length))]
    ends = [
        (name, [(x, number(row[name], 0)) for x, row in zip(places, by_length)])
        for name in ("from", "to")
    ]
    return {
        "calibration": calibration,
        "length": _chart("Accuracy by length difference", places, by_length, ends),
        "criteria": sorted((scores.get("test_by_criterion") or {}).items()),
        "scores": scores,
    }


def _chart(
    title: str,
    places: Sequence[float],
    rows: Sequence[dict[str, float]],
    x_rows: list[tuple[str, list[tuple[float, str]]]],
    diagonal: Sequence[tuple[float, float]] = (),
) -> LineChart:
    """Accuracies from 0 to 1 with their intervals. diagonal: (accuracy, x) of a reference line."""
    bottom = _HEIGHT - 8 - 16 * len(x_rows)
    up = scale(0.0, 1.0, bottom, TOP)
    points = [(x, up(row["accuracy"])) for x, row in zip(places, rows)]
    curves = {"raw": [(x, up(y)) for y, x in diagonal], "smooth": points}
    return LineChart(
        title,
        _HEIGHT,
        bottom,
        y_ticks=[(up(value), percent(value, 0)) for value in ticks(0.0, 1.0, 5)],
        x_rows=x_rows,
        reference=None if diagonal else (up(0.5), "chance"),
        curves=[(style, curve) for style, curve in curves.items() if curve],
        bars=[(x, up(row["low"]), up(row["high"])) for x, row in zip(places, rows)],
    )
