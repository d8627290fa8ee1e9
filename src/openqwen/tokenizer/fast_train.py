"""The compiled trainer: the same merges as `train.train_bpe`; all cores count words."""

import ctypes
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from openqwen.support.progress import progress
from openqwen.tokenizer.fast import checked, classes, cores, packed, text_batches
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER

_MERGES_AT_ONCE = 250  # between two updates of the progress line; Ctrl-C is noticed there too


class WordCounter:
    """Counts words in compiled code; any number of threads may add texts."""

    def __init__(self, library: ctypes.CDLL):
        self._library, self._classes = library, classes()
        self._idle, self._memory = list[int](), ExitStack()

    def __enter__(self) -> "WordCounter":
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.close()

    def add(self, texts: Sequence[str]) -> int:
        """Count the words of normalised texts; returns how many characters they have."""
        try:
            counts = self._idle.pop()
        except IndexError:
            counts = checked(self._library.openqwen_counts_new(self._classes.ctypes.data))
            self._memory.callback(self._library.openqwen_counts_free, counts)
        data, starts = packed(texts)
        checked(self._library.openqwen_counts_add(counts, data, starts.ctypes.data, len(texts)) + 1)
        self._idle.append(counts)
        return sum(map(len, texts))

    def total(self) -> tuple[int, int]:
        """(the sum of all threads' counts, different words); no thread may add any more."""
        self.add([])  # so that there are counts even without texts
        first, *others = self._idle
        for other in others:
            checked(self._library.openqwen_counts_add_all(first, other) + 1)
        return first, checked(self._library.openqwen_counts_add(first, b"", None, 0) + 1) - 1


def learn_merges(
    library: ctypes.CDLL,
    texts: Iterable[str],
    vocabulary: int,
    min_frequency: int,
    threads: int | None = None,
) -> tuple[int, list[tuple[int, int]]]:
    """(different words in the normalised texts, merges as `train_bpe` gives them)."""
    with WordCounter(library) as counter:
        _count(counter, texts, threads or cores())
        counts, words = counter.total()
        byte_ids = np.zeros(256, np.uint32)
        for i, token in enumerate(BYTES_IN_ID_ORDER):
            byte_ids[token[0]] = i
        trainer = checked(library.openqwen_trainer_new(counts, byte_ids.ctypes.data, min_frequency))
    try:
        return words, _merge(library, trainer, vocabulary - 256)
    finally:
        library.openqwen_trainer_free(trainer)


def _count(counter: WordCounter, texts: Iterable[str], threads: int) -> None:
    """Count all texts, and read only a little ahead of the counting."""
    pending: deque[Future[int]] = deque()
    with progress("count words", unit="characters") as work, ThreadPoolExecutor(threads) as pool:
        for batch in text_batches(texts):
            pending.append(pool.submit(counter.add, batch))
            if len(pending) > 2 * threads:
                work.advance(pending.popleft().result())
        while pending:
            work.advance(pending.popleft().result())


def _merge(library: ctypes.CDLL, trainer: int, most: int) -> list[tuple[int, int]]:
    pairs = np.empty((_MERGES_AT_ONCE, 2), np.uint32)
    merges: list[tuple[int, int]] = []
    with progress("merge pairs", total=most, unit="merges") as work:
        while len(merges) < most:
            wanted = min(_MERGES_AT_ONCE, most - len(merges))
            count = library.openqwen_trainer_merge(trainer, wanted, pairs.ctypes.data)
            checked(count + 1)
            merges += map(tuple, pairs[:count].tolist())
            work.advance(count)
            if count < wanted:
                break
    return merges
