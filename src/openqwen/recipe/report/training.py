"""The training curves of each stage that has a metrics.jsonl."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from openqwen.recipe.report.run import FinishedStage, Run
from openqwen.support.page.charts import LineChart, line_chart, smoothed
from openqwen.support.page.text import finite, number, scientific


@dataclass
class Curve:
    """A chart with its name and its final value; chart is None where no value is finite."""

    name: str
    final: str
    chart: LineChart | None


@dataclass
class StageCurves:
    """The charts of one stage.

    empty: steps without anything to learn, which online stages may have. experts: {"layers",
    "load"}, the load of each expert of each sparse layer over an even share; None for a dense
    network.
    """

    stage: FinishedStage
    steps: int
    tokens: float
    tokens_per_second: float | None
    empty: int
    curves: list[Curve]
    experts: dict[str, Any] | None
    samples: list[dict[str, Any]]


# (field, title, reference level, fixed bounds); a stage shows the fields that its metrics have.
_EXTRAS: tuple[tuple[str, str, tuple[float, str] | None, tuple[float, float] | None], ...] = (
    ("validation_loss", "Held-out loss", None, None),
    ("accuracy", "Accuracy (chosen above rejected)", (0.5, "chance"), (0.0, 1.0)),
    ("margin", "Margin (chosen − rejected)", (0.0, ""), None),
    ("reward", "Reward of its own answers", None, None),
    ("win_rate", "Win rate over the reference's answers", (0.5, "even"), (0.0, 1.0)),
    ("kl", "Divergence from the reference, per token", None, None),
    ("entropy", "Entropy of its answers, per token", None, None),
    ("length", "Length of its answers, tokens", None, None),
    ("truncated", "Answers cut off by max_tokens", None, (0.0, 1.0)),
    ("clip_share", "Tokens with a clipped ratio", None, (0.0, 1.0)),
    ("importance", "Correction for the sampler", (1.0, "none"), None),
    ("without_variance", "Prompts whose answers have one reward", None, (0.0, 1.0)),
    ("refilled", "Prompts replaced by others", None, (0.0, 1.0)),
    ("bad_rewards", "Answers without a reward", None, None),
    ("next_token_loss", "Loss without the balance", None, None),
    ("balance", "Balance of the experts", None, None),
    ("load_entropy", "Entropy of the experts' load, of an even one", (1.0, "even"), None),
    ("largest_load", "Busiest expert over an even share", (1.0, "even"), None),
    ("dead_experts", "Experts without a token", None, None),
    ("chosen_weight", "Weight of the chosen experts", None, (0.0, 1.0)),
    ("data_stage", "Data stage", None, None),
    ("gradient_norm", "Gradient norm", None, None),
    ("mfu", "MFU", None, (0.0, 1.0)),
    ("peak_share", "MFU", None, (0.0, 1.0)),  # its name in earlier runs
)


def curves(run: Run) -> list[StageCurves]:
    """Return the charts of each training stage, in the order of the recipe."""
    logs = [(stage, stage.jsonl("metrics.jsonl")) for stage in run.stages if stage.is_model]
    return [_stage_curves(stage, records) for stage, records in logs if records]


def _stage_curves(stage: FinishedStage, records: list[dict[str, Any]]) -> StageCurves:
    steps, tokens = column(records, "step") + 1, column(records, "tokens")  # the log starts at 0
    learnt = tokens > 0
    loss = np.where(learnt, column(records, "loss"), np.nan)
    charts = [_curve("Loss", steps, loss, None, None, np.nancumsum(tokens))]
    for field, title, reference, bounds in _EXTRAS:
        values = column(records, field)
        if np.isfinite(values).any():
            charts.append(_curve(title, steps, values, reference, bounds))
    rate = column(records, "learning_rate")
    if np.isfinite(rate).any():
        chart = line_chart(steps, {"smooth": rate}, f"Learning rate of {stage.name}", height=110)
        charts.append(Curve("Learning rate", f"peak {scientific(np.nanmax(rate))}", chart))
    total, speed = throughput(records)
    experts = stage.json("experts.json")
    samples = stage.jsonl("samples.jsonl")
    ends = {line["step"] for line in (samples[:1] + samples[-1:])}
    shown = [line for line in samples if line["step"] in ends]
    empty = int((~learnt).sum())
    return StageCurves(stage, len(records), total, speed, empty, charts, experts, shown)


def _curve(
    title: str,
    steps: np.ndarray,
    values: np.ndarray,
    reference: tuple[float, str] | None,
    bounds: tuple[float, float] | None,
    tokens: np.ndarray | None = None,
) -> Curve:
    final = f"final {number(tail_mean(values))}"
    drawn = {"raw": values, "smooth": smoothed(values)}
    chart = line_chart(steps, drawn, f"{title}: {final}", tokens, reference, bounds)
    return Curve(title, final, chart)


def tail_mean(values: np.ndarray) -> float:
    """Return the mean over the last twentieth of the steps, as the trainer's summary does."""
    tail = values[-max(1, len(values) // 20) :]
    tail = tail[np.isfinite(tail)]
    return float(tail.mean()) if len(tail) else np.nan


def column(records: list[dict[str, Any]], field: str) -> np.ndarray:
    """Return one field of every record; NaN where it is missing or not a finite number."""
    numbers = (finite(record.get(field)) for record in records)
    return np.array([np.nan if number is None else number for number in numbers], dtype=float)


def throughput(records: list[dict[str, Any]]) -> tuple[float, float | None]:
    """Return (tokens trained on, tokens per second); the speed is None if the log has no times."""
    tokens, seconds = (float(np.nansum(column(records, field))) for field in ("tokens", "seconds"))
    return tokens, (tokens / seconds if seconds > 0 else None)
