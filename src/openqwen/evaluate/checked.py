"""Accuracy on graded tasks, beside the accuracy of the best blind guess."""

from collections.abc import Sequence
from typing import Any

from openqwen.engine import Generator, Sampling
from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.tasks import GradedAnswer, Task, answer_tasks
from openqwen.tasks.checkable import stands_alone


def sampled_answers(
    generator: Generator,
    tasks: Sequence[Task],
    max_tokens: int,
    progress: Progress | None = None,
    temperature: float = 1.0,
    plain: bool = False,
) -> list[GradedAnswer]:
    """Sample one answer to each task.

    At temperature 1 the share of right ones is the expected score of the policy; greedy decoding
    hides how sure a policy is. The seeds are always the same, so that chance changes little between
    two models.
    plain: ask in plain text, for a model that has not learned the chat format.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    answers = answer_tasks(generator, tasks, sampling, range(len(tasks)), plain, progress)
    _check_graded(tasks, answers)
    return answers


def checked_accuracy(
    generator: Generator,
    tasks: Sequence[Task],
    max_tokens: int,
    progress: Progress | None = None,
    plain: bool = False,
) -> dict[str, Any]:
    """Answer every task greedily; returns accuracies and the graded answers.

    Returns:
        {"checked_accuracy", "chance", "checked_by_task": {kind: {"accuracy", "chance", "n"}},
        "answers"}, where answers[i] is {"task", "prompt", "answer", "correct", "style",
        "finish_reason"} of tasks[i]: "task" its kind, "style" whether the answer stands alone.
    """
    if not tasks:
        raise ValueError("there are no tasks to answer")
    sampling = Sampling(max_tokens=max_tokens)
    answers = answer_tasks(generator, tasks, sampling, plain=plain, progress=progress)
    by_kind: dict[str, dict[str, float]] = {}
    _check_graded(tasks, answers)
    for task, answer in zip(tasks, answers, strict=True):
        row = by_kind.setdefault(task.kind, {"accuracy": 0.0, "chance": 0.0, "n": 0})
        row["accuracy"] += answer.grade.passed
        row["chance"] += task.reference.get("chance", 0.0)
        row["n"] += 1
    for row in by_kind.values():
        row["accuracy"] /= row["n"]
        row["chance"] /= row["n"]
    return {
        "checked_accuracy": sum(answer.grade.passed for answer in answers) / len(answers),
        "chance": sum(task.reference.get("chance", 0.0) for task in tasks) / len(tasks),
        "checked_by_task": dict(sorted(by_kind.items())),
        "answers": [
            {
                "task": task.kind,
                "prompt": answer.prompt,
                "answer": answer.output.text,
                "correct": answer.grade.passed,
                "style": stands_alone(answer.text),
                "finish_reason": answer.output.finish_reason,
            }
            for task, answer in zip(tasks, answers)
        ],
    }


def _check_graded(tasks: Sequence[Task], answers: Sequence[GradedAnswer]) -> None:
    """Raise OpenQwenError where a grader failed: scores of two models need the same tasks."""
    for task, answer in zip(tasks, answers, strict=True):
        if not answer.grade.counts:
            what = f"An answer could not be graded: {answer.grade.reason}."
            raise OpenQwenError(what, f"task {task.id}", f"run {command('sandbox', '--check')}")
