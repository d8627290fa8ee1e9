"""The `evaluate` stage: the scores of one model."""

from collections.abc import Collection
from pathlib import Path
from statistics import mean
from typing import Any

from openqwen.corpus.documents import halves, read_documents
from openqwen.engine import Engine
from openqwen.evaluate.bits_per_byte import bits_per_byte, within_budget
from openqwen.evaluate.checked import Item, checked_accuracy, sampled_right
from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.intervals import grouped_interval, paired_gain, wilson_interval
from openqwen.evaluate.preferences import win_rate
from openqwen.evaluate.samples import sample_answers
from openqwen.instruct.synthesize.rejection import plain_answer, plain_prompt
from openqwen.instruct.synthesize.tasks import Task, generate_tasks
from openqwen.model import load_model, load_scorer
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
from openqwen.tokenizer import load_tokenizer
from openqwen.train.reward import score

# multi-task data is not among the held-out text that bits per byte and gzip are measured on
_SYNTHETIC = "tasks"
# Scores of the test split -> the temperature, and the field of an answer in test.jsonl.
# A model that is surer of itself scores as if it were sampled cooler, so stages are compared at
# each of these; _COOLER tells what cooler sampling alone gains.
_TEMPERATURES = {
    "test": (0.0, "correct"),
    "test_at_0.7": (0.7, "correct_at_0.7"),
    "test_sampled": (1.0, "sampled_correct"),
}
_COOLER = (0.9, "correct_at_0.9")
_SCORED = 0.25  # of a training token: a byte scored is a third of a token, read twice, forward only
_HEADLINES = (  # what the line of a stage shows first
    *("bits_per_byte", "test_accuracy", "test_sampled_accuracy", "test_gain", "test_sampled_gain"),
    *("checked_accuracy", "sampled_accuracy"),
)


def _item(task: Task, chats: bool) -> Item:
    """A task as it is put: in the chat template, or as plain text to a model that has not learned
    the format yet.
    """
    if chats:
        return Item(task.task, task.prompt, task.chance, task.check)
    return Item(
        task.task,
        plain_prompt(task.question),
        task.chance,
        lambda text: task.check(plain_answer(text)),
    )


def evaluate_model(run: StageRun) -> dict[str, float]:
    """Bits per byte, checked tasks, samples; retention, gains and win rate where there is something
    to compare with.

    base: the scores before SFT. start: those of the model that this one was trained from. A model
    that comes before SFT (no `base` to compare with) is asked in plain text, a chat model in its
    template. Scores whose names begin with `test_` are of tasks and documents that no setting was
    chosen by.
    """
    config: EvaluateConfig = run.config
    folder, device = run.inputs["model"], best_device()
    model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    engine = Engine(model, tokenizer)
    chats = "base" in run.inputs

    held = [
        d
        for d in read_documents(run.inputs["corpus"] / "heldout.parquet")
        if d["source"] != _SYNTHETIC
    ]
    development, test = (within_budget(half, config.heldout_bytes // 2) for half in halves(held))
    context = min(config.context, model.config.max_position_embeddings)
    result = bits_per_byte(model, tokenizer, development, context, device)
    scores: dict[str, Any] = {
        **result.scores("bits_per_byte"),
        "bits_per_byte_by_source": result.by_source,
        "gzip_bits_per_byte": gzip_bits_per_byte(d["text"] for d in development),
        "gzip_bits_per_byte_by_source": _gzip_by_source(development),
        "context": context,
    }
    if test:  # a corpus may be too small to hold out two documents
        scores |= bits_per_byte(model, tokenizer, test, context, device).scores(
            "test_bits_per_byte"
        )
        scores["test_gzip_bits_per_byte"] = gzip_bits_per_byte(d["text"] for d in test)

    # The same tasks for every stage and every run: their seed is not the run's.
    tasks = generate_tasks(Generators(0)["evaluate"], config.checked, split="heldout")
    items = [_item(task, chats) for task in tasks]
    with progress("checked tasks", 2 * len(items), "answers") as bar:
        checked = checked_accuracy(engine, items, config.max_tokens, bar)
        scores["sampled_accuracy"] = mean(sampled_right(engine, items, config.max_tokens, bar))
    write_jsonl(run.output / "answers.jsonl", checked.pop("answers"))
    scores |= checked
    if chats:
        scores["retention"] = (
            result.overall / read_json(run.inputs["base"] / "scores.json")["bits_per_byte"]
        )
        scores |= _test(engine, config, run)

    write_json(run.output / "scores.json", scores)
    write_json(run.output / "samples.json", sample_answers(engine, config.sample_tokens))
    ordered = {name: scores[name] for name in _HEADLINES if name in scores} | scores
    return {name: value for name, value in ordered.items() if isinstance(value, float)}


def _test(engine: Engine, config: EvaluateConfig, run: StageRun) -> dict[str, Any]:
    """Scores on the test split at each temperature, and what each gained on the model's start.

    A model without a start is the control: `test_cooler_gain` is its gain at 0.9 on itself at 1.0.
    """
    tasks = generate_tasks(Generators(0)["test"], config.test, split="test")
    items = [_item(task, chats=True) for task in tasks]
    drawn = [*list(_TEMPERATURES.values())[1:], *([] if "start" in run.inputs else [_COOLER])]
    with progress("test tasks", (1 + len(drawn)) * len(tasks), "answers") as bar:
        answers = checked_accuracy(engine, items, config.max_tokens, bar)["answers"]
        for temperature, field in drawn:
            right = sampled_right(engine, items, config.max_tokens, bar, temperature)
            for answer, correct in zip(answers, right, strict=True):
                answer[field] = correct
    write_jsonl(run.output / "test.jsonl", answers)
    problems = [task.problem for task in tasks]  # a problem's wordings are right or wrong together
    scores: dict[str, Any] = {}
    for name, (_, field) in _TEMPERATURES.items():
        rights = [float(answer[field]) for answer in answers]
        ends = zip(wilson_interval(sum(rights), len(rights)), grouped_interval(rights, problems))
        low, high = (choose(pair) for choose, pair in zip((min, max), ends))
        scores |= _named(f"{name}_accuracy", mean(rights), low, high)
    if "start" not in run.inputs:
        at_1, at_09 = (answers, "sampled_correct"), (answers, _COOLER[1])
        return scores | _gain("test_cooler", at_1, at_09, problems)
    before = list(read_jsonl(run.inputs["start"] / "test.jsonl"))
    for name, (_, field) in _TEMPERATURES.items():
        scores |= _gain(name, (before, field), (answers, field), problems)
    manifest = read_json(run.inputs["start"] / "manifest.json")
    scores["start"] = manifest["stage"].removeprefix("evaluate-")
    return scores | _against(before, run.inputs["reward"], tasks, answers)


_Answers = tuple[list[dict[str, Any]], str]  # and the field that says whether one is right


def _gain(name: str, before: _Answers, after: _Answers, problems: list[str]) -> dict[str, float]:
    old, new = ([float(answer[field]) for answer in answers] for answers, field in (before, after))
    return _named(f"{name}_gain", *paired_gain(old, new, problems))


def _named(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _gzip_by_source(documents: list[dict[str, Any]]) -> dict[str, float]:
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document["source"], []).append(document["text"])
    return {source: gzip_bits_per_byte(own) for source, own in texts.items()}


def _against(
    before: list[dict[str, Any]], reward: Path, tasks: list[Task], answers: list[dict[str, Any]]
) -> dict[str, float]:
    """Win rates of these answers over those before to the same tasks: by the reward model, and by
    the checks.
    """
    scorer, tokenizer = load_scorer(reward, device=best_device()), load_tokenizer(reward)
    rewards = [
        score(
            scorer,
            tokenizer,
            [
                [*t.prompt, {"role": "assistant", "content": a["answer"]}]
                for t, a in zip(tasks, side)
            ],
        )
        for side in (answers, before)
    ]
    judged = win_rate(*rewards)
    checks = win_rate(*([float(a["correct"]) for a in side] for side in (answers, before)))
    return {
        **_named("win_rate", judged["win_rate"], judged["low"], judged["high"]),
        "win_rate_checked": checks["win_rate"],
        "reward_mean": sum(rewards[0]) / len(rewards[0]),
        "reward_mean_before": sum(rewards[1]) / len(rewards[1]),
    }


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    config: EvaluateConfig = recipe.evaluate
    answers = 2 * config.checked + (3 * config.test if "base" in roles else 0)
    return Effort(answers=answers, rows={CONVERSATION: _SCORED * config.heldout_bytes})


STAGE = Stage(
    name="evaluate",
    help="Score a model.",
    config=EvaluateConfig,
    inputs={"model": MODEL, "corpus": CORPUS},
    outputs=["base", "start"],
    run=evaluate_model,
    estimate=_effort,
)
