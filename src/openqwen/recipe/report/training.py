"""What happened in training: the curves of each stage that has a metrics.jsonl."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from openqwen.recipe.report.charts import Series, line_chart, load_map, smoothed
from openqwen.recipe.report.run import Run, Stage
from openqwen.recipe.report.text import number, scientific


@dataclass
class Curve:
    """One chart with its name and the value at which it ends."""

    name: str
    final: str
    chart: Markup


@dataclass
class StageCurves:
    """The charts of one stage. empty: steps that found nothing to learn from, which an online stage may have."""

    stage: Stage
    steps: int
    tokens: float
    tokens_per_second: float | None
    empty: int
    curves: list[Curve]


# (field, title, level of reference, fixed bounds); a stage shows those that its metrics have.
_EXTRAS: tuple[tuple[str, str, tuple[float, str] | None, tuple[float, float] | None], ...] = (
    ("validation_loss", "Held-out loss", None, None),
    ("accuracy", "Accuracy (chosen above rejected)", (0.5, "chance"), (0.0, 1.0)),
    ("margin", "Margin (chosen − rejected)", (0.0, ""), None),
    ("reward", "Reward of its own answers", None, None),
    ("length", "Length of its answers, tokens", None, None),
    ("next_token_loss", "Loss without the balance", None, None),
    ("balance", "Balance of the experts", None, None),
    ("load_entropy", "Entropy of the experts' load, of an even one", (1.0, "even"), None),
    ("largest_load", "Busiest expert over an even share", (1.0, "even"), None),
    ("dead_experts", "Experts without a token", None, None),
    ("chosen_weight", "Weight of the chosen experts", None, (0.0, 1.0)),
    ("data_stage", "Data stage", None, None),
    ("gradient_norm", "Gradient norm", None, None),
    ("peak_share", "Share of the processor's peak", None, (0.0, 1.0)),
)


def curves(run: Run) -> list[StageCurves]:
    """The charts of each training stage, in the order of the recipe."""
    found = []
    for stage in run.stages:
        records = stage.jsonl("metrics.jsonl") if stage.is_model else []
        if records:
            found.append(_stage_curves(stage, records))
    return found


def _stage_curves(stage: Stage, records: list[dict[str, Any]]) -> StageCurves:
    steps = [step + 1 for step in column(records, "step")]  # steps made, where the log counts from zero
    learnt = [tokens > 0 for tokens in column(records, "tokens")]
    tokens = list(accumulate(t if math.isfinite(t) else 0.0 for t in column(records, "tokens")))
    loss = [value if full else math.nan for value, full in zip(column(records, "loss"), learnt, strict=True)]
    charts = [_curve("Loss", steps, loss, _interpolation(steps, tokens))]
    for field, title, reference, bounds in _EXTRAS:
        values = column(records, field)
        if any(math.isfinite(value) for value in values):
            charts.append(_curve(title, steps, values, None, reference, bounds))
    rate = column(records, "learning_rate")
    if any(math.isfinite(value) for value in rate):
        chart = line_chart([Series(steps, rate)], f"Learning rate of {stage.name}", height=110)
        charts.append(Curve("Learning rate", f"peak {scientific(max(filter(math.isfinite, rate)))}", chart))
    if record := stage.json("experts.json"):
        largest = f"largest {number(max(map(max, record['load'])), 2)} of an even share"
        title = f"Load of the experts of {stage.name} at the end: {largest}"
        charts.append(Curve("Load of the experts", largest, load_map(record["load"], record["layers"], title)))
    total, speed = throughput(records)
    return StageCurves(stage, len(records), total, speed, learnt.count(False), charts)


def _curve(
    title: str,
    steps: list[float],
    values: list[float],
    second_axis: Callable[[float], float] | None,
    reference: tuple[float, str] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Curve:
    final = f"final {number(tail_mean(values))}"
    series = [Series(steps, values, "raw"), Series(steps, smoothed(values), "smooth")]
    return Curve(title, final, line_chart(series, f"{title}: {final}", second_axis, reference, bounds))


def tail_mean(values: list[float]) -> float:
    """The mean over the last twentieth of the steps, as the trainer's own summary has it."""
    tail = [value for value in values[-max(1, len(values) // 20) :] if math.isfinite(value)]
    return sum(tail) / len(tail) if tail else math.nan


def column(records: list[dict[str, Any]], field: str) -> list[float]:
    """One field of every record; NaN where it is missing or no number."""
    values = (record.get(field) for record in records)
    return [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in values]


def throughput(records: list[dict[str, Any]]) -> tuple[float, float | None]:
    """(tokens trained on, tokens a second over all steps); no speed where the log has no times."""
    tokens = math.fsum(t for t in column(records, "tokens") if math.isfinite(t))
    seconds = math.fsum(s for s in column(records, "seconds") if math.isfinite(s))
    return tokens, (tokens / seconds if seconds > 0 else None)


def _interpolation(x: list[float], y: list[float]) -> Callable[[float], float]:
    """The piecewise linear function through points with rising x."""
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b))
    places = [a for a, _ in points]

    def at(value: float) -> float:
        i = bisect.bisect_left(places, value)
        if i == 0 or i == len(points):
            return points[min(i, len(points) - 1)][1]
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        return y0 + (y1 - y0) * (value - x0) / (x1 - x0)

    return at
