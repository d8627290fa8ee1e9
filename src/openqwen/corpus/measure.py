"""What the filter rules look at: counted once for each document, shared by all rules."""

import re
from functools import cached_property

import numpy as np

from openqwen.corpus.clean import PARAGRAPH_END, logical_lines

# Thai, Lao, Myanmar, Khmer, kana and Chinese characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
)


class Measured:
    """A document's words, lines and paragraphs.

    A word is what stands between white space (Gopher's definition). A line is a logical line: hard
    wraps are undone.
    """

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Words, in order."""
        return self.text.split()

    @cached_property
    def word_characters(self) -> int:
        """Characters that are not white space."""
        return sum(map(len, self.words))

    @cached_property
    def unspaced(self) -> bool:
        """Whether the text is mostly in a script without spaces between words."""
        return len(_UNSPACED.findall(self.text)) > 0.3 * self.word_characters

    def by_character(self) -> "Measured":
        """The same text, with each character as a word."""
        return Measured(" ".join("".join(self.words)))

    @cached_property
    def lines(self) -> list[str]:
        """Logical lines that are not blank, stripped."""
        return [" ".join(part.strip() for part in group) for group in logical_lines(self.text)]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Blocks between blank lines, stripped."""
        return [p.strip() for p in PARAGRAPH_END.split(self.text) if p.strip()]

    def repeated(self, pieces: list[str]) -> tuple[float, float]:
        """The share of pieces that occurred before in the document, by count and by characters."""
        seen: set[str] = set()
        count = characters = 0
        for piece in pieces:
            if piece in seen:
                count += 1
                characters += len(piece)
            seen.add(piece)
        total = sum(map(len, pieces))
        return (count / len(pieces), characters / total) if total else (0.0, 0.0)

    @cached_property
    def _word_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Each word as the number of its first occurrence, and its length; both [words]."""
        numbers: dict[str, int] = {}
        ids = np.array(
            [numbers.setdefault(word, len(numbers)) for word in self.words], dtype=np.int64
        )
        return ids, np.array([len(word) for word in self.words], dtype=np.int64)

    @cached_property
    def _ngrams(self) -> dict[int, np.ndarray]:
        """What `ngrams` has computed, by n."""
        return {1: self._word_numbers[0]}

    def ngrams(self, n: int) -> np.ndarray:
        """[words - n + 1] numbers that are equal exactly where the n-grams are equal.

        They are built from those of n - 1: two numbers below 2^31 make a unique key.
        """
        if n not in self._ngrams:
            shorter, words = self.ngrams(n - 1), self._ngrams[1]
            keys = shorter[: len(words) - n + 1] * np.int64(1 << 31) + words[n - 1 :]
            self._ngrams[n] = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        return self._ngrams[n]

    def top_ngram_share(self, n: int) -> float:
        """Share of word characters in the most frequent n-gram (Gopher, table A1).

        Of equally frequent ones the longest counts. 0 where every n-gram occurs once.
        """
        if len(self.words) < n:
            return 0.0
        numbers, lengths = self.ngrams(n), self._word_numbers[1]
        total = np.convolve(lengths, np.ones(n, dtype=np.int64), "valid")
        counts = np.bincount(numbers)
        most = counts.max()
        if most == 1:
            return 0.0
        return float(most * total[counts[numbers] == most].max() / self.word_characters)

    def duplicate_ngram_share(self, n: int) -> float:
        """Share of word characters in n-grams that occurred before (Gopher, table A1).

        A word inside several of them counts once.
        """
        if len(self.words) < n:
            return 0.0
        numbers, lengths = self.ngrams(n), self._word_numbers[1]
        first = np.full(numbers.max() + 1, len(numbers))
        np.minimum.at(first, numbers, np.arange(len(numbers)))
        repeats = np.flatnonzero(first[numbers] < np.arange(len(numbers)))
        if not len(repeats):
            return 0.0
        edges = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.add.at(edges, repeats, 1)
        np.add.at(edges, repeats + n, -1)
        return float(lengths[np.cumsum(edges[:-1]) > 0].sum() / self.word_characters)
