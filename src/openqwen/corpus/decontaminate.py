"""Evaluation items in training text, by Qwen's rules (Qwen2 report, section on contamination).

A text is dropped if the longest common subsequence (LCS) of its words and those of an evaluation
item has at least 13 words and at least 0.6 of the shorter one's. The subsequence may have gaps: a
copy with words changed, left out or added is found, too. For the analysis of scores an item counts
as contaminated if it shares any 13 words in a row with the data.

Shapes: W words of a batch of texts, I items.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openqwen.corpus.words import Words, hash_words
from openqwen.support.errors import OpenQwenError
from openqwen.support.records import read_records
from openqwen.tokenizer.fast import text_batches

LEAST_WORDS, LEAST_SHARE = 13, 0.6
# Candidates share two runs of so many words. A copy in which every sixth word is changed has none;
# nothing shorter is rare enough in plain text.
_SEED = 6
_BITS = 24  # of the table that most n-grams of a text are refused by


class EvaluationItem(NamedTuple):
    """One text of an evaluation set: where it stands, and its words."""

    where: str
    words: np.ndarray


@dataclass(frozen=True)
class Contamination:
    """An item that a text holds: where the item stands, the LCS, and the words of the item."""

    where: str
    common: int
    words: int

    def __str__(self) -> str:
        return f"{self.common} of {self.words} words of {self.where}"


class EvaluationIndex:
    """Evaluation items, found in any number of texts.

    Args:
        texts: where each item stands (file, line, field) -> its text. Items of fewer than 13 words
            can hold no match and are only counted.
    """

    def __init__(self, texts: Mapping[str, str]):
        words = hash_words(list(texts.values()), all_scripts=True)
        parts = np.split(words.hashes, words.first[1:-1])
        items = (EvaluationItem(*pair) for pair in zip(texts, parts, strict=True))
        self.items = [item for item in items if len(item.words) >= LEAST_WORDS]
        self.too_short = len(texts) - len(self.items)
        self._seeds = _Occurrences(self.items, _SEED)
        self._runs = _Occurrences(self.items, LEAST_WORDS)

    def contamination(self, texts: Iterable[str]) -> Iterator[Contamination | None]:
        """The worst match of each text by Qwen's rule for training data, or None."""
        for batch in text_batches(texts):
            words = hash_words(batch, all_scripts=True)
            found: dict[int, Contamination] = {}
            for text, item, places, positions in self._seeds.pairs(words):
                if len(places) >= 2:
                    match = self._match(words, text, self.items[item], places, positions)
                    if match and (text not in found or found[text].common < match.common):
                        found[text] = match
            yield from (found.get(text) for text in range(len(batch)))

    def shared_runs(self, texts: Iterable[str]) -> set[str]:
        """The items that share 13 words in a row with any of the texts, by where they stand."""
        shared: set[int] = set()
        for batch in text_batches(texts):
            words = hash_words(batch, all_scripts=True)
            shared.update(item for _, item, _, _ in self._runs.pairs(words))
        return {self.items[item].where for item in shared}

    def analysis(self, texts: Iterable[str]) -> tuple[set[str], set[str]]:
        """The items that any of the texts holds, by where they stand, by two criteria.

        Returns:
            Those that share 13 words in a row, and those that match by the rule for training data.
        """
        shared: set[int] = set()
        matched: set[int] = set()
        for batch in text_batches(texts):
            words = hash_words(batch, all_scripts=True)
            shared.update(item for _, item, _, _ in self._runs.pairs(words))
            for text, item, places, positions in self._seeds.pairs(words):
                if len(places) < 2 or item in matched:
                    continue
                if self._match(words, text, self.items[item], places, positions):
                    matched.add(item)
        runs, rule = ({self.items[item].where for item in found} for found in (shared, matched))
        return runs, rule

    def _match(
        self,
        words: Words,
        text: int,
        item: EvaluationItem,
        places: np.ndarray,
        positions: np.ndarray,
    ) -> Contamination | None:
        """The LCS with an item, in the part of the text around the shared runs.

        places: in the batch's words. positions: of the same runs in the item. A whole book holds
        the words of any item in order somewhere, so the part has at most three times the item's
        length: it is around the run with most others near it.
        """
        first, last = int(words.first[text]), int(words.first[text + 1])
        size = len(item.words)
        begins = np.sort(places - positions)
        near = np.searchsorted(begins, begins + size, side="right") - np.arange(len(begins))
        start = int(begins[near.argmax()])
        part = words.hashes[max(first, start - size) : min(last, start + 2 * size)]
        common = common_subsequence(item.words.tolist(), part.tolist())
        shorter = min(size, last - first)
        if common < LEAST_WORDS or common < LEAST_SHARE * shorter:
            return None
        return Contamination(item.where, common, size)


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common subsequence, bit-parallel (Hyyrö 2004).

    Bit i of `row` is 0 where the LCS of a[: i + 1] and what was read of b is longer by one than
    that of a[: i].
    """
    masks: dict[int, int] = {}
    for index, word in enumerate(a):
        masks[word] = masks.get(word, 0) | 1 << index
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        if mask := masks.get(word, 0):
            shared = row & mask
            row = ((row + shared) | (row - shared)) & full
    return len(a) - row.bit_count()


def read_items(paths: Iterable[Path]) -> dict[str, str]:
    """All texts in the fields of evaluation files, by "file:record:field".

    paths: JSON Lines (.gz, .zst), JSON or Parquet files, or folders of them.

    Raises:
        OpenQwenError: there is no such file, or none with a text.
    """
    texts: dict[str, str] = {}
    files = [file for path in paths for file in _files(path)]
    for file in files:
        for where, record in read_records(file):
            for field, text in _texts(record):
                texts[f"{where}{field}"] = text
    if not texts:
        what = "No evaluation file holds a text."
        raise OpenQwenError(what, ", ".join(map(str, paths)), "name files of records with texts")
    return texts


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise OpenQwenError("The evaluation file does not exist.", path, "name a file or a folder")
    if path.is_file():
        return [path]
    kinds = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst")
    return sorted(file for file in path.rglob("*") if file.name.endswith(kinds))


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a record's fields, with the path to each."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(part, f"{field}:{key}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _texts(part, f"{field}:{number}")


class _Occurrences:
    """All n-grams of the items, sorted, with the item and the position of each occurrence."""

    def __init__(self, items: Sequence[EvaluationItem], n: int):
        self._n = n
        lengths = np.array([len(item.words) for item in items], dtype=np.int64)
        joined = np.concatenate([item.words for item in items] or [np.zeros(0, dtype=np.uint64)])
        words = Words(joined, np.concatenate([[0], np.cumsum(lengths)]))
        at = np.flatnonzero(words.starts(n))
        grams = words.ngrams(n)[at]
        order = np.argsort(grams, kind="stable")
        self._grams, at = grams[order], at[order]
        self._item = np.searchsorted(words.first, at, side="right") - 1
        self._position = at - words.first[self._item]
        self._table = np.zeros(1 << _BITS, dtype=bool)
        self._table[self._grams >> np.uint64(64 - _BITS)] = True

    def pairs(self, words: Words) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yield (text, item, places in the batch's words, positions in the item) of shared n-grams.

        One pair of a text and an item is one value.
        """
        grams = words.ngrams(self._n)
        possible = self._table[grams >> np.uint64(64 - _BITS)] & words.starts(self._n)
        places = np.flatnonzero(possible)
        first = np.searchsorted(self._grams, grams[places], side="left")
        counts = np.searchsorted(self._grams, grams[places], side="right") - first
        total = int(counts.sum())
        if not total:
            return
        ends = np.cumsum(counts)
        index = np.repeat(first - (ends - counts), counts) + np.arange(total)
        places = np.repeat(places, counts)
        text = np.searchsorted(words.first, places, side="right") - 1
        item, position = self._item[index], self._position[index]
        order = np.lexsort((places, item, text))
        text, item, places, position = (x[order] for x in (text, item, places, position))
        edges = np.flatnonzero((np.diff(text) != 0) | (np.diff(item) != 0)) + 1
        for group in np.split(np.arange(total), edges):
            yield int(text[group[0]]), int(item[group[0]]), places[group], position[group]
