"""What every kind of checkable task shares: its pieces, and the helpers that draw them."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from numpy.random import Generator

from openqwen.instruct.synthesize.words import WORDS

# kind -> the ways to put its question
FORMS: dict[str, list[str]] = tomllib.loads(
    (Path(__file__).parent / "forms.toml").read_text(encoding="utf-8")
)
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Draft:
    """One drawn question. `accepts` is None where only the exact answer is right.

    `problem` is what the question asks, however it is put: the operation and its operands, sorted
    where their order changes nothing (`problem_of`). It decides the split, so that no held-out
    problem is a trained one in other words.

    `chance` is the accuracy of the best blind guess: one constant answer, or a pick among the
    answers that the question itself names ("yes or no", "12 or 40", the words of a list, an order
    of the given words).
    """

    problem: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    chance: float
    accepts: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Kind:
    """A family member such as `add`: a name and a function that draws one question."""

    name: str
    family: str
    draw: Callable[[Generator], Draft]


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
