"""Draw checkable tasks, and keep the problems of train, heldout and test apart.

They stand for Qwen2's tasks with definite answers and its constraint following by execution
(report, section 4.1): rejection sampling, preferences and evaluation use them.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.tasks.checkable.closing import CLOSING
from openqwen.tasks.checkable.draft import Draft
from openqwen.tasks.checkable.kinds_numbers import NUMBER_KINDS
from openqwen.tasks.checkable.kinds_text import TEXT_KINDS
from openqwen.tasks.graders import grade
from openqwen.tasks.task import Task

KINDS: Mapping[str, Callable[[np.random.Generator], Draft]] = NUMBER_KINDS | TEXT_KINDS
SPLITS = ("train", "heldout", "test")
_PATIENCE = 1000  # draws in a row without a new prompt before a kind counts as used up


def split_of(problem: str) -> str:
    """The split of a problem, by a hash: "train", or one of two tenths that are never trained on.

    "heldout" is for development: settings are chosen by it. "test" is for the final result: nothing
    is chosen by it.
    """
    digest = hashlib.sha256(problem.encode()).digest()
    return {0: "heldout", 1: "test"}.get(int.from_bytes(digest[:8], "big") % 10, "train")


def draw_task(kind: str, rng: np.random.Generator) -> Task:
    """One task of a kind, from any split.

    Its reference holds a right "answer", "wrong" ones that are plausible, "chance", and the
    "closing" word that may stand behind an answer; its origin the "kind" and the "problem", which
    decides the split. See `draft.Draft`.
    """
    return _task(kind, KINDS[kind](rng))


def _task(kind: str, draft: Draft) -> Task:
    digest = hashlib.sha256(draft.question.encode()).hexdigest()
    reference: dict[str, Any] = {"answer": draft.answer, "chance": draft.chance}
    reference["closing"] = CLOSING
    if draft.pattern is not None:
        reference["pattern"] = draft.pattern
    task = Task(
        id=f"{kind}/{digest[:16]}",
        prompt=[{"role": "user", "content": draft.question}],
        grader=draft.grader,
        reference=reference,
        origin={"method": "program", "kind": kind, "problem": draft.problem},
    )
    # A drafted wrong answer can be right: two sorted numbers in their given order.
    drafted = [text for text in dict.fromkeys(draft.wrong) if text]
    grades = grade([task] * len(drafted), drafted)
    reference["wrong"] = [text for text, verdict in zip(drafted, grades) if not verdict.passed]
    return task


def stream_tasks(rng: np.random.Generator, split: str = "train") -> Iterator[Task]:
    """Tasks of one split without end, kinds drawn uniformly; prompts may return."""
    kinds = list(KINDS)
    while True:
        kind = kinds[int(rng.integers(len(kinds)))]
        draft = KINDS[kind](rng)
        if split_of(draft.problem) == split:
            yield _task(kind, draft)


def generate_tasks(
    rng: np.random.Generator,
    count: int,
    split: str = "train",
    kinds: Collection[str] | None = None,
) -> list[Task]:
    """Tasks of one split with different prompts, all kinds (or those named) equally often.

    They come in random order. A kind with no new prompts left leaves its share to the others.

    Raises:
        OpenQwenError: all kinds are used up.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    seen: set[str] = set()
    open_kinds = list(KINDS if kinds is None else kinds)
    tasks: list[Task] = []
    while len(tasks) < count:
        for kind in open_kinds[: count - len(tasks)]:
            task = _new_task(kind, rng, split, seen)
            if task is None:
                open_kinds.remove(kind)
            else:
                tasks.append(task)
        if not open_kinds and len(tasks) < count:
            raise OpenQwenError(
                f"There are only {len(tasks)} different prompts, not {count}.",
                where=f"checkable tasks, {split} split",
                do="ask for fewer demonstrations, prompts or preferences",
            )
    return [tasks[i] for i in rng.permutation(count)]


def _new_task(kind: str, rng: np.random.Generator, split: str, seen: set[str]) -> Task | None:
    for _ in range(_PATIENCE):
        draft = KINDS[kind](rng)
        if split_of(draft.problem) == split and draft.question not in seen:
            seen.add(draft.question)
            return _task(kind, draft)
    return None
