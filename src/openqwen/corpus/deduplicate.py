"""Exact duplicates by one hash, near-duplicates by MinHash with banding, across a whole corpus.

MinHash (Broder 1997): the chance that two documents share a minimum is the Jaccard similarity of
their shingle sets, so the chance that they agree in one of b bands of r rows is 1 - (1 - s^r)^b.
FineWeb: 5-word shingles, 14 bands of 8.

Of a document only keys are kept: 16 bytes for all of its words, 8 for each band. They lie in files,
in the order of the documents. All questions are then the same one: where did this key occur first?
"""

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from openqwen.corpus.config import MinHashConfig
from openqwen.corpus.counts import library
from openqwen.corpus.words import hash_words
from openqwen.support.splitmix import GAMMA, mix

_INVERSE = pow(GAMMA, -1, 1 << 64)
# Keys that are sorted at a time: 40 bytes each. More are taken in ranges of their high bits.
SORTED_KEYS = 1 << 22
_BLOCK = 1 << 20  # keys that are read at a time


def exact_key(text: str) -> bytes:
    """xxh3-128 of the text's words: 16 bytes, the same for texts that differ in white space."""
    return xxhash.xxh3_128_digest(" ".join(text.split()).encode("utf-8"))


def shingle_hashes(texts: list[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all `words`-word shingles of a batch, [texts + 1] where each text's begin).

    Letters are lower-cased. A text of fewer words has one shingle: all of it.
    """
    hashes, first = hash_words(texts)
    counts = np.diff(first)
    shingle_counts = np.maximum(counts - words + 1, 1)
    offsets = np.concatenate([[0], np.cumsum(shingle_counts)])
    # The word at which each shingle starts, and how many words of its text are left from there.
    owner = np.repeat(np.arange(len(texts)), shingle_counts)
    position = first[owner] + np.arange(offsets[-1]) - offsets[owner]
    left = first[owner + 1] - position
    padded = np.concatenate([hashes, np.zeros(words, dtype=np.uint64)])
    shingles = np.zeros(len(position), dtype=np.uint64)
    for step in range(words):
        word = np.where(step < left, padded[np.minimum(position + step, len(hashes))], 0)
        shingles = shingles * np.uint64(GAMMA) + word
    return mix(shingles), offsets


def signatures(texts: Sequence[str], config: MinHashConfig) -> np.ndarray:
    """[texts, bands * rows] 64-bit MinHash signatures of a batch of about a megabyte.

    The hash functions are the same in every run, so that corpora can be compared.
    """
    hashes = config.bands * config.rows
    counts = np.arange(1, 2 * hashes + 1, dtype=np.uint64)
    flips, factors = mix(counts * np.uint64(_INVERSE)).reshape(2, hashes)
    factors |= np.uint64(1)
    compiled = library()
    if compiled is None:
        return plain_signatures(list(texts), config.shingle_words, flips, factors)
    parts = [text.lower().encode("utf-8", "replace") for text in texts]
    starts = np.array([0, *map(len, parts)], np.int64).cumsum()
    signature = np.empty((len(texts), hashes), dtype=np.uint64)
    compiled.openqwen_minhash(
        b"".join(parts),
        starts.ctypes.data,
        len(texts),
        config.shingle_words,
        flips.ctypes.data,
        factors.ctypes.data,
        hashes,
        signature.ctypes.data,
    )
    return signature


def plain_signatures(
    texts: list[str], words: int, flips: np.ndarray, factors: np.ndarray
) -> np.ndarray:
    """The signatures in NumPy: the minimum over a text's shingles x of (x ^ flip) * factor."""
    shingles, offsets = shingle_hashes(texts, words)
    signature = np.empty((len(texts), len(flips)), dtype=np.uint64)
    for column, (flip, factor) in enumerate(zip(flips, factors, strict=True)):
        # The low bits of a product are weak; they only break ties.
        signature[:, column] = np.minimum.reduceat((shingles ^ flip) * factor, offsets[:-1])
    return signature


def band_keys(signature: np.ndarray, config: MinHashConfig) -> np.ndarray:
    """[texts, bands] one key for all rows of a band."""
    rows = signature.reshape(len(signature), config.bands, config.rows)
    keys = np.zeros(rows.shape[:2], dtype=np.uint64)
    for row in range(config.rows):
        keys = mix(keys + rows[:, :, row])
    return keys


def first_occurrences(keys: np.ndarray, most: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (numbers of rows, number of the first row that is equal to each), all rows in the end.

    Args:
        keys: uint64 [N] or [N, 2], in memory or mapped from a file.
        most: rows in memory at a time, unless more of them are equal; SORTED_KEYS by default.
    """
    rows = keys[:, None] if keys.ndim == 1 else keys
    bits = max(len(rows) // (most or SORTED_KEYS), 0).bit_length()
    for part in range(1 << bits):
        numbers = []
        for start in range(0, len(rows), _BLOCK):
            high = rows[start : start + _BLOCK, 0]
            mine = high >> np.uint64(64 - bits) == part if bits else np.ones(len(high), bool)
            numbers.append(np.flatnonzero(mine) + start)
        number = np.concatenate(numbers or [np.zeros(0, np.int64)])
        if len(number):
            yield number, number[_first_equal(rows[number])]


def _first_equal(rows: np.ndarray) -> np.ndarray:
    """For each row of [N, 1] or [N, 2] the index of the first one that is equal."""
    order = np.lexsort(rows.T[::-1])  # stable: of equal rows the first one comes first
    ordered = rows[order]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = np.empty(len(rows), np.int64)
    first[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return first


class Clusters:
    """Documents that are linked, directly or over others; each cluster has its first as its name.

    parent: int64 [N], in memory or mapped: a forest in which each root is its tree's smallest.
    """

    def __init__(self, parent: np.ndarray):
        parent[:] = np.arange(len(parent))
        self.parent = parent

    def link(self, keys: np.ndarray, most: int = 0) -> None:
        """Link documents with equal keys, [N]."""
        for number, first in first_occurrences(keys, most):
            linked = np.flatnonzero(first != number)
            for a, b in zip(number[linked].tolist(), first[linked].tolist(), strict=True):
                one, other = self.root(a), self.root(b)
                self.parent[max(one, other)] = min(one, other)

    def root(self, number: int) -> int:
        """The first document of a document's cluster."""
        parent = self.parent
        while (above := int(parent[number])) != number:
            parent[number] = parent[above]
            number = int(parent[number])
        return number


def near_duplicates(signature: np.ndarray, config: MinHashConfig) -> np.ndarray:
    """[texts] the number of the first text in the cluster of each: its own if it is kept.

    Two texts are linked if they agree in all rows of some band; clusters are the connected
    components.
    """
    clusters = Clusters(np.empty(len(signature), np.int64))
    for keys in band_keys(signature, config).T:
        clusters.link(np.ascontiguousarray(keys))
    return np.array([clusters.root(x) for x in range(len(signature))], dtype=np.int64)
