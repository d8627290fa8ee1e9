"""The compiled encoder behind the interface of `bpe.BytePairEncoder`, to the same ids."""

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
# the scanner's kClassified: code points behind it are neither letters, numbers nor spaces
_CLASSIFIED = 0x40000
_CLASSES = ((r"\p{L}+", 1), (r"\p{N}+", 2), (r"[^\S\r\n]+", 3), (r"[\r\n]+", 4))
_SLACK = 8  # ids that the encoder may write beyond the last one
_MOST_IDS, _MOST_MERGES = 2**21 - 1, 2**22  # what a pair and its rank have room for
_TASK_SIZE = 1 << 20  # characters that a thread takes at a time
_KEPT = 1 << 22  # bytes of text, a place for whose ids is kept between calls

Ids = np.ndarray  # uint32 [T]


def best_encoder(
    vocabulary: Sequence[bytes], merges: Sequence[Merge]
) -> "BytePairEncoder | NativeEncoder":
    """The compiled encoder where it can be had, else the one in Python. Arguments as theirs."""
    small = len(vocabulary) < _MOST_IDS and len(merges) < _MOST_MERGES
    loaded = library() if small else None
    return (
        NativeEncoder(loaded, vocabulary, merges) if loaded else BytePairEncoder(vocabulary, merges)
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled code of the tokenizer, or None."""
    loaded = native.load("tokenizer", _SOURCES)
    if loaded:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        _declare(loaded.openqwen_merges_new, pointer, ctypes.c_char_p, pointer, size, pointer, size)
        _declare(loaded.openqwen_merges_free, None, pointer)
        _declare(loaded.openqwen_context_new, pointer, pointer, pointer)
        _declare(loaded.openqwen_context_free, None, pointer)
        _declare(
            loaded.openqwen_encode,
            ctypes.c_int64,
            pointer,
            ctypes.c_char_p,
            pointer,
            size,
            pointer,
            pointer,
        )
        _declare(
            loaded.openqwen_encode_text, ctypes.c_int64, pointer, ctypes.c_char_p, size, pointer
        )
        _declare(loaded.openqwen_counts_new, pointer, pointer)
        _declare(loaded.openqwen_counts_free, None, pointer)
        _declare(
            loaded.openqwen_counts_add, ctypes.c_int64, pointer, ctypes.c_char_p, pointer, size
        )
        _declare(loaded.openqwen_counts_add_all, ctypes.c_int64, pointer, pointer)
        _declare(loaded.openqwen_trainer_new, pointer, pointer, pointer, ctypes.c_int64)
        _declare(loaded.openqwen_trainer_free, None, pointer)
        _declare(loaded.openqwen_trainer_merge, ctypes.c_int64, pointer, size, pointer)
    return loaded


def _declare(function: Any, result: Any, *arguments: Any) -> None:
    function.restype, function.argtypes = result, arguments


@lru_cache(maxsize=1)
def classes() -> np.ndarray:
    """The class of each code point for the scanner, uint8 [0x40000], read off the expressions of
    the Python path.
    """
    text = mask_newer_letters("".join(map(chr, range(0xD800))) + "\ufffd" * 0x800)
    text += mask_newer_letters("".join(map(chr, range(0xE000, _CLASSIFIED))))
    table = np.zeros(_CLASSIFIED, np.uint8)
    for expression, value in _CLASSES:
        for match in regex.finditer(expression, text):
            table[match.start() : match.end()] = value
    return table


class NativeEncoder:
    """Applies merges to words, in compiled code that runs without Python's lock; any number of
    threads may call it.

    vocabulary: the bytes of each token, by id. merges: (left id, right id, merged id), best rank
    first.
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
        found = ids[:count].tolist()
        self._idle.append(context)
        return found

    def encode_batch(
        self, texts: Iterable[str], threads: int | None = None
    ) -> tuple[Ids, np.ndarray]:
        """(ids, offsets): text i of the normalised texts is ids[offsets[i]:offsets[i + 1]]; uint32
        and int64.
        """
        threads = threads or cores()
        if threads == 1:
            parts = list(map(self._encode_task, text_batches(texts)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(self._encode_task, text_batches(texts)))
        offsets = np.concatenate([[0], *(lengths for _, lengths in parts)]).cumsum(dtype=np.int64)
        return np.concatenate([np.empty(0, np.uint32), *(ids for ids, _ in parts)]), offsets

    def _encode_task(self, texts: Sequence[str]) -> tuple[Ids, np.ndarray]:
        """(ids of all texts, how many each has)."""
        data, starts = packed(texts)
        offsets = np.empty(len(starts), np.int64)
        context = self._take()
        ids, address = context.room(len(data))
        count = self._library.openqwen_encode(
            context.handle, data, starts.ctypes.data, len(texts), address, offsets.ctypes.data
        )
        checked(count + 1)
        found = ids[:count].copy()
        self._idle.append(context)
        return found, np.diff(offsets)

    def _take(self) -> "_Context":
        """A context that no other thread uses; there are as many as there ever were calls at one
        time.
        """
        try:
            return self._idle.pop()
        except IndexError:
            return _Context(self._library, self._merges)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Context:
    """What one call at a time needs: the word cache and a place for ids."""

    def __init__(self, loaded: ctypes.CDLL, merges: int):
        self._classes = classes()
        self.handle = checked(loaded.openqwen_context_new(merges, self._classes.ctypes.data))
        weakref.finalize(self, loaded.openqwen_context_free, self.handle)
        self._ids = np.empty(0, np.uint32)
        self._address = 0

    def room(self, size: int) -> tuple[Ids, int]:
        """A place for the ids of `size` bytes, and where in memory it begins.

        It is kept unless it is very large.
        """
        if len(self._ids) >= size + _SLACK:
            return self._ids, self._address
        ids = np.empty(2 * size + _SLACK, np.uint32)
        if size <= _KEPT:
            self._ids, self._address = ids, ids.ctypes.data
        return ids, ids.ctypes.data


def checked(result: int | None) -> int:
    """`result`, which compiled code makes 0 or null where there was no memory."""
    if not result:
        raise MemoryError("The tokenizer found no memory.")
    return result


def packed(texts: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """(texts one after the other, where each begins and the last one ends): UTF-8 and int64 [texts
    + 1].
    """
    encoded = [text.encode() for text in texts]
    return b"".join(encoded), np.array([0, *map(len, encoded)], np.int64).cumsum()


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Runs of texts of about a million characters: worth a thread's while."""
    task, size = [], 0
    for text in texts:
        task.append(text)
        size += len(text)
        if size >= _TASK_SIZE:
            yield task
            task, size = [], 0
    if task:
        yield task
