"""Exact duplicates by one hash, near-duplicates by MinHash with banding.

MinHash (Broder 1997): the chance that two documents share a minimum is the Jaccard similarity of
their shingle sets, so the chance that they agree in one of b bands of r rows is 1 - (1 - s^r)^b.
FineWeb: 5-word shingles, 14 bands of 8. All is NumPy over whole batches of documents.
"""

from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from openqwen.corpus.config import MinHashConfig
from openqwen.corpus.words import hash_words
from openqwen.support.splitmix import GAMMA, mix
from openqwen.tokenizer.fast import text_batches

_INVERSE = pow(GAMMA, -1, 1 << 64)


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


def signatures(
    texts: Iterable[str], config: MinHashConfig, advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """[documents, bands * rows] 64-bit MinHash signatures.

    advance: called with the number of documents after each batch. Memory: 8 * bands * rows bytes a
    document (896 with the defaults) and a few tens of MB for a batch.
    """
    hashes = config.bands * config.rows
    # The hash functions are the same in every run, so that corpora can be compared.
    counts = np.arange(1, 2 * hashes + 1, dtype=np.uint64)
    constants = mix(counts * np.uint64(_INVERSE)).reshape(2, hashes)
    parts: list[np.ndarray] = [np.zeros((0, hashes), dtype=np.uint64)]
    for batch in text_batches(texts):  # small enough for its arrays to stay near the cache
        shingles, offsets = shingle_hashes(batch, config.shingle_words)
        part = np.empty((len(batch), hashes), dtype=np.uint64)
        for column in range(hashes):
            permuted = (shingles ^ constants[0, column]) * (constants[1, column] | np.uint64(1))
            # The low bits of a product are weak; they only break ties.
            part[:, column] = np.minimum.reduceat(permuted, offsets[:-1])
        parts.append(part)
        if advance:
            advance(len(batch))
    return np.concatenate(parts)


def near_duplicates(signature: np.ndarray, config: MinHashConfig) -> np.ndarray:
    """[documents] the number of the first document in the cluster of each: its own if it is kept.

    Two documents are linked if they agree in all rows of some band; clusters are the connected
    components.
    """
    parent = np.arange(len(signature))  # a forest: each tree's root is its smallest number

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for band in range(config.bands):
        keys = np.zeros(len(signature), dtype=np.uint64)
        for column in range(band * config.rows, (band + 1) * config.rows):
            keys = mix(keys + signature[:, column])
        order = np.argsort(keys, kind="stable")
        for position in np.flatnonzero(keys[order[1:]] == keys[order[:-1]]):
            a, b = root(int(order[position])), root(int(order[position + 1]))
            parent[max(a, b)] = min(a, b)
    return np.array([root(x) for x in range(len(signature))], dtype=np.int64)
