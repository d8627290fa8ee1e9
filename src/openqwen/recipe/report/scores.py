"""The results: the cards at the top, the one table of scores, accuracy by task."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from openqwen.recipe.report.charts import bar, dots
from openqwen.recipe.report.data import corpus_total
from openqwen.recipe.report.run import EVALUATE, Run, Stage
from openqwen.recipe.report.text import THIN, count, duration, number, percent, signed, size
from openqwen.recipe.report.training import throughput

REWARD_TARGET = 0.65  # the pair accuracy that the recipe promises


@dataclass
class Card:
    """One headline result. moved: whether the number moved as it should; None where nothing can be said."""

    title: str
    value: str
    text: str
    moved: bool | None = None
    verdict: str = ""
    figure: Markup | None = None


@dataclass(frozen=True)
class Score:
    """A column of the table. lower: whether less is better. scale: what a difference is multiplied by for showing."""

    key: str
    title: str
    lower: bool
    show: Callable[[Any], str]
    scale: float = 1.0
    digits: int = 3


@dataclass
class Cell:
    """A score as text, its 95 % interval, its change against the row above that has one, and whether that is better."""

    text: str
    interval: str = ""
    change: str = ""
    better: bool | None = None


@dataclass
class Row:
    """A stage in the table of scores."""

    stage: Stage
    evaluation: Stage | None
    tokens: float
    tokens_per_second: float | None
    cells: list[Cell | None] = field(default_factory=list)


def _ratio(value: Any) -> str:
    return f"{number(value)}×"


SCORES = (
    Score("bits_per_byte", "bits per byte", True, number),
    Score("test_bits_per_byte", "bits per byte, test", True, number),
    Score("checked_accuracy", "checked accuracy", False, percent, 100, 1),
    Score("sampled_accuracy", "checked, sampled", False, percent, 100, 1),
    Score("test_accuracy", "test, greedy", False, percent, 100, 1),
    Score("test_sampled_accuracy", "test, sampled", False, percent, 100, 1),
    Score("test_pair_accuracy", "pair accuracy, test", False, percent, 100, 1),
    Score("test_near_accuracy", "near misses, test", False, percent, 100, 1),
    Score("win_rate", "win rate (reward)", False, percent, 100, 1),
    Score("win_rate_checked", "win rate (checks)", False, percent, 100, 1),
    Score("reward_mean", "mean reward", False, number),
    Score("retention", "retention", True, _ratio),
)


def score_table(run: Run) -> dict[str, Any]:
    """Rows for every stage that is not itself an evaluation, a row of reference levels, and the sums of time.

    A score that no stage has yet gets no column.
    """
    present = [score for score in SCORES if _with_score(run, score.key)]
    levels = {"bits_per_byte": _gzip(run), "checked_accuracy": _chance(run), "retention": 1.0}
    levels |= dict.fromkeys(("test_pair_accuracy", "test_near_accuracy", "win_rate", "win_rate_checked"), 0.5)
    levels |= {"test_accuracy": _chance(run), "test_bits_per_byte": _first(run, "test_gzip_bits_per_byte")}
    before: dict[str, float] = {}
    rows = [_row(run, stage, present, before) for stage in run.stages if not stage.is_evaluation]
    return {
        "scores": present,
        "rows": rows,
        "reference": [score.show(levels[score.key]) if score.key in levels else "" for score in present],
        "stages_seconds": sum(row.stage.seconds for row in rows),
        "evaluations_seconds": sum(row.evaluation.seconds for row in rows if row.evaluation),
        "tokens": sum(row.tokens or 0 for row in rows),
    }


def _row(run: Run, stage: Stage, present: list[Score], before: dict[str, float]) -> Row:
    """The row of a stage; `before` holds the last value of each score and is brought up to date."""
    records = stage.jsonl("metrics.jsonl") if stage.is_model else []
    row = Row(stage, run.stage(EVALUATE + stage.name), *throughput(records))
    values = run.scores(stage.name)
    for score in present:
        value = values.get(score.key)
        if value is None:
            row.cells.append(None)
            continue
        cell = Cell(score.show(value), _range(values, score.key))
        if score.key in before:
            change = value - before[score.key]
            if abs(change) * score.scale >= 0.5 * 10**-score.digits:
                cell.change, cell.better = signed(change * score.scale, score.digits), (change < 0) == score.lower
            else:
                cell.change = "±0"
        before[score.key] = value
        row.cells.append(cell)
    return row


def task_table(run: Run) -> dict[str, Any] | None:
    """Accuracy of each task at each evaluated stage, with how far it is from chance to perfect (`share`)."""
    stages = [name for name in run.evaluated if run.scores(name).get("checked_by_task")]
    by_stage = {name: run.scores(name)["checked_by_task"] for name in stages}
    tasks = sorted({task for results in by_stage.values() for task in results})
    if not tasks:
        return None
    rows = []
    for task in tasks:
        results = [by_stage[name].get(task) for name in stages]
        known = next(result for result in results if result)
        cells = [_heat(result["accuracy"], result.get("chance", 0.0)) if result else None for result in results]
        rows.append({"name": task, "chance": known.get("chance"), "n": known.get("n"), "cells": cells})
    total = [run.scores(name).get("checked_accuracy") for name in stages]
    cells = [_heat(value, _chance(run) or 0.0) if value is not None else None for value in total]
    return {"stages": stages, "rows": rows, "all": {"chance": _chance(run), "cells": cells}}


def _heat(accuracy: float, chance: float) -> dict[str, Any]:
    share = (accuracy - chance) / (1 - chance) if chance < 1 else 0.0
    return {"text": percent(accuracy, 0), "share": round(min(max(share, 0.0), 1.0) * 100), "below": accuracy < chance}


def pair_table(run: Run) -> list[dict[str, Any]]:
    """The reward model's pair accuracy by task."""
    results = run.scores("reward").get("pair_accuracy_by_task") or {}
    rows = []
    for task, result in sorted(results.items()):
        accuracy, pairs = (result["accuracy"], result.get("n")) if isinstance(result, dict) else (result, None)
        rows.append({"name": task, "text": percent(accuracy), "n": pairs, "bar": bar(accuracy)})
    return rows


def source_table(run: Run) -> dict[str, Any] | None:
    """Bits per byte of each source at each evaluated stage."""
    stages = [name for name in run.evaluated if run.scores(name).get("bits_per_byte_by_source")]
    by_stage = {name: run.scores(name)["bits_per_byte_by_source"] for name in stages}
    sources = sorted({source for results in by_stage.values() for source in results})
    if not sources:
        return None
    gzip: dict[str, float] = next((table for _, table in _with_score(run, "gzip_bits_per_byte_by_source")), {})
    rows = [
        {"name": source, "gzip": gzip.get(source), "cells": [by_stage[name].get(source) for name in stages]}
        for source in sources
    ]
    return {"stages": stages, "rows": rows}


def cards(run: Run) -> list[Card]:
    """The headline results that exist, most fundamental first."""
    built = (_bits_card(run), _accuracy_card(run), _pair_card(run), _win_card(run), _retention_card(run))
    return [card for card in built if card]


def _with_score(run: Run, key: str) -> list[tuple[str, Any]]:
    """(stage, value) of every evaluated stage that has this score, in order."""
    return [(name, run.scores(name)[key]) for name in run.evaluated if run.scores(name).get(key) is not None]


def _first(run: Run, key: str) -> Any:
    """This score of the first evaluated stage that has it."""
    return next((value for _, value in _with_score(run, key)), None)


def _gzip(run: Run) -> float | None:
    """What gzip -9 makes of the very documents that bits per byte was measured on."""
    return _first(run, "gzip_bits_per_byte")


def _corpus(run: Run) -> dict[str, Any]:
    return run.json("corpus", "corpus.json") or {}


def _chance(run: Run) -> float | None:
    return _first(run, "chance")


def _base(run: Run) -> list[tuple[str, float]]:
    """Bits per byte of the stages before alignment."""
    return [(name, value) for name, value in _with_score(run, "bits_per_byte") if name in ("pretrain", "extend")]


def _bits_card(run: Run) -> Card | None:
    base, gzip = _base(run), _gzip(run)
    if not base:
        return None
    name, value = base[-1]
    before = f"; {number(base[0][1])} after {base[0][0]}" if len(base) > 1 else ""
    card = Card("Bits per byte, held out", number(value), f"after {name}{before}")
    if gzip:
        top = max(gzip, value)
        label = Markup('<span class="legend"><span>{}</span>{}<span>{}</span></span>')
        card.figure = label.format(name, bar(value / top), number(value)) + label.format(
            "gzip -9", bar(gzip / top, "grey"), number(gzip)
        )
        card.moved = value < gzip
        card.verdict = (
            f"{percent(abs(1 - value / gzip), 0)} {'below' if card.moved else 'above'} gzip -9 on the same texts"
        )
    return card


def _accuracy_card(run: Run) -> Card | None:
    """Tasks solved on the test split, and what preference learning gained there on the SFT model."""
    results = _with_score(run, "test_accuracy")
    if not results:
        return None
    named = dict(results)
    base = _with_score(run, "checked_accuracy")[0][1]
    points = [
        (name, value) for name, value in [("chance", _chance(run)), ("base", base), *results] if value is not None
    ]
    name, value = results[-1]
    scores = run.scores(name)
    text = f"after {name}{_interval(scores, 'test_accuracy')}; sampled {percent(scores['test_sampled_accuracy'])}"
    card = Card("Test tasks solved", percent(value), text, figure=dots(points, "Test accuracy by stage"))
    if "sft" not in named:
        return card
    floor = max(value for name, value in points if name in ("chance", "base"))
    above = run.scores("sft").get("test_accuracy_low", 0.0) > floor
    gains = [f"{title} {_gain(scores, key)}" for title, key in _GAINS if key in scores]
    rose = any(scores.get(f"{key}_low", 0.0) > 0 for _, key in _GAINS)
    card.moved = above and (not gains or rose)
    card.verdict = f"sft {'clearly above' if above else 'not clearly above'} chance and base"
    if gains:
        card.verdict += f"; {name} on sft, points: {', '.join(gains)}"
    return card


_GAINS = (("greedy", "test_gain"), ("sampled", "test_sampled_gain"))


def _gain(scores: dict[str, Any], key: str) -> str:
    gain, low, high = (signed(100 * scores[f"{key}{end}"], 1) for end in ("", "_low", "_high"))
    return f"{gain} ({low} to {high})"


def _pair_card(run: Run) -> Card | None:
    scores = run.scores("reward")
    accuracy = scores.get("test_pair_accuracy")
    if accuracy is None:
        return None
    text = f"{count(scores.get('test_pair_accuracy_n'))} test pairs{_interval(scores, 'test_pair_accuracy')}"
    if scores.get("test_near_accuracy") is not None:
        text += f"; near misses {percent(scores['test_near_accuracy'])}{_interval(scores, 'test_near_accuracy')}"
    moved = accuracy > REWARD_TARGET
    verdict = f"{'above' if moved else 'not above'} {percent(REWARD_TARGET, 0)}; chance is {percent(0.5, 0)}"
    return Card("Reward model, pairs ranked right", percent(accuracy), text, moved, verdict, bar(accuracy))


def _win_card(run: Run) -> Card | None:
    results = _with_score(run, "win_rate")
    if not results:
        return None
    name, value = results[-1]
    scores = run.scores(name)
    text = f"{name} against sft, by the reward model{_interval(scores, 'win_rate')}"
    if scores.get("win_rate_checked") is not None:
        text += f"; by the checks {percent(scores['win_rate_checked'])}"
    moved = scores.get("win_rate_low", value) > 0.5
    verdict = f"{'above' if moved else 'not clearly above' if value > 0.5 else 'not above'} one half"
    return Card("Win rate", percent(value), text, moved, verdict, bar(value))


def _interval(scores: dict[str, Any], key: str) -> str:
    found = _range(scores, key)
    return f", 95{THIN}% interval {found}" if found else ""


def _range(scores: dict[str, Any], key: str) -> str:
    low, high = scores.get(f"{key}_low"), scores.get(f"{key}_high")
    return "" if low is None or high is None else f"{percent(low, 0)} to {percent(high, 0)}"


def _retention_card(run: Run) -> Card | None:
    results = _with_score(run, "retention")
    if not results:
        return None
    name, value = results[-1]
    rest = ", ".join(f"{stage} {_ratio(ratio)}" for stage, ratio in results[:-1])
    text = f"bits per byte after {name}, as a multiple of extend's" + (f" ({rest})" if rest else "")
    verdict = f"alignment tax {signed(100 * (value - 1), 1)}{THIN}%"
    return Card("Retention", _ratio(value), text, None, verdict)


def summary(run: Run) -> str:
    """One paragraph: what was run, on what, for how long, and what came out."""
    if not run.stages:
        return "No stage of this run has finished yet."
    machine = run.stages[-1].machine
    sentences = [
        f"{len(run.stages)} stage{'s' * (len(run.stages) != 1)}, {duration(run.seconds)} of work{_machine(machine)}."
    ]
    corpus = _corpus(run)
    if corpus:
        read, (kept, text) = corpus["read"], corpus_total(corpus)
        sentences.append(f"It read {count(read['documents'])} documents ({size(read['bytes'])})")
        sentences[-1] += f" and made a corpus of {count(kept)} ({size(text)})."
    base, gzip = _base(run), _gzip(run)
    if base:
        against = f", where gzip -9 needs {number(gzip)}" if gzip else ""
        sentences.append(f"On held-out documents the base model needs {number(base[-1][1])} bits per byte{against}.")
    solved = dict(_with_score(run, "test_accuracy"))
    last = next((name for name in ("online-dpo", "dpo", "sft") if name in solved), None)
    if last:
        chance = _chance(run)
        by_chance = f"; chance is {percent(chance)}" if chance is not None else ""
        sentences.append(f"After {last} it solves {percent(solved[last])} of the test tasks{by_chance}.")
    return " ".join(sentences)


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    device = machine.get("device") or "cpu"
    return f" on {machine.get('cpu', 'an unnamed CPU')}{cores}" + (f" and {device}" if device != "cpu" else "")
