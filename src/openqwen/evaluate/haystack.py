"""Contexts of a wanted length in tokens, from books: needles in a haystack and RULER's tasks.

Everything is drawn from a generator named by the question, so the same books, seed and tokenizer
give the same questions. Each kind of context is a class whose `values(n)` are what templates see
with n units of it: sentences, words or documents. The first n units are always the same.

Source: Hsieh et al. 2024, RULER, and its generators (github.com/NVIDIA/RULER).
"""

import math
import re
import string
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"[a-z]{4,10}")
_TRIES = 20
Values = dict[str, Any]


@dataclass(frozen=True)
class Books:
    """Text to hide things in, as sentences in order, and its words."""

    sentences: Sequence[str]

    @cached_property
    def words(self) -> list[str]:
        """Words of 4 to 10 small letters that stand there twice or more, by the alphabet."""
        seen: set[str] = set()
        twice: set[str] = set()
        for sentence in self.sentences:
            for word in _WORD.findall(sentence):
                (twice if word in seen else seen).add(word)
        return sorted(twice)

    @classmethod
    def of(cls, texts: Iterable[str], most: int) -> "Books":
        """The first texts, until there are `most` characters."""
        sentences: list[str] = []
        size = 0
        for text in texts:
            for part in _SENTENCE.split(text):
                if sentence := " ".join(part.split()):
                    sentences.append(sentence)
                    size += len(sentence)
                if size >= most:
                    return cls(sentences)
        return cls(sentences)


class Filling(Protocol):
    """A kind of context, whose length is a number of units."""

    @property
    def least(self) -> int:
        """The fewest units that it may have."""

    @property
    def most(self) -> int:
        """The most units."""

    def values(self, n: int) -> Values:
        """What templates see with n units: `context` and others; `answers` are the right ones."""
        ...


@dataclass
class Needles:
    """Sentences with needles, `needle(key, value)`, which are asked for by their keys.

    Args:
        sentences: the haystack; its units are taken from `start` on.
        needle: a needle as a text.
        pairs: (key, value) of all needles.
        queried: the keys that are asked for.
        depths: where each needle stands, as a share of the context.
        joint: between two sentences.
    """

    sentences: Sequence[str]
    needle: Callable[[str, str], str]
    pairs: Sequence[tuple[str, str]]
    queried: Sequence[str]
    depths: Sequence[float]
    joint: str = " "
    start: int = 0
    least: int = 1

    @property
    def most(self) -> int:
        """All sentences."""
        return len(self.sentences)

    def values(self, n: int) -> Values:
        """context, query (the keys), count (of the answers), answers."""
        size = len(self.sentences)
        hay = [self.sentences[(self.start + i) % size] for i in range(n)]
        placed = sorted(zip(self.depths, self.pairs), key=lambda one: one[0], reverse=True)
        for depth, (key, value) in placed:
            hay.insert(round(depth * n), self.needle(key, value))
        *first, last = self.queried
        query = f"{', '.join(first)}, and {last}" if first else last
        answers = [value for key in self.queried for known, value in self.pairs if known == key]
        context = self.joint.join(hay)
        return {"context": context, "query": query, "count": len(answers), "answers": answers}


@dataclass
class Variables:
    """Noise with a chain of assignments: which variables have the value (RULER's vt)."""

    names: Sequence[str]
    value: str
    places: Sequence[float]
    least: int = 5
    most: int = 10**6

    def values(self, n: int) -> Values:
        """context, query (the value), count (of the variables), answers."""
        hay = [f"{NOISE}\n"] * n
        chain = [f"VAR {self.names[0]} = {self.value}"]
        chain += [f"VAR {name} = VAR {old} " for old, name in zip(self.names, self.names[1:])]
        for number, (place, text) in enumerate(zip(sorted(self.places), chain)):
            hay.insert(int(place * n) + number, text)
        context = " ".join(hay).replace(". \n", ".\n")
        answers = list(self.names)
        return {"context": context, "query": self.value, "count": len(answers), "answers": answers}


@dataclass
class CommonWords:
    """A numbered list of words, ten of which come more often (RULER's cwe).

    words: the first ten are the common ones. often, seldom: how often each word comes.
    """

    words: Sequence[str]
    often: int
    seldom: int
    seed: int
    least: int = 20
    common: int = 10

    @property
    def most(self) -> int:
        """All words."""
        return len(self.words)

    def values(self, n: int) -> Values:
        """context, answers."""
        common = list(self.words[: self.common])
        listed = common * self.often + list(self.words[self.common : n]) * self.seldom
        np.random.default_rng(self.seed).shuffle(listed)
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return {"context": context, "query": "", "count": len(common), "answers": common}


@dataclass
class FrequentWords:
    """Coded words by Zipf's law with the exponent 2; the most frequent is noise (RULER's fwe)."""

    words: Sequence[str]
    seed: int
    least: int = 60
    most: int = 10**7

    def values(self, n: int) -> Values:
        """context, answers: the three most frequent words."""
        ranks = np.arange(1, len(self.words) + 1)
        counts = (n * ranks**-2.0 / (math.pi**2 / 6)).astype(int)
        words = ["...", *self.words[1:]]
        listed = [word for word, count in zip(words, counts) for _ in range(count)]
        np.random.default_rng(self.seed).shuffle(listed)
        return {"context": " ".join(listed), "query": "", "count": 3, "answers": words[1:4]}


@dataclass
class Documents:
    """Numbered documents, some of which answer a question (RULER's qa).

    documents: those that answer, then others.
    """

    question: str
    answers: list[str]
    documents: Sequence[str]
    seed: int
    least: int = 1

    @property
    def most(self) -> int:
        """All documents."""
        return len(self.documents)

    def values(self, n: int) -> Values:
        """context, query (the question), answers."""
        chosen = list(self.documents[:n])
        np.random.default_rng(self.seed).shuffle(chosen)
        parts = [f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1)]
        context = "\n\n".join(parts)
        return {"context": context, "query": self.question, "count": 1, "answers": self.answers}


def fitting(context: Filling, tokens: Callable[[int], int], room: int) -> int | None:
    """The most units with which `tokens(n)` is at most `room`; None where the least are too many.

    The search goes by interpolation, as tokens grow about evenly with the units. It ends when a
    five hundredth of the room or less is left, or after 20 tries.
    """
    low, high = context.least, context.most
    at_low = tokens(low)
    if at_low > room:
        return None
    at_high, known = 0, False
    guess = max(low + 1, low * 8)
    for _ in range(_TRIES):
        if low >= high or (known and room - at_low <= room // 500):
            break
        n = min(max(guess, low + 1), high)
        size = tokens(n)
        if size <= room:
            low, at_low = n, size
        else:
            high, at_high, known = n - 1, size, True
        if not known:
            guess = int(n * min(16.0, 1.02 * room / max(1, size))) + 1
        else:
            share = (room - at_low) / max(1, at_high - at_low)
            guess = low + int(share * (high + 1 - low))
    return low


@dataclass(frozen=True)
class Draws:
    """Random keys and values, from one generator."""

    rng: np.random.Generator
    words: Sequence[str] = field(default=())

    def distinct(self, kind: str | Sequence[str], n: int) -> list[str]:
        """Different texts: "numbers" of seven digits, "words" such as fine-house, "uuids", or some
        of a list.
        """
        if not isinstance(kind, str):
            return [kind[i] for i in self.rng.permutation(len(kind))[:n]]
        found: dict[str, None] = {}
        while len(found) < n:
            found[self._one(kind)] = None
        return list(found)

    def letters(self, alphabet: str, size: int, n: int) -> list[str]:
        """Different strings of letters."""
        found: dict[str, None] = {}
        while len(found) < n:
            found["".join(self.rng.choice(list(alphabet), size))] = None
        return list(found)

    def _one(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.integers(10**6, 10**7))
        if kind == "uuids":
            return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))
        return "-".join(self.words[i] for i in self.rng.integers(len(self.words), size=2))


def variables(draws: Draws, hops: int = 4, letters: int = 5) -> Variables:
    """A chain of hops + 1 variables with a value of five digits."""
    names = draws.letters(string.ascii_uppercase, letters, hops + 1)
    value = str(draws.rng.integers(10_000, 99_999))
    return Variables(names, value, draws.rng.random(len(names)).tolist())


def frequent_words(draws: Draws, room: int) -> FrequentWords:
    """Coded words of six letters, one for each 50 tokens, as RULER draws them."""
    words = draws.letters(string.ascii_lowercase, 6, max(20, room // 50))
    return FrequentWords(words, int(draws.rng.integers(2**31)))


def common_words(draws: Draws, room: int, example: bool) -> CommonWords:
    """A list of words; RULER repeats them less in short contexts and in the solved example."""
    short = room < 4_096 - 128
    often, seldom = ((3, 1) if short else (10, 3)) if example else ((6, 1) if short else (30, 3))
    order = draws.rng.permutation(len(draws.words))
    words = [draws.words[i] for i in order]
    return CommonWords(words, often, seldom, int(draws.rng.integers(2**31)))
