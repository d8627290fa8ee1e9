"""The `evaluate` stage: the scores of one model."""

from collections.abc import Collection
from pathlib import Path
from statistics import mean
from typing import Any

from openqwen.corpus.documents import halves, read_documents
from openqwen.engine import Engine, Generator
from openqwen.engine.score import RewardModel
from openqwen.evaluate.ask import ReplyCache, Subject
from openqwen.evaluate.benchmark import select
from openqwen.evaluate.benchmark_run import BenchmarkOptions, run_benchmark
from openqwen.evaluate.bits_per_byte import bits_per_byte, within_budget
from openqwen.evaluate.checked import checked_accuracy, sampled_answers
from openqwen.evaluate.compare import Evaluation
from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.copying import copying_scores
from openqwen.evaluate.intervals import grouped_interval, paired_gain, wilson_interval
from openqwen.evaluate.items import load_items
from openqwen.evaluate.long_context import generate_items
from openqwen.evaluate.positions import loss_by_position
from openqwen.evaluate.preferences import win_rate
from openqwen.evaluate.samples import answer_samples
from openqwen.model import Qwen2, load_model
from openqwen.support.device import best_device
from openqwen.support.files import (
    gzip_bits_per_byte,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.support.stage import CONVERSATION, CORPUS, MODEL, Effort, Stage, StageRun
from openqwen.tasks import GradeCache, Task
from openqwen.tasks.checkable import generate_tasks, stands_alone
from openqwen.tokenizer import Tokenizer, load_tokenizer

_SYNTHETIC = "tasks"  # a source that bits per byte is not measured on
# Scores of the test split -> the temperature, and the fields of an answer in test.jsonl: whether it
# is right, and whether it stands alone.
# A model that is surer of itself scores as if it were sampled at a lower temperature, so models are
# compared at each of these; _COOLER shows how much a lower temperature gains by itself.
_TEMPERATURES = {
    "test": (0.0, "correct", "style"),
    "test_at_0.7": (0.7, "correct_at_0.7", "style_at_0.7"),
    "test_sampled": (1.0, "sampled_correct", "sampled_style"),
}
_COOLER = (0.9, "correct_at_0.9", "style_at_0.9")
# The cost of scoring a byte, in training tokens: a third of a token, read twice, forward only.
_SCORED = 0.25
_HEADLINES = (  # what the line of a stage shows first
    "bits_per_byte",
    "test_accuracy",
    "test_sampled_accuracy",
    "test_sampled_style",
    "test_gain",
    "test_sampled_gain",
    "copying_saved",
    "checked_accuracy",
    "sampled_accuracy",
)


def evaluate_model(run: StageRun) -> dict[str, float]:
    """Score a model: bits per byte, graded tasks and samples; and compare it with earlier models.

    Inputs beside model and corpus: "base", the scores before SFT, and "start", those of the model
    that this one was trained from. Without "base" the model comes before SFT and is asked in plain
    text; with it, in the chat format. Scores whose names begin with `test_` are of tasks and
    documents that no setting was chosen by; "style" is the share of answers that stand alone.
    """
    config: EvaluateConfig = run.config
    folder = run.inputs["model"]
    model, tokenizer = load_model(folder, device=best_device()), load_tokenizer(folder)
    engine = Engine(model, tokenizer)
    plain = "base" not in run.inputs
    scores: dict[str, Any] = {"stage": run.label}  # the next stage names it as its start
    heldout = run.inputs["corpus"] / "heldout.parquet"
    documents = [d for d in read_documents(heldout) if d["source"] != _SYNTHETIC]
    scores |= _text_scores(model, tokenizer, config, documents)
    if plain:
        by_position = loss_by_position(model, tokenizer, documents, config.context)
        scores["loss_by_position"] = by_position

    # The same tasks for every stage and every run: their seed is not the run's.
    tasks = generate_tasks(Generators(0)["evaluate"], config.checked, split="heldout")
    with progress("checked tasks", 2 * len(tasks), "answers") as bar:
        checked = checked_accuracy(engine, tasks, config.max_tokens, bar, plain)
        sampled = sampled_answers(engine, tasks, config.max_tokens, bar, plain=plain)
    write_jsonl(run.output / "answers.jsonl", checked.pop("answers"))
    scores |= {"sampled_accuracy": mean(a.grade.passed for a in sampled)} | checked
    if config.tasks:
        scores |= _benchmark_scores(engine, tokenizer, run, plain)
    if not plain:
        base = read_json(run.inputs["base"] / "scores.json")
        scores["retention"] = scores["bits_per_byte"] / base["bits_per_byte"]
        scores |= _test_scores(engine, config, run)

    write_json(run.output / "scores.json", scores)
    write_json(run.output / "samples.json", answer_samples(engine, config.sample_tokens))
    ordered = {name: scores[name] for name in _HEADLINES if name in scores} | scores
    return {name: value for name, value in ordered.items() if isinstance(value, float)}


def _text_scores(
    model: Qwen2, tokenizer: Tokenizer, config: EvaluateConfig, documents: list[dict[str, Any]]
) -> dict[str, Any]:
    """Bits per byte of the model and of gzip, on held-out text, and how well the model copies."""
    development, test = (
        within_budget(half, config.heldout_bytes // 2) for half in halves(documents)
    )
    context = min(config.context, model.config.max_position_embeddings)
    result = bits_per_byte(model, tokenizer, development, context, model.device)
    scores: dict[str, Any] = {
        **result.scores("bits_per_byte"),
        **copying_scores(model, tokenizer),
        "bits_per_byte_by_source": result.by_source,
        "gzip_bits_per_byte": gzip_bits_per_byte(d["text"] for d in development),
        "gzip_bits_per_byte_by_source": _gzip_by_source(development),
        "context": context,
    }
    if test:  # a corpus may be too small to hold out two documents
        result = bits_per_byte(model, tokenizer, test, context, model.device)
        scores |= result.scores("test_bits_per_byte")
        scores["test_gzip_bits_per_byte"] = gzip_bits_per_byte(d["text"] for d in test)
    return scores


def _gzip_by_source(documents: list[dict[str, Any]]) -> dict[str, float]:
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document["source"], []).append(document["text"])
    return {source: gzip_bits_per_byte(group) for source, group in texts.items()}


def _benchmark_scores(
    engine: Engine, tokenizer: Tokenizer, run: StageRun, plain: bool
) -> dict[str, Any]:
    """Scores on the configured benchmarks; plain: only on those that continue a text.

    Answers and results are written as `openqwen evaluate compare` reads them.
    """
    known = ReplyCache(run.scratch / "replies.jsonl"), GradeCache(run.scratch / "grades.jsonl")
    subject = Subject(lambda: engine, tokenizer, run.label, *known)
    results = {"model": run.label, "identity": run.label, "published": None, "created": ""}
    evaluation = Evaluation(run.output, {**results, "settings": {}, "scores": {}})
    found: dict[str, Any] = {"benchmarks": []}
    for benchmark in select(run.config.tasks):
        if (
            plain and benchmark.prompt.form == "chat" and not benchmark.positions
        ) or benchmark.judged:
            continue
        # The same questions for every stage and every run: their seed is not the run's.
        data, limit = run.inputs.get("data"), run.config.limit
        if benchmark.long:
            lengths = [n for n in benchmark.long.lengths if n <= engine.longest] or [engine.longest]
            items, sums = generate_items(benchmark, data, subject.tokens, 0, lengths, limit)
        else:
            items, sums = load_items(benchmark, data, 0, limit)
        prompt = "" if benchmark.positions else items[0].prompt
        subject.check(benchmark.name, prompt, bool(benchmark.choices))
        scores, rows = run_benchmark(benchmark, items, subject, BenchmarkOptions())
        more = {"data": sums, "limit": run.config.limit, "seconds": None}  # equal runs, equal bytes
        evaluation.add(benchmark.name, scores | more, rows)
        if scores["score"] is not None:
            found["benchmarks"].append(benchmark.name)
            found |= _named(benchmark.name, *(scores[key] for key in ("score", "low", "high")))
    return found


def _test_scores(generator: Generator, config: EvaluateConfig, run: StageRun) -> dict[str, Any]:
    """Scores on the test split at each temperature, and the gains on the model's start.

    A model without a start is the control: `test_cooler_gain` is its gain at temperature 0.9 on
    itself at 1.0.
    """
    tasks = generate_tasks(Generators(0)["test"], config.test, split="test")
    sampled = [one for one in _TEMPERATURES.values() if one[0] > 0]
    if "start" not in run.inputs:
        sampled.append(_COOLER)
    with progress("test tasks", (1 + len(sampled)) * len(tasks), "answers") as bar:
        answers = checked_accuracy(generator, tasks, config.max_tokens, bar)["answers"]
        for temperature, field, style in sampled:
            graded = sampled_answers(generator, tasks, config.max_tokens, bar, temperature)
            for answer, one in zip(answers, graded, strict=True):
                answer |= {field: one.grade.passed, style: stands_alone(one.text)}
    write_jsonl(run.output / "test.jsonl", answers)
    # Questions that put one problem in different words are right or wrong together.
    problems = [task.origin["problem"] for task in tasks]
    scores: dict[str, Any] = {}
    for name, (_, field, style) in _TEMPERATURES.items():
        scores |= _share(f"{name}_accuracy", _right(answers, field), problems)
        scores |= _share(f"{name}_style", _right(answers, style), problems)
    if "start" not in run.inputs:
        at_1, cooler = _right(answers, "sampled_correct"), _right(answers, _COOLER[1])
        return scores | _named("test_cooler_gain", *paired_gain(at_1, cooler, problems))
    before = list(read_jsonl(run.inputs["start"] / "test.jsonl"))
    for name, (_, field, _) in _TEMPERATURES.items():
        gain = paired_gain(_right(before, field), _right(answers, field), problems)
        scores |= _named(f"{name}_gain", *gain)
    earlier = read_json(run.inputs["start"] / "scores.json")
    scores["start"] = earlier["stage"].removeprefix("evaluate-")
    return scores | _win_rates(before, run.inputs["reward"], tasks, answers)


def _right(answers: list[dict[str, Any]], field: str) -> list[float]:
    return [float(answer[field]) for answer in answers]


def _share(name: str, right: list[float], problems: list[str]) -> dict[str, float]:
    """The mean, with the wider one of two intervals at each end."""
    lows, highs = zip(wilson_interval(sum(right), len(right)), grouped_interval(right, problems))
    return _named(name, mean(right), min(lows), max(highs))


def _named(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _win_rates(
    before: list[dict[str, Any]], reward: Path, tasks: list[Task], answers: list[dict[str, Any]]
) -> dict[str, float]:
    """Win rates of these answers over earlier ones, by the reward model and by the graders."""
    model, rewards = RewardModel.load(reward), []
    for side in (answers, before):
        conversations = [
            [*task.prompt, {"role": "assistant", "content": answer["answer"]}]
            for task, answer in zip(tasks, side, strict=True)
        ]
        rewards.append(model.score(conversations))
    by_reward = win_rate(*rewards)
    by_grade = win_rate(_right(answers, "correct"), _right(before, "correct"))
    return {
        **_named("win_rate", by_reward["win_rate"], by_reward["low"], by_reward["high"]),
        "win_rate_checked": by_grade["win_rate"],
        "reward_mean": sum(rewards[0]) / len(rewards[0]),
        "reward_mean_before": sum(rewards[1]) / len(rewards[1]),
    }


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    config: EvaluateConfig = recipe.evaluate
    # Greedy, at 0.7 and at 1.0; a model without an earlier one to compare with at 0.9 too.
    tests = 3 if "start" in roles else 4
    asked = (config.limit or 0) * len(config.tasks.split(","))
    answers = asked + 2 * config.checked + (tests * config.test if "base" in roles else 0)
    return Effort(answers=answers, rows={CONVERSATION: _SCORED * config.heldout_bytes})


STAGE = Stage(
    name="evaluate",
    help="Score a model on benchmarks (--tasks), or as recipes do (--corpus).",
    config=EvaluateConfig,
    inputs={"model": MODEL, "corpus": CORPUS},
    outputs=["base", "start"],
    run=evaluate_model,
    estimate=_effort,
)
