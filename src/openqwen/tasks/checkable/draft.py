"""What every kind of checkable task shares: its drafts, and the helpers that draw them."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from numpy.random import Generator

from openqwen.tasks.checkable.words import WORDS

# kind -> the ways to put its question
FORMS: dict[str, list[str]] = tomllib.loads(
    (Path(__file__).parent / "forms.toml").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Draft:
    """One drawn question.

    Args:
        problem: what is asked, whatever its wording: the operation and its operands, sorted where
            their order changes nothing. It decides the split, so that no held-out problem is a
            trained one in other words.
        question: the user's message.
        answer: one right answer.
        wrong: plausible answers; those that happen to be right are removed later.
        chance: accuracy of the best blind guess: one constant answer, or a pick among the answers
            that the question itself names ("yes or no", "12 or 40", an order of the given words).
        grader: how answers are judged.
        pattern: for the grader "regex".
    """

    problem: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    chance: float
    grader: str = "exact"
    pattern: str | None = None


def problem_of(operation: str, *operands: object) -> str:
    """The canonical form of a problem, as `Draft` holds it."""
    return " ".join(map(str, (operation, *operands)))


def pick(rng: Generator, *options: str) -> str:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def number(rng: Generator, low: int, high: int) -> int:
    """A whole number in [low, high], uniformly."""
    return int(rng.integers(low, high + 1))


def words(rng: Generator, count: int) -> list[str]:
    """`count` different words, uniformly, in random order."""
    drawn: list[str] = []
    while len(drawn) < count:
        word = WORDS[int(rng.integers(len(WORDS)))]
        if word not in drawn:
            drawn.append(word)
    return drawn
