"""Word hashes of many texts at once, in NumPy: what deduplication and decontamination compare.

A word is a run of letters, digits, `_` and bytes of other scripts, in lower case. Punctuation and
white space only separate words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from openqwen.support.splitmix import GAMMA, mix

_INVERSE = pow(GAMMA, -1, 1 << 64)
_IS_WORD = np.zeros(256, dtype=bool)
_IS_WORD[[*range(48, 58), *range(65, 91), *range(97, 123), 95, *range(128, 256)]] = True
_BYTE_HASH = mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(GAMMA))
# First bytes of kana and Chinese characters in UTF-8 (U+3000 to U+9FFF).
_UNSPACED = np.zeros(256, dtype=bool)
_UNSPACED[0xE3:0xEA] = True


class Words(NamedTuple):
    """Words of a batch of texts, laid end to end.

    hashes: uint64 [words]. first: int64 [texts + 1], where the words of each text begin.
    """

    hashes: np.ndarray
    first: np.ndarray

    def ngrams(self, n: int) -> np.ndarray:
        """uint64 [words]: the hash of the n words from each on; meaningless where fewer are left.

        The hash of n zeros is the same wherever it stands, so words of two texts may be mixed:
        `starts` says which n-grams lie within one text.
        """
        padded = np.concatenate([self.hashes, np.zeros(n, dtype=np.uint64)])
        grams = np.zeros(len(self.hashes), dtype=np.uint64)
        for step in range(n):
            grams = grams * np.uint64(GAMMA) + padded[step : step + len(grams)]
        return mix(grams)

    def starts(self, n: int) -> np.ndarray:
        """bool [words]: whether n words of the same text start at each word."""
        whole = np.ones(len(self.hashes), dtype=bool)
        for end in self.first[1:]:
            whole[max(end - n + 1, 0) : end] = False
        return whole


def hash_words(texts: Sequence[str], all_scripts: bool = False) -> Words:
    """The words of each text.

    all_scripts: each Chinese character and each kana is a word, and punctuation beyond ASCII
    separates words. Without it a run of all these is one word, which is faster.
    """
    parts = [text.lower().encode("utf-8", "replace") for text in texts]
    data = np.frombuffer(b" ".join(parts) + b" ", dtype=np.uint8)
    ends = np.cumsum([len(part) + 1 for part in parts])
    is_word = _IS_WORD[data]
    if all_scripts:
        places = _punctuation(data)
        for byte in range(3):
            is_word[places + byte] = False
    edges = np.diff(is_word.astype(np.int8), prepend=0, append=0)
    starts, stops = edges == 1, edges == -1
    if all_scripts:
        alone = np.flatnonzero(_UNSPACED[data] & is_word)
        starts[alone] = stops[alone + 3] = True
        stops[alone] |= is_word[alone - 1] & (alone > 0)
        starts[alone + 3] |= is_word[alone + 3]
    begin, end = np.flatnonzero(starts), np.flatnonzero(stops)
    # With S the prefix sums of h(byte) * G^position, a word's hash (S[end] - S[begin]) * G^-begin
    # does not depend on where it stands: one pass over the buffer serves all words.
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(_BYTE_HASH[data] * _powers(GAMMA, len(data)), out=sums[1:])
    hashes = mix((sums[end] - sums[begin]) * _powers(_INVERSE, len(data) + 1)[begin])
    return Words(hashes, np.searchsorted(begin, np.concatenate([[0], ends])))


def _punctuation(data: np.ndarray) -> np.ndarray:
    """Where characters of general, Chinese and full-width punctuation start, each of 3 bytes."""
    first, second, third = data[:-2], data[1:-1], data[2:]
    general = (first == 0xE2) & (second == 0x80)  # U+2000 to U+203F: dashes, quotes, ellipsis
    chinese = (first == 0xE3) & (second == 0x80) & (third != 0x85)  # U+3000 to U+303F, not 々
    wide = (first == 0xEF) & (second == 0xBC)  # U+FF01 to U+FF0F, U+FF1A to U+FF20
    wide &= (third < 0x90) | ((third > 0x99) & (third < 0xA1))
    return np.flatnonzero(general | chinese | wide)


def _powers(base: int, count: int) -> np.ndarray:
    """[count] base^0, base^1, ... modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
