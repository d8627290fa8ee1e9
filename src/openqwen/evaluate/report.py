"""The page of one evaluation or of several side by side, with the same in Markdown and JSON."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from openqwen.evaluate.benchmark import REPORTS
from openqwen.evaluate.bradley_terry import Game, games_of, rate
from openqwen.evaluate.compare import Evaluation, compare_on
from openqwen.support.files import write_json, write_text
from openqwen.support.page import environment
from openqwen.support.page.text import percent, signed

_SHOWN = 100  # answers of each kind on the page; the files have all


def write_reports(folder: Path, evaluations: Sequence[Evaluation]) -> Path:
    """Write report.html, report.md and report.json into a folder; returns the page's path.

    The page loads nothing from elsewhere. Of several models each is compared with the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {name for evaluation in evaluations for name in evaluation.scores}
    tables = [_benchmark(name, evaluations) for name in sorted(found)]
    labels = _labels(evaluations)
    pages = environment(__name__.rpartition(".")[0])
    pages.filters["tokens"] = _tokens
    page = pages.get_template("evaluation.html.j2")
    contents = {"evaluations": evaluations, "labels": labels, "benchmarks": tables}
    contents["reports"] = list(REPORTS.values())
    contents["heat_maps"] = _heat_maps(evaluations, labels)
    contents["positions"] = positions = _positions(evaluations, labels)
    contents["longest_positions"] = max((one[2] for one in positions), key=len, default=[])
    write_text(folder / "report.html", page.render(contents))
    write_text(folder / "report.md", _markdown(tables, labels))
    kept = ("name", "scores", "published", "comparisons")
    plain = [{key: table[key] for key in kept} for table in tables]
    write_json(folder / "report.json", {"models": labels, "benchmarks": plain})
    return folder / "report.html"


def _heat_maps(
    evaluations: Sequence[Evaluation], labels: Sequence[str]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The mean scores by row (such as the depth) and length: for each benchmark, of each model and
    way to read long prompts.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for evaluation, label in zip(evaluations, labels):
        for name, scores in evaluation.scores.items():
            cells: dict[tuple[str, int], list[float]] = {}
            for row in evaluation.rows(name) if scores.get("long") else []:
                if row["status"] != "infra":
                    cells.setdefault((row["cell"][0], row["cell"][1]), []).append(row["score"])
            if cells:
                one = {"label": label, "reading": scores["reading"] or "", **_grid(cells)}
                found.setdefault(scores["title"], []).append(one)
    return sorted(found.items())


def _tokens(length: float) -> str:
    """A length in tokens: 512, 4k, 128k (k is 1,024)."""
    return f"{length / 1024:.3g}k" if length >= 1024 else f"{length:.0f}"


def _grid(cells: Mapping[tuple[str, int], Sequence[float]]) -> dict[str, Any]:
    """Means by row and by length, in the order of the rows, and the mean of each length."""
    means = {cell: fmean(scores) for cell, scores in cells.items()}
    rows = list(dict.fromkeys(row for row, _ in means))
    lengths = sorted({length for _, length in means})
    overall = [fmean([m for (_, n), m in means.items() if n == length]) for length in lengths]
    grid = [(row, [means.get((row, length)) for length in lengths]) for row in rows]
    named = "depth" if all(row.endswith(" %") for row in rows) else "task"
    return {"named": named, "lengths": lengths, "rows": grid, "overall": overall}


def _positions(
    evaluations: Sequence[Evaluation], labels: Sequence[str]
) -> list[tuple[str, str, list[dict[str, float]]]]:
    """(model, way to read, perplexity by position) of each that was measured."""
    return [
        (label, scores["reading"] or "", scores["positions"])
        for evaluation, label in zip(evaluations, labels)
        for scores in evaluation.scores.values()
        if scores.get("positions")
    ]


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """A name for each model; two of the same name have their folders too."""
    names = [evaluation.name for evaluation in evaluations]
    return [
        f"{name} ({evaluation.folder})" if names.count(name) > 1 else name
        for name, evaluation in zip(names, evaluations)
    ]


def _benchmark(name: str, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """All that the page shows of one benchmark; a model without it has None in each list."""
    having = [e if name in e.scores else None for e in evaluations]
    first = next(e for e in having if e)
    comparisons: list[dict[str, Any] | None] = [None]
    for evaluation in having[1:]:
        both = having[0] and evaluation
        comparisons.append(compare_on(name, having[0], evaluation) if both else None)  # type: ignore[arg-type]
    scores = [e.scores[name] if e else None for e in having]
    categories = sorted({c for one in scores if one for c in one["categories"]})
    return {
        "name": name,
        "title": first.scores[name]["title"],
        "protocol": first.scores[name]["protocol"],
        "scores": scores,
        "published": [e.published(name) if e else None for e in having],
        "comparisons": comparisons,
        "categories": [
            (c, [one["categories"].get(c) if one else None for one in scores]) for c in categories
        ],
        "answers": _answers([e.rows(name) if e else [] for e in having]),
        "ratings": _ratings(name, having, _labels(evaluations)),
    }


def _ratings(
    name: str, having: Sequence[Evaluation | None], labels: Sequence[str]
) -> dict[str, Any] | None:
    """Ratings of all models whose answers were compared with those of one baseline, by one fit."""
    games: list[Game] = []
    baselines = {e.scores[name].get("baseline") for e in having if e}
    baseline = baselines.pop() if len(baselines) == 1 else None
    if baseline is None:
        return None
    for evaluation, label in zip(having, labels):
        rows = evaluation.rows(name) if evaluation else []
        games += games_of([row for row in rows if row["games"]], label, baseline)
    found: dict[str, Any] = {"baseline": baseline}
    for key, control in (("models", False), ("controlled", True)):
        strengths = rate(games, baseline, control).strengths
        found[key] = [
            (label, 1000 + 400 / math.log(10) * strengths[label])
            for label in labels
            if label in strengths
        ]
    return found


def _answers(sides: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Questions with each model's first answer, in groups: how the models did, and how many."""
    by_item: dict[str, list[dict[str, Any] | None]] = {}
    for place, rows in enumerate(sides):
        for row in rows:
            found = by_item.setdefault(row["id"], [None] * len(sides))
            found[place] = found[place] or row
    groups: dict[str, list[list[dict[str, Any] | None]]] = {}
    for answers in by_item.values():
        kinds = [_kind(row) for row in answers]
        groups.setdefault(kinds[0] if len(set(kinds)) == 1 else " · ".join(kinds), []).append(
            answers
        )
    order = sorted(groups, key=lambda kind: ("·" not in kind, kind == "right", kind))
    return [{"kind": k, "n": len(groups[k]), "items": groups[k][:_SHOWN]} for k in order]


def _kind(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not asked"
    kinds = {"no_answer": "no result", "infra": "not graded"}
    return "right" if row["passed"] else kinds.get(row["status"], "wrong")


def _markdown(tables: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    lines = ["# Evaluation", ""]
    heads = [text for label in labels for text in (label, "published")]
    gains = [f"gain of {label} [95 %], p" for label in labels[1:]]
    columns = ["benchmark", "n", *heads, *gains]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for table in tables:
        cells = [table["name"], str(max(one["n"] for one in table["scores"] if one))]
        for one, known in zip(table["scores"], table["published"]):
            error = one and one.get("standard_error")
            text = percent(one["score"]) if one else "–"
            cells += [f"{text} ± {100 * error:.1f}" if error is not None else text]
            cells += ["–" if known is None else f"{known:.1f}"]
        cells += [_gain(comparison) for comparison in table["comparisons"][1:]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Scores in per cent, ± standard error.", *_clean_parts(tables, labels)]
    return "\n".join(lines) + "\n"


def _clean_parts(tables: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """A table of the scores on the questions that training data does not hold."""
    lines = []
    for table in tables:
        for one, label in zip(table["scores"], labels):
            for name, found in ((one or {}).get("contamination") or {}).items():
                clean = found["clean"] and percent(found["clean"]["score"])
                cells = [table["name"], label, name, f"{found['n']} ({percent(found['share'])})"]
                cells += [percent(one["score"]), clean or "–"]
                lines.append(f"| {' | '.join(cells)} |")
    head = "| benchmark | model | in training data | contaminated | all | clean part |"
    return ["", head, "|---|---|---|---|---|---|", *lines] if lines else []


def _gain(comparison: dict[str, Any] | None) -> str:
    if not comparison or not comparison["n"]:
        return "–"
    gain, low, high = (signed(100 * comparison[key], 1) for key in ("gain", "low", "high"))
    note = f" ({comparison['note']})" if comparison["note"] else ""
    return f"{gain} [{low}, {high}], {comparison['p']:.3f}{note}"
