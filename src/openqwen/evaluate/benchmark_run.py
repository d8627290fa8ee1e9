"""Runs one benchmark: asks, grades, counts."""

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from openqwen.engine import Prompt, Sampling
from openqwen.evaluate.ask import Reply, Subject, split_pair
from openqwen.evaluate.benchmark import Benchmark, BenchmarkAnswer
from openqwen.evaluate.bradley_terry import pairwise_scores
from openqwen.evaluate.intervals import (
    grouped_interval,
    pass_at_k,
    standard_error,
    wilson_interval,
)
from openqwen.evaluate.items import BenchmarkItem
from openqwen.evaluate.judges import grade_answers
from openqwen.evaluate.long_context import Reading
from openqwen.evaluate.translation import bleu_scores
from openqwen.model import LongContext
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.tasks import Grade, Task

Row = dict[str, Any]
_SHOWN_K = (1, 5, 10, 25, 50, 100)
_NO_RESULT = (Grade(False, 0.0, "no result", "no_answer"), list[int]())


@dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are run.

    Args:
        seed: of every random draw.
        samples: answers to each question.
        temperature: what they are sampled at.
        max_tokens: most tokens of an answer; None: as the benchmark says.
        reading: how generated prompts beyond the trained window are read; None: as the engine
            decides by their length.
    """

    seed: int = 0
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    reading: Reading | None = None

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
    elif benchmark.positions:
        rows = _read_whole(benchmark, items, subject, options)
    else:
        rows = _answer(benchmark, items, subject, options)
    scores = summary(rows)
    if benchmark.answer and benchmark.answer.metric == "pairwise" and scores["n"]:
        kept = [row for row in rows if row["games"]]
        scores |= pairwise_scores(kept, benchmark.answer.baseline)
    if benchmark.answer and benchmark.answer.metric == "bleu" and scores["n"]:
        kept = [row for row in rows if row["status"] != "infra"]
        scores |= bleu_scores(kept, options.seed)
    if benchmark.judged:
        scores["judge"] = ", ".join(model.identity for model in subject.judges.values())
    scores |= {"seconds": round(time.monotonic() - started, 1), "protocol": benchmark.protocol}
    scores["long"] = benchmark.generate is not None
    if benchmark.positions:
        scores["positions"] = by_position(rows)
    form = benchmark.choices or benchmark.answer
    scores |= {"metric": form.metric if form else "score", "title": benchmark.title}
    scores |= {"form": digest(benchmark), "reading": options.reading and options.reading.name}
    scores |= {"seed": options.seed, "published": benchmark.published}
    scores |= {"samples": options.samples, "temperature": options.temperature}
    return scores, rows


def digest(benchmark: Benchmark) -> str:
    """A digest of all that decides a score: two results with different ones do not compare."""
    deciding = {"data", "prompt", "answer", "choices", "shuffle", "generate", "positions"}
    parts = benchmark.model_dump(include=deciding, exclude_none=True)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _answer(
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    subject: Subject,
    options: BenchmarkOptions,
) -> list[Row]:
    """Ask all questions, turn by turn, and grade the answers: a row for each."""
    questions = [
        _Question(item, sample, item.task, item.prompt)
        for item in items
        for sample in range(options.samples)
        if item.task
    ]
    rows = []
    while questions:
        replies = _replies(benchmark, questions, subject, options)
        rows += _graded(benchmark, questions, replies, subject)
        asked = zip(questions, replies, strict=True)
        questions = [later for one, reply in asked if (later := one.next(reply.text))]
    places = {item.id: place for place, item in enumerate(items)}
    return sorted(rows, key=lambda row: (places[row["id"]], row["sample"], row.get("turn", 1)))


@dataclass(frozen=True)
class _Question:
    """One message of a user to answer: the turn of a sample of an item."""

    item: BenchmarkItem
    sample: int
    task: Task
    prompt: str | list[dict[str, Any]]
    turn: int = 1

    def next(self, answer: str) -> "_Question | None":
        """The next turn of the conversation; None after the last."""
        if self.turn > len(self.item.turns):
            return None
        task = self.item.turns[self.turn - 1]
        before = [*self.task.prompt, {"role": "assistant", "content": answer}]
        prompt = [*before, *task.prompt]
        return _Question(
            self.item, self.sample, replace(task, prompt=prompt), prompt, self.turn + 1
        )


def _replies(
    benchmark: Benchmark,
    questions: Sequence[_Question],
    subject: Subject,
    options: BenchmarkOptions,
) -> list[Reply]:
    """The answers, in order; questions of one temperature are asked together."""
    form = benchmark.answer
    assert form is not None
    groups: dict[tuple[float, LongContext | None, tuple[str, ...]], list[int]] = {}
    for place, question in enumerate(questions):
        own, cell = question.item.temperature, question.item.cell
        way = options.reading.way(cell[1]) if options.reading and cell else None
        temperature = options.temperature if own is None else own
        stops = (*form.stop, *question.item.stops)
        groups.setdefault((temperature, way, stops), []).append(place)
    replies: dict[int, Reply] = {}
    turn = questions[0].turn
    label = benchmark.name if turn == 1 else f"{benchmark.name}, turn {turn}"
    # Long prompts take as long as they are: their tokens are counted, not the answers.
    sizes = [question.item.cell[1] if question.item.cell else 1 for question in questions]
    unit = "tokens" if benchmark.generate else "answers"
    with progress(label, sum(sizes), unit) as bar:
        for (temperature, way, stops), places in groups.items():
            sampling = Sampling(
                options.max_tokens or form.max_tokens,
                temperature=temperature,
                stop=stops,
                long_context=way,
            )
            prompts: list[Prompt] = [subject.prompt(questions[place].prompt) for place in places]
            seeds = [_seed(benchmark, questions[place], options) for place in places]
            steps = [sizes[place] for place in places]
            found = subject.generate(prompts, sampling, seeds, bar, steps)
            replies |= dict(zip(places, found, strict=True))
    return [replies[place] for place in range(len(questions))]


def _seed(benchmark: Benchmark, question: _Question, options: BenchmarkOptions) -> int:
    """The seed of an answer, which depends on its question alone, whatever else is asked."""
    name = f"answers/{benchmark.name}/{question.item.id}"
    draw = Generators(options.seed)[name if question.turn == 1 else f"{name}/{question.turn}"]
    return int(draw.integers(2**63, size=options.samples)[question.sample])


def _graded(
    benchmark: Benchmark,
    questions: Sequence[_Question],
    replies: Sequence[Reply],
    subject: Subject,
) -> list[Row]:
    form = benchmark.answer
    assert form is not None
    texts = [_extracted(reply.text, form.extract, form.first) for reply in replies]
    found = {place: text for place, text in enumerate(texts) if text is not None}
    with progress(f"{benchmark.name}, graded", len(found), "answers") as bar:
        tasks = [questions[place].task for place in found]
        judged = grade_answers(tasks, list(found.values()), subject.judges, subject.grades, bar)
    grades = dict(zip(found, judged, strict=True))
    rows = []
    for place, (question, reply) in enumerate(zip(questions, replies, strict=True)):
        verdict, games = grades.get(place, _NO_RESULT)
        row = _row(question.item, question.sample, verdict)
        if question.item.turns:
            row |= {"turn": question.turn, "prompt": question.prompt}
        row["score"] = _score(form, question.task, verdict)
        row |= {"answer": reply.text, "tokens": reply.tokens, "finish": reply.finish_reason}
        if form.extract and place in found:
            row["extracted"] = found[place]
        reference = question.task.reference
        if question.task.grader == "pairwise":
            row |= {"games": games, "other": reference["other"]}
        rows.append(row | {"reference": reference})
    return rows


def _score(form: BenchmarkAnswer, task: Task, verdict: Grade) -> float:
    """The score of an answer by the benchmark's metric, from 0 to 1."""
    if form.metric == "accuracy":
        return float(verdict.passed)
    # A reward model in place of the judge has no scale.
    if form.metric == "rating" and task.grader == "judge" and verdict.reason.startswith("rated"):
        return (verdict.raw or 0.0) / float(task.reference.get("scale", (1, 10))[1])
    return verdict.score


def _row(item: BenchmarkItem, sample: int, verdict: Grade) -> Row:
    row: Row = {"id": item.id, "category": item.category, "sample": sample}
    row |= {"prompt": item.prompt, "passed": verdict.passed, "score": verdict.score}
    if item.cell:
        row["cell"] = list(item.cell)
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


def _read_whole(
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    subject: Subject,
    options: BenchmarkOptions,
) -> list[Row]:
    """A row for each text, with the log-probabilities of its tokens summed over positions."""
    tokenizer = subject.tokenizer
    assert tokenizer is not None, "Subject.check"
    groups: dict[LongContext | None, list[BenchmarkItem]] = {}
    for item in items:
        way = options.reading.way(len(item.ids)) if options.reading else None
        groups.setdefault(way, []).append(item)
    rows = []
    with progress(benchmark.name, len(items), "texts") as bar:
        for way, group in groups.items():
            pairs = [([tokenizer.endoftext_id], list(item.ids)) for item in group]
            for item, reply in zip(group, subject.likelihoods(pairs, bar, way), strict=True):
                nats = -math.fsum(reply.logprobs) / len(reply.logprobs)
                row = _row(
                    item, 0, Grade(True, math.exp(-nats), f"perplexity {math.exp(nats):.4g}")
                )
                row["prompt"] = str(item.prompt)[:1_000]
                row["nats"] = _by_octave([-value for value in reply.logprobs])
                rows.append(row | {"answer": "", "tokens": len(item.ids)})
    return rows


def _by_octave(nats: Sequence[float]) -> list[list[float]]:
    """[start, end, sum] of values by position, in ranges that double from 256 positions on."""
    found, start, end = [], 0, 256
    while start < len(nats):
        part = nats[start:end]
        found.append([start, start + len(part), math.fsum(part)])
        start, end = end, 2 * end
    return found


def by_position(rows: Sequence[Row]) -> list[dict[str, float]]:
    """The perplexity of the tokens in each range of positions, over all texts."""
    totals: dict[int, list[float]] = {}
    for row in rows:
        for start, end, nats in row["nats"]:
            one = totals.setdefault(int(start), [0.0, 0.0, 0.0])
            totals[int(start)] = [max(one[0], end), one[1] + end - start, one[2] + nats]
    return [
        {"start": start, "end": end, "perplexity": math.exp(nats / count)}
        for start, (end, count, nats) in sorted(totals.items())
    ]


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
    result |= mean_score(kept)
    groups: dict[str, list[Row]] = {}
    for row in kept:
        groups.setdefault(row["category"], []).append(row)
        if "turn" in row:
            groups.setdefault(f"turn {row['turn']}", []).append(row)
    result["categories"] = {}
    if len(groups) > 1:
        for name, group in sorted(groups.items()):
            result["categories"][name] = mean_score(group) | {
                "n": len({row["id"] for row in group})
            }
    samples = Counter(row["id"] for row in kept)
    right = Counter(row["id"] for row in kept if row["passed"])
    fewest = min(samples.values())
    if fewest > 1 and "turn" not in kept[0]:
        result["pass_at"] = {
            str(k): fmean(pass_at_k(n, right[item], k) for item, n in samples.items())
            for k in sorted({*_SHOWN_K, fewest})
            if k <= fewest
        }
    return result


def mean_score(rows: Sequence[Row]) -> dict[str, float | None]:
    """score, standard_error, low and high (95 %) of rows, of which those of one item are a mean."""
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
