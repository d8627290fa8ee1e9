"""The GGUF container, versions 2 and 3: typed metadata, a directory of tensors, their bytes.

The format is llama.cpp's (ggml/docs/gguf.md). model/gguf.py and the tokenizer interpret what is in
it.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import refuse_pointer, whole_file

MAGIC = b"GGUF"
_ALIGNMENT = 32  # bytes, where the metadata give no general.alignment
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_ENTRIES = 1_000_000  # of metadata, and of tensors; a real file has at most thousands

# ggml's number of each type that can be unpacked -> its name, weights per block, bytes per block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
_UNREAD = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0"}
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
BLOCKS = {name: (weights, size) for name, weights, size in TYPES.values()}

# GGUF's number of each type of metadata -> NumPy's name of it.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4")))
_SCALARS |= dict(enumerate(("<u8", "<i8", "<f8"), 10))
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SPLIT = re.compile(r"(.*-)(\d{5})(-of-\d{5}\.gguf)")  # the name of a file of a split model


@dataclass(frozen=True)
class GgufTensor:
    """The place of one tensor in the file.

    Args:
        shape: outermost dimension first, as in torch.
        type: ggml's name such as "Q4_K", or "type 99" for an unknown number. If it is not in
            `BLOCKS` the tensor cannot be read, and its size is 0.
        offset: bytes from the start of the file.
        size: bytes.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a file except the weights.

    metadata: numbers, booleans and text as Python's types, arrays of text as lists, arrays of
    numbers as NumPy arrays.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _DamagedError(Exception):
    """What is wrong in a file; `read_header` adds the file's name."""


def find_gguf(path: Path) -> Path | None:
    """The GGUF file at this path: the file itself, or the only model in a folder; None without one.

    Of a model in several files it is the first. A file is recognised by its first bytes or by its
    name. Raises OpenQwenError where a folder has several models.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" or _begins_as_gguf(path) else None
    files = sorted(path.glob("*.gguf"))
    models = [file for file in files if _number(file) == 1] or files
    if len(models) > 1:
        what = f"This folder has {len(models)} models: {', '.join(file.name for file in models)}."
        raise OpenQwenError(what, where=path, do="give the path of one of them")
    return models[0] if models else None


def _number(path: Path) -> int:
    """The number of this file among its model's files, from 1, by its name."""
    match = _SPLIT.fullmatch(path.name)
    return int(match[2]) if match else 1


def _begins_as_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_first_header(path: Path) -> GgufHeader:
    """As `read_header`, for a model's only file or the first of several, which has the metadata."""
    header = read_header(path)
    if header.metadata.get("split.no", 0) or (_files(header) > 1 and _number(path) != 1):
        what = f"This is one of {_files(header)} files of a model, and not the first."
        do = "give the first, ...-00001-of-....gguf, with the others in the same folder"
        raise OpenQwenError(what, where=path, do=do)
    return header


def other_files(first: GgufHeader) -> Iterator[GgufHeader]:
    """Yield the headers of a model's other files, if it has several."""
    if (count := _files(first)) == 1:
        return
    if (match := _SPLIT.fullmatch(first.path.name)) is None:
        what = f"This is one of {count} files of a model; its name does not say which."
        do = "name them ...-00001-of-....gguf, as they were published"
        raise OpenQwenError(what, where=first.path, do=do)
    for number in range(2, count + 1):
        yield read_header(first.path.with_name(f"{match[1]}{number:05d}{match[3]}"))


def _files(header: GgufHeader) -> int:
    """The number of files of the model."""
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int):
        what = f"This GGUF file is damaged: its split.count is {count!r}."
        raise OpenQwenError(what, where=header.path, do="fetch it again")
    return max(count, 1)


def read_header(path: str | Path) -> GgufHeader:
    """Read the metadata and the directory; check that every tensor lies inside the file.

    Every number of the file is checked before it is used, so a damaged or hostile file cannot make
    it allocate more memory than the file has bytes. Raises OpenQwenError.
    """
    path = Path(path)
    try:
        refuse_pointer(path)
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                do = "give a .gguf file of a Qwen2 model"
                raise OpenQwenError("This is not a GGUF file.", where=path, do=do)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, data)
    except FileNotFoundError:
        raise OpenQwenError("There is no such file.", where=path, do="check the path") from None
    except OSError as error:
        raise OpenQwenError(f"This file cannot be read: {error.strerror}.", where=path) from None
    except _DamagedError as error:
        what = f"This GGUF file is damaged: {error}."
        raise OpenQwenError(what, where=path, do="fetch or convert it again") from None


def _header(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data)
    version = cursor.number("<u4")
    if version not in (2, 3):
        kind = "is big-endian" if version >= 1 << 16 else f"has version {version}"
        do = "convert it to little-endian GGUF version 3"
        raise OpenQwenError(f"This GGUF file {kind}.", where=path, do=do)
    tensor_count, entry_count = cursor.number("<u8"), cursor.number("<u8")
    for count, what in ((entry_count, "metadata entries"), (tensor_count, "tensors")):
        if count > _MOST_ENTRIES:
            raise _DamagedError(f"it claims to hold {count} {what}")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text("a key")
        if key in metadata:
            raise _DamagedError(f"the key '{key}' occurs twice")
        metadata[key] = cursor.value(cursor.number("<u4"), key)
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.text("a tensor's name")
        if name in places:
            raise _DamagedError(f"the tensor '{name}' occurs twice")
        places[name] = _place(cursor, name)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(f"its alignment is {alignment}, not a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _tensor(name, *place, alignment, start, len(data)) for name, place in places.items()
    }
    return GgufHeader(path, metadata, tensors)


def _place(cursor: "_Cursor", name: str) -> tuple[tuple[int, ...], int, int]:
    """Read the next entry of the directory, after its name: shape, type number, offset."""
    dimensions = cursor.number("<u4")
    if dimensions > _MOST_DIMENSIONS:
        raise _DamagedError(f"the tensor '{name}' has {dimensions} dimensions")
    shape = tuple(cursor.number("<u8") for _ in range(dimensions))[::-1]
    return shape, cursor.number("<u4"), cursor.number("<u8")


def _tensor(
    name: str,
    shape: tuple[int, ...],
    number: int,
    offset: int,
    alignment: int,
    start: int,
    end: int,
) -> GgufTensor:
    if offset % alignment:
        raise _DamagedError(
            f"the tensor '{name}' begins at byte {offset}, which is no multiple of {alignment}"
        )
    kind, block, size = TYPES.get(number, (_UNREAD.get(number, f"type {number}"), 1, 0))
    if 0 in shape or (shape and shape[-1] % block):
        raise _DamagedError(
            f"the tensor '{name}' has the shape {list(shape)}, which {kind} cannot hold"
        )
    total = math.prod(shape) // block * size
    if start + offset + total > end:
        raise _DamagedError(
            f"it ends at byte {end}, inside the tensor '{name}' (to byte {start + offset + total})"
        )
    return GgufTensor(shape, kind, start + offset, total)


class _Cursor:
    """Reads the header from front to back; reading past the end of the file is an error."""

    def __init__(self, data: mmap.mmap):
        self._data, self._end = data, len(data)
        self.at = len(MAGIC)

    def _take(self, size: int, what: str) -> int:
        """Advance by `size` bytes; returns where they begin."""
        begin = self.at
        if size > self._end - begin:
            raise _DamagedError(f"it ends at byte {self._end}, inside {what}")
        self.at = begin + size
        return begin

    def number(self, form: str, what: str = "its header") -> int:
        begin = self._take(int(form[2]), what)
        return int.from_bytes(self._data[begin : self.at], "little", signed=form[1] == "i")

    def text(self, what: str) -> str:
        length = self.number("<u8", what)
        try:
            return self._data[self._take(length, what) : self.at].decode()
        except UnicodeDecodeError:
            raise _DamagedError(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            element, count = self.number("<u4", key), self.number("<u8", key)
            if element == _STRING:
                self._fits(count, 8, key)
                return [self.text(key) for _ in range(count)]
            return self._array(element, count, key)
        return self._array(kind, 1, key)[0].item()

    def _fits(self, count: int, size: int, key: str) -> None:
        if count * size > self._end - self.at:
            raise _DamagedError(f"'{key}' claims {count} values, more than the file has room for")

    def _array(self, kind: int, count: int, key: str) -> np.ndarray:
        form = "<u1" if kind == _BOOL else _SCALARS.get(kind)
        if form is None:
            raise _DamagedError(f"'{key}' has a value of the unknown type {kind}")
        self._fits(count, int(form[2]), key)
        begin = self._take(count * int(form[2]), key)
        values = np.frombuffer(self._data[begin : self.at], form)
        return values != 0 if kind == _BOOL else values


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. shape: outermost dimension first. data: yields its bytes in pieces."""

    name: str
    shape: tuple[int, ...]
    type: str
    data: Callable[[], Iterable[bytes | memoryview]]

    @property
    def size(self) -> int:
        """Bytes."""
        weights, size = BLOCKS[self.type]
        return math.prod(self.shape) // weights * size


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a version 3 file, atomically.

    metadata: text, booleans, integers (stored as uint32, which llama.cpp expects for every count
    and id), floats (stored as float32), lists of text, and NumPy arrays and scalars, which keep
    their type.
    """
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end = _aligned(end + tensor.size)
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    for tensor, offset in zip(tensors, offsets):
        header += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", _NUMBERS[tensor.type], offset)
    with whole_file(path, "wb") as file:
        start = file.write(bytes(header).ljust(_aligned(len(header)), b"\0"))
        for tensor, offset in zip(tensors, offsets):
            for piece in tensor.data():
                file.write(piece)
            if file.tell() != start + offset + tensor.size:
                size = file.tell() - start - offset
                raise ValueError(f"{tensor.name} gave {size} bytes, not {tensor.size}")
            file.write(bytes(_aligned(tensor.size) - tensor.size))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """The number of the value's type, and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, bool | np.bool_):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        value = np.uint32(value)
    elif isinstance(value, float) and not isinstance(value, np.float64):
        value = np.float32(value)
    kinds = {form: number for number, form in _SCALARS.items()} | {"|u1": 0, "|i1": 1, "|b1": _BOOL}
    kind = kinds[value.dtype.str]
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + value.tobytes()
    return struct.pack("<I", kind) + value.tobytes()
