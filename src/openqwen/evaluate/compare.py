"""Results on disk: how they are written, read, and compared on the same questions."""

import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from openqwen.evaluate.intervals import bootstrap_difference, mcnemar, paired_gain
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl, write_json, write_jsonl

RESULTS = "results.json"


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    results: {"model", "identity", "published": [suite, size], "settings", "scores": {benchmark:
    `summary`}}; `answers/BENCHMARK.jsonl` has the rows.
    """

    folder: Path
    results: dict[str, Any]

    @property
    def name(self) -> str:
        """The model, shortly."""
        return Path(self.results["model"]).name

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Scores by benchmark."""
        return self.results["scores"]

    def published(self, benchmark: str) -> float | None:
        """The published score of this model in per cent, where there is one."""
        suite, size = self.results["published"] or ("", "")
        found = self.scores[benchmark]["published"].get(suite, {}).get(size)
        return None if found is None else float(found)

    def rows(self, benchmark: str) -> list[dict[str, Any]]:
        """The graded answers, one for each item and sample."""
        return list(read_jsonl(self.folder / "answers" / f"{benchmark}.jsonl"))

    def add(self, benchmark: str, scores: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Write the answers of a benchmark and its scores beside the earlier ones.

        Another run of the same model may write into the folder at the same time: its scores stay.
        """
        (self.folder / "answers").mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system ends it with the process
            if (self.folder / RESULTS).is_file():
                found = read_evaluation(self.folder).results
                if found["identity"] == self.results["identity"]:
                    self.scores.update(found["scores"])
            write_jsonl(self.folder / "answers" / f"{benchmark}.jsonl", rows)
            self.scores[benchmark] = scores
            write_json(self.folder / RESULTS, self.results)
        finally:
            os.close(lock)


def read_evaluation(folder: Path) -> Evaluation:
    """The results in a folder; OpenQwenError where there are none, or where they are damaged."""
    path = folder / RESULTS
    if not path.is_file():
        do = "give the --output folder of `openqwen evaluate MODEL`"
        raise OpenQwenError("There are no results of an evaluation here.", folder, do)
    results = read_json(path)
    keys = {"model", "identity", "published", "scores", "settings"}
    if not isinstance(results, dict) or not keys <= results.keys():
        raise OpenQwenError("These are no results of an evaluation.", path, "evaluate again")
    return Evaluation(folder, results)


def compare_on(benchmark: str, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What the second model gains on the first, on the items that both have.

    Returns:
        n, gain with low and high (95 %), p (McNemar's exact test for right and wrong, else the
        paired bootstrap) with `test`, won and lost (items), note (why the scores do not compare,
        or "").
    """
    sides = []
    for evaluation in (before, after):
        scores: dict[str, list[float]] = {}
        for row in evaluation.rows(benchmark):
            if row["status"] != "infra":
                scores.setdefault(row["id"], []).append(row["score"])
        sides.append({item: fmean(values) for item, values in scores.items()})
    common = [item for item in sides[0] if item in sides[1]]
    one, other = before.scores[benchmark], after.scores[benchmark]
    note = "" if one["form"] == other["form"] else "the benchmark was asked in different ways"
    if not common:
        return {"n": 0, "note": note or "no item is in both"}
    a, b = ([side[item] for item in common] for side in sides)
    gain, low, high = paired_gain(a, b, common)
    binary = set(a) | set(b) <= {0.0, 1.0}
    return {
        "n": len(common),
        "gain": gain,
        "low": max(-1.0, low),
        "high": min(1.0, high),
        "p": mcnemar(a, b) if binary else bootstrap_difference(a, b),
        "test": "McNemar" if binary else "paired bootstrap",
        "won": sum(y > x for x, y in zip(a, b)),
        "lost": sum(y < x for x, y in zip(a, b)),
        "note": note,
    }


def guess_published(model: str) -> tuple[str, str] | None:
    """(suite, size) that a model's name says, such as ("qwen2.5-instruct", "0.5B"); or None."""
    found = re.search(r"qwen(2(?:\.5)?)-(coder-)?(\d+(?:\.\d+)?)b", model.lower())
    if not found:
        return None
    kind = "instruct" if "instruct" in model.lower() else "base"
    return f"qwen{found[1]}-{found[2] or ''}{kind}", f"{found[3]}B"
