"""Runs one benchmark: asks, grades, counts."""

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from openqwen.engine import Prompt, Sampling
from openqwen.evaluate.ask import Reply, Subject, split_pair
from openqwen.evaluate.benchmark import Benchmark
from openqwen.evaluate.intervals import (
    grouped_interval,
    pass_at_k,
    standard_error,
    wilson_interval,
)
from openqwen.evaluate.items import BenchmarkItem
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.tasks import Grade, grade

Row = dict[str, Any]
_SHOWN_K = (1, 5, 10, 25, 50, 100)


@dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are run.

    Args:
        seed: of every random draw.
        samples: answers to each question.
        temperature: what they are sampled at.
        max_tokens: most tokens of an answer; None: as the benchmark says.
    """

    seed: int = 0
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.samples > 1 and self.temperature < 1e-3):
            what = f"{self.samples} samples at temperature {self.temperature:g} tell nothing more."
            raise OpenQwenError(what, "--samples", "give 1, or a --temperature such as 0.8")


def run_benchmark(
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    subject: Subject,
    options: BenchmarkOptions,
) -> tuple[dict[str, Any], list[Row]]:
    """Ask all items of a benchmark and grade the answers.

    Returns:
        The scores (`summary`), and one row for each answer.
    """
    started = time.monotonic()
    if benchmark.choices:
        rows = _choose(benchmark, items, subject)
    else:
        rows = _answer(benchmark, items, subject, options)
    scores = summary(rows)
    scores |= {"seconds": round(time.monotonic() - started, 1), "protocol": benchmark.protocol}
    form = benchmark.choices or benchmark.answer
    assert form is not None
    scores |= {"metric": form.metric, "title": benchmark.title, "form": digest(benchmark)}
    scores |= {"seed": options.seed, "published": benchmark.published}
    scores |= {"samples": options.samples, "temperature": options.temperature}
    return scores, rows


def digest(benchmark: Benchmark) -> str:
    """A digest of all that decides a score: two results with different ones do not compare."""
    parts = benchmark.model_dump(include={"data", "prompt", "answer", "choices", "shuffle"})
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _answer(
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    subject: Subject,
    options: BenchmarkOptions,
) -> list[Row]:
    form = benchmark.answer
    assert form is not None
    sampling = Sampling(
        max_tokens=options.max_tokens or form.max_tokens,
        temperature=options.temperature,
        stop=tuple(form.stop),
    )
    prompts: list[Prompt] = []
    seeds = []
    for item in items:
        prompts += [subject.prompt(item.prompt)] * options.samples
        draw = Generators(options.seed)[f"answers/{benchmark.name}/{item.id}"]
        seeds += draw.integers(2**63, size=options.samples).tolist()
    with progress(benchmark.name, len(prompts), "answers") as bar:
        replies = subject.generate(prompts, sampling, seeds, bar)
    asked = [item for item in items for _ in range(options.samples)]
    texts = [_extracted(reply.text, form.extract, form.first) for reply in replies]
    tasks = [item.task for item in asked if item.task]
    found = {place: text for place, text in enumerate(texts) if text is not None}
    grades = dict.fromkeys(range(len(asked)), Grade(False, 0.0, "no result", "no_answer"))
    with progress(f"{benchmark.name}, graded", len(found), "answers") as bar:
        judged = grade(
            [tasks[place] for place in found],
            list(found.values()),
            cache=subject.grades,
            progress=bar,
        )
    grades |= dict(zip(found, judged, strict=True))
    rows = []
    for place, (item, reply) in enumerate(zip(asked, replies, strict=True)):
        row = _row(item, place % options.samples, grades[place])
        if form.metric == "accuracy":
            row["score"] = float(row["passed"])
        row |= {"answer": reply.text, "tokens": reply.tokens, "finish": reply.finish_reason}
        if form.extract and place in found:
            row["extracted"] = found[place]
        rows.append(row | {"reference": item.task.reference if item.task else {}})
    return rows


def _row(item: BenchmarkItem, sample: int, verdict: Grade) -> Row:
    row: Row = {"id": item.id, "category": item.category, "sample": sample}
    row |= {"prompt": item.prompt, "passed": verdict.passed, "score": verdict.score}
    return row | {"status": verdict.status, "reason": verdict.reason}


def _extracted(text: str, pattern: str, first: bool) -> str | None:
    if not pattern:
        return text
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    match = matches[0 if first else -1]
    return str(match[1] if match.re.groups else match[0]).strip()


def _choose(benchmark: Benchmark, items: Sequence[BenchmarkItem], subject: Subject) -> list[Row]:
    choices, tokenizer = benchmark.choices, subject.tokenizer
    assert choices is not None
    assert tokenizer is not None, "Subject.check"
    pairs = []
    for item in items:
        ids = None if isinstance(item.prompt, str) else subject.prompt(item.prompt)
        for number, option in enumerate(item.options):
            end = item.contexts[number] if item.contexts else ""
            if ids is None:
                pairs.append(split_pair(tokenizer, f"{item.prompt}{end}", option))
            else:
                pairs.append(([*ids, *tokenizer.encode(end)], tokenizer.encode(option)))
    with progress(benchmark.name, len(pairs), "choices") as bar:
        replies = iter(subject.likelihoods(pairs, bar))
    return [_chosen(item, [next(replies) for _ in item.options], choices.metric) for item in items]


def _chosen(item: BenchmarkItem, replies: Sequence[Reply], metric: str) -> Row:
    sums = [math.fsum(reply.logprobs) for reply in replies]
    if metric == "accuracy_norm":
        marks = [total / len(text.strip()) for total, text in zip(sums, item.options)]
    else:
        marks = sums
    best = max(range(len(marks)), key=marks.__getitem__)
    passed = bool(item.correct[best])
    score = float(passed)
    if metric == "mass":
        shares = [math.exp(total - max(sums)) for total in sums]
        score = math.fsum(s for s, right in zip(shares, item.correct) if right) / math.fsum(shares)
    row = _row(item, 0, Grade(passed, score, "" if passed else f"option {best + 1} is chosen"))
    row |= {"options": list(item.options), "correct": list(item.correct), "logprobs": sums}
    return row | ({"contexts": list(item.contexts)} if item.contexts else {}) | {"chosen": best}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Scores of rows, in shares of 1. What a grader could not judge (infra) is left out.

    Returns:
        score (the mean; of several samples pass@1), standard_error, low and high (95 %), n (items),
        right, wrong, no_answer, infra, cut_off (counts of answers), categories, and pass_at where
        there are several samples.
    """
    kept = [row for row in rows if row["status"] != "infra"]
    counts = Counter("right" if row["passed"] else row["status"] for row in kept)
    result: dict[str, Any] = {
        "n": len({row["id"] for row in kept}),
        "right": counts["right"],
        "wrong": counts["graded"],
        "no_answer": counts["no_answer"],
        "infra": len(rows) - len(kept),
        "cut_off": sum(row.get("finish") == "length" for row in rows),
        "tokens": sum(row.get("tokens", 0) for row in rows),
    }
    if not kept:
        return result | {"score": None, "categories": {}}
    result |= _mean(kept)
    groups: dict[str, list[Row]] = {}
    for row in kept:
        groups.setdefault(row["category"], []).append(row)
    result["categories"] = {}
    if len(groups) > 1:
        for name, group in sorted(groups.items()):
            result["categories"][name] = _mean(group) | {"n": len({row["id"] for row in group})}
    samples = Counter(row["id"] for row in kept)
    right = Counter(row["id"] for row in kept if row["passed"])
    fewest = min(samples.values())
    if fewest > 1:
        result["pass_at"] = {
            str(k): fmean(pass_at_k(n, right[item], k) for item, n in samples.items())
            for k in sorted({*_SHOWN_K, fewest})
            if k <= fewest
        }
    return result


def _mean(rows: Sequence[Row]) -> dict[str, float | None]:
    by_item: dict[str, list[float]] = {}
    for row in rows:
        by_item.setdefault(row["id"], []).append(row["score"])
    means = [fmean(scores) for scores in by_item.values()]
    error = standard_error(means, list(by_item))
    score = fmean(means)
    binary = set(means) <= {0.0, 1.0}
    low, high = (
        wilson_interval(sum(means), len(means))
        if binary
        else grouped_interval(means, list(by_item))
    )
    known = error if math.isfinite(error) else None
    return {"score": score, "standard_error": known, "low": low, "high": high}
