"""Counts of English words that the published filter rules need, in Python and compiled.

`plain_counts` is the definition. `EnglishCounter` gives the same numbers from compiled code, where
a compiler is found.
"""

import ctypes
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from openqwen.corpus.english import (
    english_rules,
    english_tables,
    english_words,
    split_stretch,
)
from openqwen.support import native

_FOLDER = Path(__file__).parent / "native"
_SOURCES = [_FOLDER / name for name in ("words.cpp", "minhash.cpp")]
_pointer, _text, _size, _count = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name -> types of the result and the arguments
    "words_new": (_pointer,),
    "words_free": (None, _pointer),
    "words_add": (None, _pointer, _text, _size, _text, _text, _text, _size),
    "words_read": (_count, _pointer, _text, _size, _pointer, _count),
    "words_count": (None, _pointer, _pointer, _size, _pointer),
    "words_hash": (ctypes.c_uint64, _text, _size),
    "words_top": (ctypes.c_double, _pointer, _size),
    "words_repeated": (ctypes.c_double, _pointer, _size),
    "minhash": (None, _text, _pointer, _size, _size, _pointer, _pointer, _size, _pointer),
}
_ALPHABETIC, _SYMBOL, _END, _PUNCTUATION = 1, 2, 4, 8  # flags of a word, as in words.cpp
_UNKNOWN = 4096  # stretches that are looked up at a time
_TABLE = 300_000  # stretches whose split is kept
_MOST_STOP_WORDS = 64

_RUN = re.compile(r"\s+|\S+")
SENTENCE_END = frozenset(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x1F000)))))
_CONTROLS = [chr(c) for a, b in ((0, 9), (11, 13), (13, 32), (127, 160)) for c in range(a, b)]


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The compiled code of the corpus, or None if it cannot be built here."""
    loaded = native.load("corpus", _SOURCES)
    if loaded:
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"openqwen_{name}")
            function.restype, function.argtypes = result, arguments
    return loaded


class CompiledCounts(NamedTuple):
    """Counts over the words of a text.

    plain: words that are more than symbols, plain_characters: of these. alphabetic: words with a
    letter. stop_words: how many different stop words occur. sentences: of all lines; a line without
    any counts as one.
    """

    words: int
    plain: int
    plain_characters: int
    alphabetic: int
    stop_words: int
    sentences: int


class EnglishCounter:
    """The counts of one text at a time.

    Args:
        stop_words: words to look for, at most 64.
    """

    def __init__(self, stop_words: Sequence[str]):
        self._stop_words = sorted(set(stop_words))[:_MOST_STOP_WORDS]
        self._library = library()
        self._words: list[str] = []
        self._text = ""
        if self._library:
            hashes = [self._library.openqwen_words_hash(*_sized(w)) for w in self._stop_words]
            self._stop_hashes = np.array(hashes, np.uint64)
            self._unknown = np.empty((_UNKNOWN, 2), np.int64)
            self._out = np.empty(len(CompiledCounts._fields), np.float64)
            self._handle: int | None = None
            self._fresh()

    def __del__(self) -> None:
        if self._library and self._handle:
            self._library.openqwen_words_free(self._handle)

    def read(self, text: str) -> CompiledCounts:
        """Take a text and count its words; the other methods then answer for it."""
        if not self._library:
            self._text, self._words = text, english_words(text)
            return plain_counts(self._words, text, self._stop_words)
        data = text.encode("utf-8", "surrogatepass")
        if self._known > _TABLE:
            self._fresh()
        while missing := self._read(data):
            for start, size in {tuple(row) for row in self._unknown[:missing].tolist()}:
                self._add(data[start : start + size].decode("utf-8", "surrogatepass"))
        out, stop = self._out, self._stop_hashes
        self._library.openqwen_words_count(
            self._handle, stop.ctypes.data, len(stop), out.ctypes.data
        )
        return CompiledCounts(*map(int, out.tolist()))

    def top_characters(self, n: int) -> int:
        """Characters of all occurrences of the most frequent n-gram, with the spaces inside."""
        if self._library:
            return int(self._library.openqwen_words_top(self._handle, n))
        return plain_top(self._words, n)

    def repeated_characters(self, n: int) -> int:
        """Characters in n-grams that occurred before; what is counted does not overlap."""
        if self._library:
            return int(self._library.openqwen_words_repeated(self._handle, n))
        return plain_repeated(self._words, n)

    def _read(self, data: bytes) -> int:
        assert self._library
        unknown = self._unknown.ctypes.data
        return self._library.openqwen_words_read(self._handle, data, len(data), unknown, _UNKNOWN)

    def _fresh(self) -> None:
        """A table of the special cases alone."""
        assert self._library
        if self._handle:
            self._library.openqwen_words_free(self._handle)
        self._handle, self._known = self._library.openqwen_words_new(), 0
        for stretch in english_rules().special:
            self._add(stretch)

    def _add(self, stretch: str) -> None:
        assert self._library
        words = split_stretch(stretch)
        form = f"{len(words)}q"
        sizes = (len(word.encode("utf-8", "surrogatepass")) for word in words)
        ends = struct.pack(form, *accumulate(sizes))
        characters = struct.pack(form, *map(len, words))
        flags = bytes(map(_flags, words))
        self._library.openqwen_words_add(
            self._handle, *_sized(stretch), ends, characters, flags, len(words)
        )
        self._known += 1


def plain_counts(words: Sequence[str], text: str, stop_words: Sequence[str]) -> CompiledCounts:
    """The counts, word by word."""
    flags = list(map(_flags, words))
    plain = [word for word, flag in zip(words, flags, strict=True) if not flag & _SYMBOL]
    return CompiledCounts(
        len(words),
        len(plain),
        sum(map(len, plain)),
        sum(flag & _ALPHABETIC for flag in flags),
        len(set(stop_words) & set(words)),
        sum(map(sentence_count, text.split("\n"))),
    )


def plain_top(words: Sequence[str], n: int) -> int:
    """See `EnglishCounter.top_characters`; of equally frequent n-grams the first one."""
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams:
        return 0
    gram, count = grams.most_common(1)[0]
    return len(gram) * count


def plain_repeated(words: Sequence[str], n: int) -> int:
    """See `EnglishCounter.repeated_characters`; n-grams are compared without spaces."""
    seen: set[str] = set()
    characters = at = 0
    while at + n <= len(words):
        gram = "".join(words[at : at + n])
        if gram in seen:
            characters += len(gram)
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters


def sentence_count(line: str) -> int:
    """Sentences of a line, as spaCy's sentencizer splits it: a word behind `.`, `!` or `?` begins
    one, and so does white space of more than one space.
    """
    sentences, ended, behind_word = 1, False, False
    for run in _RUN.findall(line):
        if run.isspace():
            blank = run[1:] if behind_word and run[0] == " " else run
            if blank and ended:
                sentences, ended = sentences + 1, False
            behind_word = False
            continue
        behind_word = True
        for word in split_stretch(run):
            flags = _flags(word)
            if flags & _END:
                ended = True
            elif ended and not flags & _PUNCTUATION:
                sentences, ended = sentences + 1, False
    return sentences


@lru_cache(1)
def symbols() -> frozenset[str]:
    """Characters that alone make no word."""
    return SENTENCE_END.union(english_tables()["characters"]["symbols"], _CONTROLS)


@lru_cache(1 << 16)
def _flags(word: str) -> int:
    flags = _ALPHABETIC * any(map(str.isalpha, word)) | _SYMBOL * symbols().issuperset(word)
    categories = {unicodedata.category(character)[0] for character in word}
    return flags | _END * (word in SENTENCE_END) | _PUNCTUATION * (categories <= {"P"})


def _sized(text: str) -> tuple[bytes, int]:
    data = text.encode("utf-8", "surrogatepass")
    return data, len(data)
