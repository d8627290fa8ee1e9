"""The scores of one model: what `evaluate-…` stages run."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from openqwen.corpus.documents import read_documents
from openqwen.engine import Engine
from openqwen.evaluate.bits_per_byte import bits_per_byte, within_budget
from openqwen.evaluate.checked import checked_accuracy, sampled_accuracy
from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.preferences import pair_accuracy, win_rate_of_scores
from openqwen.evaluate.samples import sample_answers
from openqwen.instruct.synthesize.rejection import plain_answer, plain_prompt
from openqwen.instruct.synthesize.tasks import Task, generate_tasks
from openqwen.model import load_model, load_scorer
from openqwen.recipe.stage import Work
from openqwen.support.device import best_device
from openqwen.support.files import gzip_bits_per_byte, read_json, read_jsonl, write_json, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.tokenizer import load_tokenizer
from openqwen.train.reward import score

_SYNTHETIC = "tasks"  # multi-task data is not among the held-out text that bits per byte and gzip are measured on


@dataclass(frozen=True)
class PlainTask:
    """A task put as plain text, for a model that has not learned the chat format yet."""

    inner: Task

    @property
    def task(self) -> str:
        """The kind of task."""
        return self.inner.task

    @property
    def chance(self) -> float:
        """Accuracy of the best blind guess."""
        return self.inner.chance

    @property
    def prompt(self) -> str:
        """The question, and the start of an answer."""
        return plain_prompt(self.inner.question)

    def check(self, text: str) -> bool:
        """Whether the first line is right."""
        return self.inner.check(plain_answer(text))


def evaluate_model(work: Work) -> dict[str, float]:
    """Bits per byte, checked tasks, samples; retention and win rate where there is something to compare with.

    A model that comes before SFT (no `base` to compare with) is asked in plain text, a chat model in its template.
    """
    config = cast(EvaluateConfig, work.config)
    folder, device = work.inputs["model"], best_device()
    model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    engine = Engine(model, tokenizer)
    scores: dict[str, Any] = {}

    documents = [d for d in read_documents(work.inputs["corpus"] / "heldout.parquet") if d["source"] != _SYNTHETIC]
    documents = within_budget(documents, config.heldout_bytes)
    context = min(config.context, model.config.max_position_embeddings)
    result = bits_per_byte(model, tokenizer, documents, context, device)
    scores |= {
        "bits_per_byte": result.overall,
        "bits_per_byte_by_source": result.by_source,
        "gzip_bits_per_byte": gzip_bits_per_byte(d["text"] for d in documents),
        "gzip_bits_per_byte_by_source": _gzip_by_source(documents),
        "context": context,
    }

    # The same held-out tasks for every stage and every run: their seed is not the run's.
    tasks = generate_tasks(Generators(0)["evaluate"], config.checked, split="heldout")
    items = tasks if "base" in work.inputs else [PlainTask(task) for task in tasks]
    with progress("checked tasks", 2 * len(items), "answers") as bar:
        checked = checked_accuracy(engine, items, config.max_tokens, bar)
        scores["sampled_accuracy"] = sampled_accuracy(engine, items, config.max_tokens, bar)
    answers = checked.pop("answers")
    scores |= checked
    if "base" in work.inputs:
        scores["retention"] = result.overall / read_json(work.inputs["base"] / "scores.json")["bits_per_byte"]
    if "reward" in work.inputs:
        scores |= _against(work.inputs["sft"], work.inputs["reward"], tasks, answers)

    write_json(work.output / "scores.json", scores)
    write_jsonl(work.output / "answers.jsonl", answers)
    write_json(work.output / "samples.json", sample_answers(engine, config.sample_tokens))
    first = ("bits_per_byte", "checked_accuracy", "sampled_accuracy", "win_rate")
    ordered = {name: scores[name] for name in first if name in scores} | scores
    return {name: value for name, value in ordered.items() if isinstance(value, float)}


def _gzip_by_source(documents: list[dict[str, Any]]) -> dict[str, float]:
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document["source"], []).append(document["text"])
    return {source: gzip_bits_per_byte(own) for source, own in texts.items()}


def _against(baseline: Path, reward: Path, tasks: list[Task], answers: list[dict[str, Any]]) -> dict[str, float]:
    """Win rates of these answers over the baseline's to the same tasks: by the reward model, and by the checks."""
    scorer, tokenizer = load_scorer(reward, device=best_device()), load_tokenizer(reward)
    before = list(read_jsonl(baseline / "answers.jsonl"))
    rewards = [
        score(
            scorer, tokenizer, [[*t.prompt, {"role": "assistant", "content": a["answer"]}] for t, a in zip(tasks, side)]
        )
        for side in (answers, before)
    ]
    judged = win_rate_of_scores(*rewards)
    checks = win_rate_of_scores(*([float(a["correct"]) for a in side] for side in (answers, before)))
    return {
        "win_rate": judged["win_rate"],
        "win_rate_low": judged["low"],
        "win_rate_high": judged["high"],
        "win_rate_checked": checks["win_rate"],
        "reward_mean": sum(rewards[0]) / len(rewards[0]),
        "reward_mean_before": sum(rewards[1]) / len(rewards[1]),
    }


def evaluate_reward(work: Work) -> dict[str, float]:
    """How often the reward model puts the better answer first, on held-out pairs."""
    folder = work.inputs["reward"]
    scorer, tokenizer = load_scorer(folder, device=best_device()), load_tokenizer(folder)
    pairs = list(read_jsonl(work.inputs["preferences"] / "heldout.jsonl"))
    scores = pair_accuracy(partial(score, scorer, tokenizer), pairs)
    write_json(work.output / "scores.json", scores)
    return {name: value for name, value in scores.items() if isinstance(value, float)}
