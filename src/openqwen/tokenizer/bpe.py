"""Words to ids: byte pairs are merged in the order of training."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from typing import Literal

import numpy as np

from openqwen.tokenizer.pretokenize import split_words

_CACHED_WORDS = 1 << 17
_CACHED_LENGTH = 64  # characters; longer words are too rare to be worth the memory
_MERGED = -1  # marks a symbol that has merged into the one on its left

Merge = tuple[int, int, int]


class _WordCache(dict[str, list[int]]):
    """Ids of words. It is emptied when full: tracking the last use of each would cost more."""

    def __init__(self, encoder: "BytePairEncoder"):
        self._encoder = encoder

    def __missing__(self, word: str) -> list[int]:
        ids = self._encoder.merge(word.encode())
        if len(word) <= _CACHED_LENGTH:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class BytePairEncoder:
    """Applies merges to words.

    vocabulary: the bytes of each token, by id. merges: (left id, right id, merged id), by rank.
    """

    path: Literal["python"] = "python"

    def __init__(self, vocabulary: Sequence[bytes], merges: Iterable[Merge]):
        self._byte_ids = [0] * 256
        for i, token in enumerate(vocabulary):
            if len(token) == 1:
                self._byte_ids[token[0]] = i
        self._ranks: dict[tuple[int, int], int] = {}
        self._merged: list[int] = []
        for left, right, merged in merges:
            self.add(left, right, merged)
        self._cache = _WordCache(self)

    def add(self, left: int, right: int, merged: int) -> None:
        """Append a merge with the next rank; only before `encode` is called, which caches words."""
        self._ranks[left, right] = len(self._merged)
        self._merged.append(merged)

    def encode(self, text: str) -> list[int]:
        """Ids of normalised text."""
        return list(chain.from_iterable(map(self._cache.__getitem__, split_words(text))))

    def encode_batch(
        self, texts: Iterable[str], threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets) of normalised texts: text i is ids[offsets[i]:offsets[i + 1]].

        uint32 and int64. Python's lock lets one thread work at a time, so `threads` has no effect.
        """
        encoded = [np.array(self.encode(text), np.uint32) for text in texts]
        offsets = np.array([0, *map(len, encoded)], np.int64).cumsum()
        return np.concatenate([np.empty(0, np.uint32), *encoded]), offsets

    def merge(self, word: bytes) -> list[int]:
        """Ids of one word of n bytes, in O(n log n).

        The pair with the lowest rank merges first, and the leftmost among equals.
        """
        ids = [self._byte_ids[byte] for byte in word]
        ranks, end = self._ranks, len(ids)
        following = list(range(1, end + 1))
        previous = list(range(-1, end - 1))
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
        heapify(heap)
        while heap:
            rank, left = heappop(heap)
            right = following[left]
            # An entry is stale if one of its two symbols has merged with another neighbour since.
            if right == end or ranks.get((ids[left], ids[right])) != rank:
                continue
            ids[left], ids[right] = self._merged[rank], _MERGED
            after = following[left] = following[right]
            if after != end:
                previous[after] = left
                self._push(heap, ids, left, after)
            if previous[left] >= 0:
                self._push(heap, ids, previous[left], left)
        return [i for i in ids if i != _MERGED]

    def _push(self, heap: list[tuple[int, int]], ids: list[int], left: int, right: int) -> None:
        rank = self._ranks.get((ids[left], ids[right]))
        if rank is not None:
            heappush(heap, (rank, left))
