"""Tensors in files: where each one lies, and how its bytes become a torch tensor.

They are mapped, which reads nothing until it is used, or copied in small pieces.
"""

import json
import math
import mmap
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openqwen.model.gguf_blocks import dequantize
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, refuse_pointer
from openqwen.support.gguf import BLOCKS
from openqwen.support.progress import notice

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Types that are stored as they are; all others are blocks that must be unpacked.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**17  # weights that are unpacked at once, so that they stay in the processor's cache
_WORK = 2**24  # bytes, more than unpacking a piece of any type needs


@dataclass(frozen=True)
class Stored:
    """A tensor as a range of bytes in a file.

    type: F32, F16, BF16 or one of ggml's block formats; tensors of any other type cannot be read.
    """

    path: Path
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    def part(self, first: int, rows: int | None = None) -> "Stored":
        """As x[first : first + rows], or with None as x[first], which has one dimension less."""
        row = self.size // self.shape[0]
        shape = self.shape[1:] if rows is None else (rows, *self.shape[1:])
        size = row * (1 if rows is None else rows)
        return replace(self, shape=shape, offset=self.offset + first * row, size=size)


def usable_in_place(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether a network can use the bytes in the file as its memory.

    MKL's float32 matrix-vector product rounds differently where a matrix does not begin at a
    multiple of 64 bytes, as most do in a file. Answers must depend on the weights alone, so such a
    matrix is copied. Products in half precision do not depend on the address.
    """
    alignment = 64 if dtype == torch.float32 else dtype.itemsize
    return PLAIN.get(stored.type) == dtype and stored.offset % alignment == 0


class Reader:
    """Reads stored tensors in a `with` block, which keeps the files open.

    Mapped tensors stay valid after the block.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, FileIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> "Reader":
        # The C library keeps freed blocks for reuse only up to the size of the largest block that
        # it ever returned to the system. So one large block is made and freed first. Without it,
        # every piece would be unpacked in new memory that the system fills with zeros, which takes
        # as long as the rest of a load.
        bytearray(_WORK)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def mapped(self, stored: Stored) -> Tensor:
        """The file's pages as a tensor: read when used; writing to it does not change the file."""
        if stored.path not in self._maps:
            file = self._file(stored.path)
            self._maps[stored.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pages, dtype, count = self._maps[stored.path], PLAIN[stored.type], math.prod(stored.shape)
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=stored.offset)
        return flat.view(stored.shape)

    def copy(self, stored: Stored, target: Tensor) -> None:
        """Read, unpack and cast the tensor into `target`, contiguous and of the same shape."""
        weights, size = BLOCKS[stored.type]
        file, flat = self._file(stored.path), target.view(-1)
        file.seek(stored.offset)
        buffer = bytearray(min(_PIECE // weights * size, stored.size))
        for begin in range(0, flat.numel(), _PIECE):
            piece = flat[begin : begin + _PIECE]
            view = memoryview(buffer)[: piece.numel() // weights * size]
            if file.readinto(view) != len(view):
                what = "This file became shorter while it was read."
                raise OpenQwenError(what, where=stored.path)
            if stored.type in PLAIN:
                piece.copy_(torch.frombuffer(view, dtype=PLAIN[stored.type]))
            else:
                piece.copy_(torch.from_numpy(dequantize(view, stored.type)))

    def _file(self, path: Path) -> FileIO:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(FileIO(path))
        return self._files[path]


def same_numbers(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors hold the same numbers, compared piece by piece."""
    if one.shape != other.shape:
        return False
    step = max(1, _PIECE // math.prod(one.shape[1:]))
    with Reader() as reader:
        for first in range(0, one.shape[0], step):
            pieces = []
            for stored in (one, other):
                part = stored.part(first, min(step, one.shape[0] - first))
                pieces.append(torch.empty(part.shape))
                reader.copy(part, pieces[-1])
            if not torch.equal(*pieces):
                return False
    return True


def stored_in_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder, sharded or not, by their names in the files.

    Fused experts, as transformers 5 has them in memory, are named one by one, as in the published
    files.
    """
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder):
        for name, stored in _directory(path).items():
            if name in tensors:
                raise OpenQwenError(f"'{name}' is also in {tensors[name].path.name}.", where=path)
            tensors[name] = stored
    return {name: part for fused in tensors for name, part in _unfused(fused, tensors[fused])}


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files of a model."""
    return (folder / INDEX).is_file() or (folder / WEIGHTS).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; no other format is read, and pickles are refused.

    Where a folder has a single file and an index of shards, the single file is read, as in
    transformers.
    """
    if (folder / WEIGHTS).is_file():
        if (folder / INDEX).is_file():
            notice(f"{WEIGHTS} is read; the shards that {INDEX} names are not", folder)
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = _indexed(folder / INDEX)
        # A name with a folder in it could point outside of the model's folder.
        here = [name for name in names if Path(name).name == name and (folder / name).is_file()]
        if missing := sorted(set(names) - set(here)):
            count = f"{len(missing)} of {len(names)}"
            what = f"{count} files that the index names are missing, first '{missing[0]}'."
            raise OpenQwenError(what, where=folder / INDEX, do="fetch the missing files")
        return [folder / name for name in names]
    if pickles := sorted(p for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth")):
        name = pickles[0].name
        what = f"The weights are a pickle ({name}), which can run any code and is never loaded."
        convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        do = f"convert it to safetensors, if you trust it: in transformers, {convert}"
        raise OpenQwenError(what, where=folder, do=do)
    what = f"There are no weights here: neither {WEIGHTS} nor {INDEX}."
    raise OpenQwenError(what, where=folder)


def _indexed(path: Path) -> list[str]:
    """The names of the files in an index."""
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise OpenQwenError(
            "This index has no 'weight_map' of tensors to files.", where=path, do="fetch it again"
        )
    return sorted(set(places.values()))


def _directory(path: Path) -> dict[str, Stored]:
    """The places of the tensors in a safetensors file.

    `safe_open` checks the header first, so its offsets can be trusted.
    """
    try:
        refuse_pointer(path)
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise OpenQwenError(
            f"The weights cannot be read: {error}", where=path, do="fetch the file again"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Stored(path, tuple(entry["shape"]), entry["dtype"], 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def _unfused(name: str, stored: Stored) -> list[tuple[str, Stored]]:
    """The experts of a fused tensor, or the tensor itself."""
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".experts") or len(stored.shape) != 3:
        return [(name, stored)]
    experts = [(f"{stem}.{number}", stored.part(number)) for number in range(stored.shape[0])]
    if kind != "gate_up_proj":
        return [(f"{expert}.{kind}.weight", part) for expert, part in experts]
    width = stored.shape[1] // 2
    return [
        (f"{expert}.{half}_proj.weight", part.part(begin, width))
        for expert, part in experts
        for half, begin in (("gate", 0), ("up", width))
    ]
