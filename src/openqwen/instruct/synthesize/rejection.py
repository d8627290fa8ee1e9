"""Rejection sampling: the model answers, graders check, right answers become demonstrations.

Qwen2 report, section 4.1 ("Rejection Sampling"); de-duplication as in RFT (Yuan et al. 2023).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from openqwen.engine import Generator, Sampling
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.tasks import GradedAnswer, Task, answer_tasks


def sample_answers(
    generator: Generator,
    tasks: Sequence[Task],
    samples: int,
    temperatures: Sequence[float],
    max_tokens: int,
    seed: int,
    label: str,
    plain: bool = False,
) -> list[list[GradedAnswer]]:
    """Sample `samples` graded answers to each task, each with its own seed.

    The n-th answer to a task is sampled at the n-th temperature; after the last comes the first.
    plain: ask in plain text, for a model that has not learned the chat format.
    """
    seeds = Generators(seed)[label].integers(2**31, size=(len(tasks), samples))
    answers: list[list[GradedAnswer]] = [[] for _ in tasks]
    with progress(label, len(tasks) * samples, "answers") as work:
        for n in range(samples):
            temperature = temperatures[n % len(temperatures)]
            sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
            batch = answer_tasks(generator, tasks, sampling, seeds[:, n].tolist(), plain, work)
            for group, answer in zip(answers, batch, strict=True):
                group.append(answer)
    return answers


def rejection_sample(
    generator: Generator,
    tasks: Sequence[Task],
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    model: str | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Make demonstrations of a pre-trained model's right answers, all different ones to each task.

    The model has not learned the chat format yet: it is asked in the plain format of its
    pre-training data.

    Returns:
        The demonstrations, and {"samples", "correct", "rate", "by_task": {kind: the first three}}.
    """
    answers = sample_answers(
        generator, tasks, samples, [temperature], max_tokens, seed, "rejection", plain=True
    )
    origin: dict[str, Any] = {"method": "rejection", "seed": seed, "parents": []}
    if model:
        origin["model"] = model
    demonstrations: list[dict[str, Any]] = []
    sampled: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for task, group in zip(tasks, answers, strict=True):
        right = [answer.text for answer in group if answer.grade.passed]
        sampled[task.kind] += sum(answer.grade.counts for answer in group)
        correct[task.kind] += len(right)
        for text in dict.fromkeys(right):
            messages = [*task.prompt, {"role": "assistant", "content": text}]
            demonstrations.append({"messages": messages, "origin": origin | {"tasks": [task.kind]}})
    by_task = {kind: _counted(sampled[kind], correct[kind]) for kind in sorted(sampled)}
    acceptance = _counted(sampled.total(), correct.total()) | {"by_task": by_task}
    return demonstrations, acceptance


def _counted(samples: int, correct: int) -> dict[str, Any]:
    return {"samples": samples, "correct": correct, "rate": correct / samples if samples else 0.0}
