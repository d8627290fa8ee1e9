"""Accuracy on graded tasks, beside the accuracy of the best blind guess."""

from collections.abc import Sequence
from typing import Any

from openqwen.engine import Generator, Sampling
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.tasks import Task, answer_tasks


def sampled_right(
    generator: Generator,
    tasks: Sequence[Task],
    max_tokens: int,
    progress: Progress | None = None,
    temperature: float = 1.0,
    plain: bool = False,
) -> list[bool]:
    """Sample one answer to each task; returns which are right.

    At temperature 1 their share is the expected score of the policy; greedy decoding hides how sure
    a policy is. The seeds are always the same, so that chance changes little between two models.
    plain: ask in plain text, for a model that has not learned the chat format.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    answers = answer_tasks(generator, tasks, sampling, range(len(tasks)), plain, progress)
    return [answer.grade.passed for answer in answers]


def checked_accuracy(
    generator: Generator,
    tasks: Sequence[Task],
    max_tokens: int,
    progress: Progress | None = None,
    plain: bool = False,
) -> dict[str, Any]:
    """Answer every task greedily; returns accuracies and the graded answers.

    An answer whose grader failed is in no accuracy and in no count; its "correct" is None.

    Returns:
        {"checked_accuracy", "chance", "checked_by_task": {kind: {"accuracy", "chance", "n"}},
        "answers"}, where answers[i] is {"task", "prompt", "answer", "correct", "finish_reason"} of
        tasks[i], "task" its kind.
    """
    if not tasks:
        raise ValueError("there are no tasks to answer")
    sampling = Sampling(max_tokens=max_tokens)
    answers = answer_tasks(generator, tasks, sampling, plain=plain, progress=progress)
    by_kind: dict[str, dict[str, float]] = {}
    counted = [pair for pair in zip(tasks, answers, strict=True) if pair[1].grade.counts]
    if not counted:
        what = f"No answer could be graded: {answers[0].grade.reason}."
        raise OpenQwenError(what, f"task {tasks[0].id}", "see `openqwen sandbox --check`")
    for task, answer in counted:
        row = by_kind.setdefault(task.kind, {"accuracy": 0.0, "chance": 0.0, "n": 0})
        row["accuracy"] += answer.grade.passed
        row["chance"] += task.reference.get("chance", 0.0)
        row["n"] += 1
    for row in by_kind.values():
        row["accuracy"] /= row["n"]
        row["chance"] /= row["n"]
    return {
        "checked_accuracy": sum(answer.grade.passed for _, answer in counted) / len(counted),
        "chance": sum(task.reference.get("chance", 0.0) for task, _ in counted) / len(counted),
        "checked_by_task": dict(sorted(by_kind.items())),
        "answers": [
            {
                "task": task.kind,
                "prompt": answer.prompt,
                "answer": answer.output.text,
                "correct": answer.grade.passed if answer.grade.counts else None,
                "finish_reason": answer.output.finish_reason,
            }
            for task, answer in zip(tasks, answers)
        ],
    }
