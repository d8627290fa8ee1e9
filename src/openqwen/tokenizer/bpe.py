"""Words to ids: byte pairs merged in the order in which training found them."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise

from openqwen.tokenizer.pretokenize import split_words

_CACHED_WORDS = 1 << 17
_CACHED_LENGTH = 64  # characters; longer words are too rare to be worth the memory
_GONE = -1  # the place of a symbol that has merged into the one on its left


class _WordCache(dict[str, list[int]]):
    """Words already merged; emptied when full, which costs less than keeping track of what was used when."""

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

    byte_ids: the id of each of the 256 bytes. merges: (left id, right id, merged id), best rank first.
    """

    def __init__(self, byte_ids: Sequence[int], merges: Iterable[tuple[int, int, int]]):
        self._byte_ids = list(byte_ids)
        self._ranks: dict[tuple[int, int], int] = {}
        self._merged: list[int] = []
        for rank, (left, right, merged) in enumerate(merges):
            self._ranks[left, right] = rank
            self._merged.append(merged)
        self._cache = _WordCache(self)

    def encode(self, text: str) -> list[int]:
        """Ids of normalised text."""
        return list(chain.from_iterable(map(self._cache.__getitem__, split_words(text))))

    def merge(self, word: bytes) -> list[int]:
        """Ids of one word of n bytes: the lowest rank first, the leftmost among equals. O(n log n)."""
        ids = [self._byte_ids[byte] for byte in word]
        ranks, end = self._ranks, len(ids)
        following = list(range(1, end + 1))
        previous = list(range(-1, end - 1))
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
        heapify(heap)
        while heap:
            rank, left = heappop(heap)
            right = following[left]
            # An entry is stale when one of its two symbols has merged with another neighbour since.
            if right == end or ranks.get((ids[left], ids[right])) != rank:
                continue
            ids[left], ids[right] = self._merged[rank], _GONE
            after = following[left] = following[right]
            if after != end:
                previous[after] = left
                self._push(heap, ids, left, after)
            if previous[left] >= 0:
                self._push(heap, ids, previous[left], left)
        return [i for i in ids if i != _GONE]

    def _push(self, heap: list[tuple[int, int]], ids: list[int], left: int, right: int) -> None:
        rank = self._ranks.get((ids[left], ids[right]))
        if rank is not None:
            heappush(heap, (rank, left))
