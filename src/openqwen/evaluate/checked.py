"""Accuracy on tasks that a program checks, against the best blind guess."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from openqwen.engine import Generator, Sampling
from openqwen.support.progress import Progress


class Item(NamedTuple):
    """One task.

    task: the name of its kind. prompt: messages, or plain text for a model that has not learned to
    chat. chance: the accuracy (0 to 1) of the best blind guess. check: whether a text is right.
    """

    task: str
    prompt: str | list[dict[str, str]]
    chance: float
    check: Callable[[str], bool]


def sampled_right(
    engine: Generator,
    items: Sequence[Item],
    max_tokens: int,
    progress: Progress | None = None,
    temperature: float = 1.0,
) -> list[bool]:
    """Which answers are right when each is drawn once.

    At temperature 1 their share is the score that the policy expects; greedy decoding hides how
    sure a policy is. The draws are always the same, so two models differ by little chance.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    outputs = engine.generate(
        [item.prompt for item in items], sampling, seeds=range(len(items)), progress=progress
    )
    return [item.check(output.text) for item, output in zip(items, outputs, strict=True)]


def checked_accuracy(
    engine: Generator, items: Sequence[Item], max_tokens: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Greedy answers to every item, checked.

    Returns {"checked_accuracy", "chance", "checked_by_task": {task: {"accuracy", "chance", "n"}},
    "answers"}, where answers[i] is {"task", "prompt", "answer", "correct", "finish_reason"} for
    items[i].
    """
    if not items:
        raise ValueError("no items to check")
    outputs = engine.generate(
        [item.prompt for item in items], Sampling(max_tokens=max_tokens), progress=progress
    )
    correct = [item.check(output.text) for item, output in zip(items, outputs, strict=True)]
    by_task: dict[str, dict[str, float]] = {}
    for item, right in zip(items, correct):
        row = by_task.setdefault(item.task, {"accuracy": 0.0, "chance": 0.0, "n": 0})
        row["accuracy"] += right
        row["chance"] += item.chance
        row["n"] += 1
    for row in by_task.values():
        row["accuracy"] /= row["n"]
        row["chance"] /= row["n"]
    return {
        "checked_accuracy": sum(correct) / len(items),
        "chance": sum(item.chance for item in items) / len(items),
        "checked_by_task": dict(sorted(by_task.items())),
        "answers": [
            {
                "task": item.task,
                "prompt": item.prompt,
                "answer": output.text,
                "correct": right,
                "finish_reason": output.finish_reason,
            }
            for item, output, right in zip(items, outputs, correct)
        ],
    }
