"""A task as data, and the grade of one answer to it."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class Task:
    """One question whose answers can be graded.

    Args:
        id: unique in its file.
        prompt: chat messages, each with "role" and "content".
        grader: the name of a grader in `graders.GRADERS`.
        reference: what the grader compares answers with; the grader says which fields it needs.
            It may also hold "chance", the accuracy (0 to 1) of the best blind guess.
        origin: how the task was made: "method", "model", "seed", "parents". Its "kind" is the
            group in which the task is counted.
    """

    id: str
    prompt: list[dict[str, Any]]
    grader: str
    reference: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the last message."""
        return self.prompt[-1]["content"]

    @property
    def kind(self) -> str:
        """The group in which the task is counted."""
        return self.origin.get("kind", "other")


class Grade(NamedTuple):
    """A grader's verdict on one answer: right or not, a score from 0 to 1, and why it failed.

    status: "graded"; "no_answer": nothing in the answer could be graded, which counts as wrong;
    "infra": the grader itself failed, which says nothing of the answer.
    raw: the number that a model gave, before it was scaled to `score`: a rating or a reward.
    """

    passed: bool
    score: float
    reason: str
    status: Literal["graded", "no_answer", "infra"] = "graded"
    raw: float | None = None

    @property
    def counts(self) -> bool:
        """False: the grade must be left out of rewards, statistics and training data."""
        return self.status != "infra"
