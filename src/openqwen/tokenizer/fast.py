"""The compiled encoder: the interface and the ids of `bpe.BytePairEncoder`."""

import ctypes
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex

from openqwen.support import native
from openqwen.tokenizer.bpe import BytePairEncoder, Merge
from openqwen.tokenizer.unicode import mask_newer_letters

_FOLDER = Path(__file__).parent / "native"
_SOURCES = [_FOLDER / name for name in ("scan.h", "encode.cpp", "train.cpp")]
# The scanner's kClassified: from there on no code point is a letter, a number or a space.
_CLASSIFIED = 0x40000
_CLASSES = ((r"\p{L}+", 1), (r"\p{N}+", 2), (r"[^\S\r\n]+", 3), (r"[\r\n]+", 4))
_SLACK = 8  # ids that the encoder may write beyond the last one
_MOST_IDS, _MOST_MERGES = 2**21 - 1, 2**22  # what fits into the bits of a pair and its rank
_BATCH_SIZE = 1 << 20  # characters that a thread takes at a time
_KEPT = 1 << 22  # bytes of text for whose ids an array is kept between calls

_pointer, _text, _size, _count = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name -> types of the result and the arguments
    "merges_new": (_pointer, _text, _pointer, _size, _pointer, _size),
    "merges_free": (None, _pointer),
    "context_new": (_pointer, _pointer, _pointer),
    "context_free": (None, _pointer),
    "encode": (_count, _pointer, _text, _pointer, _size, _pointer, _pointer),
    "encode_text": (_count, _pointer, _text, _size, _pointer),
    "counts_new": (_pointer, _pointer),
    "counts_free": (None, _pointer),
    "counts_add": (_count, _pointer, _text, _pointer, _size),
    "counts_add_all": (_count, _pointer, _pointer),
    "trainer_new": (_pointer, _pointer, _pointer, _count),
    "trainer_free": (None, _pointer),
    "trainer_merge": (_count, _pointer, _size, _pointer),
}

Ids = np.ndarray  # uint32 [T]


def best_encoder(
    vocabulary: Sequence[bytes], merges: Sequence[Merge]
) -> "BytePairEncoder | NativeEncoder":
    """The compiled encoder if it is available, else the one in Python; for arguments see those."""
    small = len(vocabulary) < _MOST_IDS and len(merges) < _MOST_MERGES
    if small and (loaded := library()):
        return NativeEncoder(loaded, vocabulary, merges)
    return BytePairEncoder(vocabulary, merges)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled code of the tokenizer, or None if it cannot be built here."""
    loaded = native.load("tokenizer", _SOURCES)
    if loaded:
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"openqwen_{name}")
            function.restype, function.argtypes = result, arguments
    return loaded


@lru_cache(maxsize=1)
def classes() -> np.ndarray:
    """The class of each code point for the scanner, uint8 [0x40000].

    It is taken from the regular expressions of the Python path, so both paths agree.
    """
    text = mask_newer_letters("".join(map(chr, range(0xD800))) + "\ufffd" * 0x800)
    text += mask_newer_letters("".join(map(chr, range(0xE000, _CLASSIFIED))))
    table = np.zeros(_CLASSIFIED, np.uint8)
    for expression, value in _CLASSES:
        for match in regex.finditer(expression, text):
            table[match.start() : match.end()] = value
    return table


class NativeEncoder:
    """Applies merges to words in compiled code without Python's lock; safe to call from threads.

    vocabulary: the bytes of each token, by id. merges: (left id, right id, merged id), by rank.
    """

    path: Literal["native"] = "native"

    def __init__(self, loaded: ctypes.CDLL, vocabulary: Sequence[bytes], merges: Sequence[Merge]):
        self._library, self._idle = loaded, list[_Context]()
        table = np.array(merges, np.uint32).reshape(-1, 3)
        offsets = np.array([0, *map(len, vocabulary)], np.int64).cumsum()
        self._merges = checked(
            loaded.openqwen_merges_new(
                b"".join(vocabulary),
                offsets.ctypes.data,
                len(vocabulary),
                table.ctypes.data,
                len(table),
            )
        )
        weakref.finalize(self, loaded.openqwen_merges_free, self._merges)

    def encode(self, text: str) -> list[int]:
        """Ids of normalised text."""
        data = text.encode()
        context = self._take()
        ids, address = context.room(len(data))
        count = self._library.openqwen_encode_text(context.handle, data, len(data), address)
        checked(count + 1)
        result = ids[:count].tolist()
        self._idle.append(context)
        return result

    def encode_batch(
        self, texts: Iterable[str], threads: int | None = None
    ) -> tuple[Ids, np.ndarray]:
        """(ids, offsets) of normalised texts: text i is ids[offsets[i]:offsets[i + 1]].

        uint32 and int64. threads: all cores by default.
        """
        threads = threads or cores()
        if threads == 1:
            parts = list(map(self._encode_packed, text_batches(texts)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(self._encode_packed, text_batches(texts)))
        offsets = np.concatenate([[0], *(lengths for _, lengths in parts)]).cumsum(dtype=np.int64)
        return np.concatenate([np.empty(0, np.uint32), *(ids for ids, _ in parts)]), offsets

    def _encode_packed(self, texts: Sequence[str]) -> tuple[Ids, np.ndarray]:
        """(ids of all texts, how many ids each text has)."""
        data, starts = packed(texts)
        offsets = np.empty(len(starts), np.int64)
        context = self._take()
        ids, address = context.room(len(data))
        count = self._library.openqwen_encode(
            context.handle, data, starts.ctypes.data, len(texts), address, offsets.ctypes.data
        )
        checked(count + 1)
        result = ids[:count].copy()
        self._idle.append(context)
        return result, np.diff(offsets)

    def _take(self) -> "_Context":
        """A context that no other thread uses: one for each call at the same time."""
        try:
            return self._idle.pop()
        except IndexError:
            return _Context(self._library, self._merges)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Context:
    """What one call needs for itself: the word cache, and an array for ids."""

    def __init__(self, loaded: ctypes.CDLL, merges: int):
        self._classes = classes()
        self.handle = checked(loaded.openqwen_context_new(merges, self._classes.ctypes.data))
        weakref.finalize(self, loaded.openqwen_context_free, self.handle)
        self._ids = np.empty(0, np.uint32)
        self._address = 0

    def room(self, size: int) -> tuple[Ids, int]:
        """An array for the ids of `size` bytes, and its address; it is kept unless very large."""
        if len(self._ids) >= size + _SLACK:
            return self._ids, self._address
        ids = np.empty(2 * size + _SLACK, np.uint32)
        if size <= _KEPT:
            self._ids, self._address = ids, ids.ctypes.data
        return ids, ids.ctypes.data


def checked(result: int | None) -> int:
    """`result`, which is 0 or null if the compiled code could not allocate memory."""
    if not result:
        raise MemoryError("The tokenizer could not allocate memory.")
    return result


def packed(texts: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """(texts one after the other in UTF-8, int64 [texts + 1] where each begins and the end)."""
    encoded = [text.encode() for text in texts]
    return b"".join(encoded), np.array([0, *map(len, encoded)], np.int64).cumsum()


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in batches of about a million characters, enough work for a thread."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
