"""The report's results: the cards at the top, the table of scores, accuracy by task."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from openqwen.recipe.report.run import EVALUATE, FinishedStage, Run
from openqwen.recipe.report.training import throughput
from openqwen.support.page.text import number, percent, signed

REWARD_TARGET = 0.65  # the pair accuracy that the recipe promises


@dataclass(frozen=True)
class Score:
    """A column of the table; lower: whether less is better, scale: factor of shown differences."""

    key: str
    title: str
    lower: bool
    show: Callable[[Any], str]
    scale: float = 1.0
    digits: int = 3


@dataclass
class ScoreCell:
    """A score, its 95 % interval, its change (see `_row`), and whether the change is better."""

    text: str
    interval: str = ""
    change: str = ""
    better: bool | None = None


@dataclass
class ScoreRow:
    """A stage in the table of scores."""

    stage: FinishedStage
    evaluation: FinishedStage | None
    tokens: float
    tokens_per_second: float | None
    cells: list[ScoreCell | None] = field(default_factory=list)


def _ratio(value: Any) -> str:
    return f"{number(value)}×"


SCORES = (
    Score("bits_per_byte", "bits per byte", True, number),
    Score("test_bits_per_byte", "bits per byte, test", True, number),
    Score("copying_saved", "copying, nats saved", False, number),
    Score("checked_accuracy", "checked accuracy", False, percent, 100, 1),
    Score("sampled_accuracy", "checked, sampled", False, percent, 100, 1),
    Score("test_accuracy", "test, greedy", False, percent, 100, 1),
    Score("test_at_0.7_accuracy", "test, at 0.7", False, percent, 100, 1),
    Score("test_sampled_accuracy", "test, at 1.0", False, percent, 100, 1),
    Score("test_style", "style, greedy", False, percent, 100, 1),
    Score("test_sampled_style", "style, at 1.0", False, percent, 100, 1),
    Score("test_pair_accuracy", "pair accuracy, test", False, percent, 100, 1),
    Score("test_near_accuracy", "near misses, test", False, percent, 100, 1),
    Score("win_rate", "win rate (reward)", False, percent, 100, 1),
    Score("win_rate_checked", "win rate (checks)", False, percent, 100, 1),
    Score("reward_mean", "mean reward", False, number),
    Score("retention", "retention", True, _ratio),
)


def score_table(run: Run) -> dict[str, Any]:
    """Return a row for each stage that is no evaluation, reference levels, and sums of time.

    A score that no stage has gets no column.
    """
    present = [score for score in SCORES if run.scored(score.key)]
    named = {name for names in run.scored("benchmarks").values() for name in names}
    present += [Score(name, name, False, percent, 100, 1) for name in sorted(named)]
    levels = {
        "bits_per_byte": run.first("gzip_bits_per_byte"),
        "test_bits_per_byte": run.first("test_gzip_bits_per_byte"),
        "checked_accuracy": run.first("chance"),
        "test_accuracy": run.first("chance"),
        "test_pair_accuracy": 0.5,
        "test_near_accuracy": 0.5,
        "win_rate": 0.5,
        "win_rate_checked": 0.5,
        "retention": 1.0,
    }
    before: dict[str, float] = {}
    rows = [_row(run, stage, present, before) for stage in run.stages if not stage.is_evaluation]
    return {
        "scores": present,
        "rows": rows,
        "reference": [
            score.show(levels[score.key]) if score.key in levels else "" for score in present
        ],
        "stages_seconds": sum(row.stage.seconds for row in rows),
        "evaluations_seconds": sum(row.evaluation.seconds for row in rows if row.evaluation),
        "tokens": sum(row.tokens or 0 for row in rows),
    }


def _row(
    run: Run, stage: FinishedStage, present: list[Score], before: dict[str, float]
) -> ScoreRow:
    """Return the row of a stage; before: the last value of each score, updated here.

    A change is relative to the model that the stage started from, if its scores name it, otherwise
    to the last value.
    """
    records = stage.jsonl("metrics.jsonl") if stage.is_model else []
    row = ScoreRow(stage, run.stage(EVALUATE + stage.name), *throughput(records))
    values = run.scores(stage.name)
    start = run.scores(values["start"]) if "start" in values else before
    for score in present:
        value = values.get(score.key)
        if value is None:
            row.cells.append(None)
            continue
        low, high = values.get(f"{score.key}_low"), values.get(f"{score.key}_high")
        show = partial(percent, digits=0) if score.show is percent else score.show
        cell = ScoreCell(score.show(value), "" if low is None else f"{show(low)} to {show(high)}")
        if score.key in start:
            change = value - start[score.key]
            cell.change = "±0"
            if abs(change) * score.scale >= 0.5 * 10**-score.digits:
                cell.change = signed(change * score.scale, score.digits)
                cell.better = (change < 0) == score.lower
        before[score.key] = value
        row.cells.append(cell)
    return row


TEMPERATURES = (("greedy", "test"), ("at 0.7", "test_at_0.7"), ("at 1.0", "test_sampled"))


def gain_table(run: Run) -> list[tuple[str, list[tuple[float, float, float] | None]]]:
    """Return what each stage gained on its start at each temperature, in points with intervals.

    The first rows are the control: what a start gains on itself at 1.0 when sampled at 0.9.
    """
    rows: list[tuple[str, list[tuple[float, float, float] | None]]] = []
    for name in run.scored("test_cooler_gain"):
        control = _points(run.scores(name), "test_cooler_gain")
        rows.append((f"{name} at 0.9, on itself", [None, None, control]))
    for name, start in run.scored("start").items():
        gains = [_points(run.scores(name), f"{key}_gain") for _, key in TEMPERATURES]
        rows.append((f"{name}, on {start}", gains))
    return rows


def _points(scores: dict[str, Any], key: str) -> tuple[float, float, float] | None:
    if key not in scores:
        return None
    value, low, high = (100 * scores[f"{key}{end}"] for end in ("", "_low", "_high"))
    return value, low, high


def task_table(run: Run) -> dict[str, Any] | None:
    """Return each task's accuracy at each stage; share: 0 at chance, 100 at perfect."""
    stages, by_task = _by_name(run, "checked_by_task")
    if not by_task:
        return None
    rows = []
    for task, results in by_task.items():
        known = next(result for result in results if result)
        cells = [
            _heat(result["accuracy"], result.get("chance", 0.0)) if result else None
            for result in results
        ]
        row = {"name": task, "chance": known.get("chance"), "n": known.get("n"), "cells": cells}
        rows.append(row)
    chance = run.first("chance")
    total = [run.scores(name).get("checked_accuracy") for name in stages]
    cells = [_heat(value, chance or 0.0) if value is not None else None for value in total]
    return {"stages": stages, "rows": rows, "all": {"chance": chance, "cells": cells}}


def _heat(accuracy: float, chance: float) -> dict[str, Any]:
    share = (accuracy - chance) / (1 - chance) if chance < 1 else 0.0
    return {
        "text": percent(accuracy, 0),
        "share": round(min(max(share, 0.0), 1.0) * 100),
        "below": accuracy < chance,
    }


def source_table(run: Run) -> dict[str, Any] | None:
    """Return the bits per byte of each source at each evaluated stage."""
    stages, by_source = _by_name(run, "bits_per_byte_by_source")
    gzip = run.first("gzip_bits_per_byte_by_source") or {}
    rows = [
        {"name": name, "gzip": gzip.get(name), "cells": cells} for name, cells in by_source.items()
    ]
    return {"stages": stages, "rows": rows} if rows else None


def position_table(run: Run) -> dict[str, Any] | None:
    """Return the loss by position in long texts of each stage before SFT."""
    scored = {name: values for name, values in run.scored("loss_by_position").items() if values}
    ranges: list[list[float]] = next(iter(scored.values()), [])
    rows = [
        {"name": name, "cells": [loss for _, _, loss in values]} for name, values in scored.items()
    ]
    return {"ranges": [(start, end) for start, end, _ in ranges], "rows": rows} if rows else None


def _by_name(run: Run, key: str) -> tuple[list[str], dict[str, list[Any]]]:
    """Return (stages with this score, name in it -> its value or None at each of them)."""
    scored = run.scored(key)
    names = sorted({name for values in scored.values() for name in values})
    return list(scored), {name: [values.get(name) for values in scored.values()] for name in names}


def headlines(run: Run) -> dict[str, Any]:
    """Return the values of the cards and the summary; what was not measured is empty or None.

    base: bits per byte before alignment. win: the scores of the last stage with a win rate.
    retention: the ratios of all stages. Lists hold (stage, value) pairs.
    """
    wins, retention = run.scored("win_rate"), run.scored("retention")
    bits = run.scored("bits_per_byte")
    return {
        "base": [(name, bits[name]) for name in ("pretrain", "extend") if name in bits],
        "gzip": run.first("gzip_bits_per_byte"),
        "chance": run.first("chance"),
        "solved": _solved(run),
        "pairs": run.scores("reward") if "test_pair_accuracy" in run.scores("reward") else None,
        "target": REWARD_TARGET,
        "win": {"stage": list(wins)[-1], **run.scores(list(wins)[-1])} if wins else None,
        "retention": list(retention.items()),
        "corpus": run.json("corpus", "corpus.json"),
    }


def _solved(run: Run) -> dict[str, Any] | None:
    """Return the accuracies on the test split, and what the last stage gained on its start.

    above: whether SFT's interval lies above chance and above the base model; None before SFT.
    moved: whether `above` holds and some gain's interval lies above zero; at temperature 1.0 it
    must lie above what cooler sampling alone gains.
    """
    results = run.scored("test_accuracy")
    if not results:
        return None
    floors = [("chance", run.first("chance")), ("base", run.first("checked_accuracy"))]
    points = [(name, value) for name, value in [*floors, *results.items()] if value is not None]
    name, scores = list(results)[-1], run.scores(list(results)[-1])
    by_temperature = [(title, key, _points(scores, f"{key}_gain")) for title, key in TEMPERATURES]
    gains = [(title, *gain) for title, _, gain in by_temperature if gain]
    control = 100 * run.scores(scores.get("start", "")).get("test_cooler_gain", 0.0)
    above = moved = None
    if "sft" in results:
        floor = max(value for _, value in floors if value is not None)
        above = run.scores("sft").get("test_accuracy_low", 0.0) > floor
        bars = {"test_sampled": control}
        beyond = any(gain[1] > bars.get(key, 0.0) for _, key, gain in by_temperature if gain)
        moved = above and (not gains or beyond)
    solved = {"stage": name, "scores": scores, "points": points, "gains": gains}
    return solved | {"above": above, "moved": moved}
