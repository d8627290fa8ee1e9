"""Tasks whose answers a program can check: the questions, their gold answers, and the split of
train and held out.

They stand for Qwen2's tasks with definite answers and its constraint following by execution
(report, section 4.1): rejection sampling, preferences and evaluation all rest on `Task.check`.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from operator import eq

from numpy.random import Generator

from openqwen.instruct.synthesize.kinds import Kind
from openqwen.instruct.synthesize.kinds_numbers import NUMBER_KINDS
from openqwen.instruct.synthesize.kinds_text import TEXT_KINDS
from openqwen.support.errors import OpenQwenError

KINDS: dict[str, Kind] = {kind.name: kind for kind in NUMBER_KINDS + TEXT_KINDS}

SPLITS = ("train", "heldout", "test")
_LONGEST = 200  # characters of an answer that is looked at; every right one is far shorter
_PATIENCE = 1000  # draws in a row without a new prompt before a kind counts as used up


@dataclass(frozen=True)
class Task:
    """One checkable task.

    task: the kind's name. family: arithmetic, counting, strings or format. problem: what is asked,
    however it is put; it decides the split. prompt: messages. answer: one right answer. wrong:
    plausible answers that fail. chance: accuracy of the best blind guess. For `problem` and
    `chance` see `kinds.Draft`.
    """

    task: str
    family: str
    problem: str
    prompt: list[dict[str, str]]
    answer: str
    wrong: tuple[str, ...]
    chance: float
    accepts: Callable[[str], bool]

    @property
    def question(self) -> str:
        """The text of the user's message; it identifies the task."""
        return self.prompt[-1]["content"]

    def check(self, text: str) -> bool:
        """Whether an answer is right.

        White space around it is forgiven, nothing else; any text is safe to pass.
        """
        return _judge(text, self.accepts)


def _judge(text: str, accepts: Callable[[str], bool]) -> bool:
    if len(text) > 10 * _LONGEST:
        return False
    text = text.strip()
    return len(text) <= _LONGEST and accepts(text)


def split_of(problem: str) -> str:
    """The split of a problem, by a hash: "train", or one of two tenths that are never trained on.

    "heldout" is for development: settings are chosen by it. "test" is for the last word: nothing is
    chosen by it.
    """
    digest = hashlib.sha256(problem.encode()).digest()
    return {0: "heldout", 1: "test"}.get(int.from_bytes(digest[:8], "big") % 10, "train")


def draw_task(kind: Kind, rng: Generator) -> Task:
    """One task of a kind, from any split."""
    draft = kind.draw(rng)
    accepts = draft.accepts or partial(eq, draft.answer)
    wrong = tuple(dict.fromkeys(w for w in draft.wrong if w and not _judge(w, accepts)))
    prompt = [{"role": "user", "content": draft.question}]
    about = kind.name, kind.family, draft.problem
    return Task(*about, prompt, draft.answer, wrong, draft.chance, accepts)


def stream_tasks(rng: Generator, split: str = "train") -> Iterator[Task]:
    """Tasks of one split without end, kinds drawn uniformly; prompts may return."""
    kinds = list(KINDS.values())
    while True:
        task = draw_task(kinds[int(rng.integers(len(kinds)))], rng)
        if split_of(task.problem) == split:
            yield task


def generate_tasks(
    rng: Generator,
    n: int,
    split: str = "train",
    kinds: Collection[str] | None = None,
) -> list[Task]:
    """`n` tasks of one split with different prompts, all kinds (or those named) equally often, in
    random order.

    A kind with no new prompts left leaves its share to the others; OpenQwenError when all are used
    up.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    seen: set[str] = set()
    open_kinds = [KINDS[name] for name in (KINDS if kinds is None else kinds)]
    tasks: list[Task] = []
    while len(tasks) < n:
        for kind in open_kinds[: n - len(tasks)]:
            task = _new_task(kind, rng, split, seen)
            if task is None:
                open_kinds.remove(kind)
            else:
                tasks.append(task)
        if not open_kinds and len(tasks) < n:
            raise OpenQwenError(
                f"Only {len(tasks)} different prompts are left of the {n} asked for.",
                where=f"checkable tasks, {split} split",
                do="ask for fewer demonstrations, prompts or preferences",
            )
    return [tasks[i] for i in rng.permutation(n)]


def _new_task(kind: Kind, rng: Generator, split: str, seen: set[str]) -> Task | None:
    for _ in range(_PATIENCE):
        task = draw_task(kind, rng)
        if split_of(task.problem) == split and task.question not in seen:
            seen.add(task.question)
            return task
    return None
