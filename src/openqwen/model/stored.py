"""Tensors at rest: where each lies in its file, and how its bytes become a torch tensor, lazily and
in small pieces.
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

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # the others are blocks
_PIECE = 2**17  # weights that are unpacked at once: the working memory stays in the cache
_WORK = 2**24  # bytes, more than unpacking a piece of any type needs


@dataclass(frozen=True)
class Stored:
    """A tensor as a run of bytes in a file.

    type: F32, F16, BF16, or one of ggml's block formats; another name for what is not read.
    """

    path: Path
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    def part(self, first: int, rows: int | None = None) -> "Stored":
        """`rows` entries along the first dimension from `first` on; with None that one entry, a
        dimension less.
        """
        row = self.size // self.shape[0]
        shape = self.shape[1:] if rows is None else (rows, *self.shape[1:])
        return replace(
            self,
            shape=shape,
            offset=self.offset + first * row,
            size=row * (1 if rows is None else rows),
        )


def usable_in_place(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether the bytes in the file can be a network's memory as they are.

    MKL's float32 matrix-vector product rounds differently where the matrix does not begin at a
    multiple of 64 bytes, as most do in a file. Answers must depend on the weights alone, so such a
    matrix is copied. Half precision has no such trait.
    """
    return (
        PLAIN.get(stored.type) == dtype
        and stored.offset % (64 if dtype == torch.float32 else dtype.itemsize) == 0
    )


class Reader:
    """Reads stored tensors.

    The files stay open inside the `with`; a tensor that was mapped stays valid after it.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, FileIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> "Reader":
        # The C library keeps freed blocks as large as the largest that it ever mapped and gave
        # back. Without this it fetches the memory in which pieces are unpacked zeroed from the
        # system for every piece, which takes as long as all the rest of a load.
        bytearray(_WORK)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def mapped(self, stored: Stored) -> Tensor:
        """The file's own memory as a tensor: nothing is read before it is used, and writing to it
        leaves the file.
        """
        if stored.path not in self._maps:
            file = self._file(stored.path)
            self._maps[stored.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(
            self._maps[stored.path],
            dtype=PLAIN[stored.type],
            count=math.prod(stored.shape),
            offset=stored.offset,
        )
        return flat.view(stored.shape)

    def copy(self, stored: Stored, target: Tensor) -> None:
        """Read the tensor into `target`, contiguous and of the same shape, unpacked and cast piece
        by piece.
        """
        weights, size = BLOCKS[stored.type]
        file, flat = self._file(stored.path), target.view(-1)
        file.seek(stored.offset)
        buffer = bytearray(min(_PIECE // weights * size, stored.size))
        for begin in range(0, flat.numel(), _PIECE):
            piece = flat[begin : begin + _PIECE]
            view = memoryview(buffer)[: piece.numel() // weights * size]
            if file.readinto(view) != len(view):
                raise OpenQwenError(
                    "This file became shorter while it was read.", where=stored.path
                )
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
    """The tensors of a Hugging Face folder, sharded or not, by the names in the files.

    Experts that a file keeps fused (transformers 5 in memory) are named one by one, as in the
    published files.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for name, stored in _directory(path).items():
            if name in found:
                raise OpenQwenError(f"'{name}' is also in {found[name].path.name}.", where=path)
            found[name] = stored
    return {name: stored for fused in found for name, stored in _unfused(fused, found[fused])}


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors files of a model."""
    return (folder / INDEX).is_file() or (folder / WEIGHTS).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files; nothing else is read, a pickle least of all.

    Where one whole file lies beside an index of shards, the file is read, as transformers does.
    """
    if (folder / WEIGHTS).is_file():
        if (folder / INDEX).is_file():
            notice(f"{WEIGHTS} is read; the shards that {INDEX} names are not", folder)
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = _indexed(folder / INDEX)
        if missing := [
            name for name in names if Path(name).name != name or not (folder / name).is_file()
        ]:
            raise OpenQwenError(
                (
                    f"{len(missing)} of {len(names)} files that the index names are missing, first "
                    f"'{missing[0]}'."
                ),
                where=folder / INDEX,
                do="fetch the missing files",
            )
        return [folder / name for name in names]
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise OpenQwenError(
            (
                f"The weights are a pickle ({pickles[0].name}), which can run any code, and is "
                "never loaded."
            ),
            where=folder,
            do="convert it where you trust it: in transformers, "
            "AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors",
        )
    raise OpenQwenError(f"There are no weights here: neither {WEIGHTS} nor {INDEX}.", where=folder)


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
    """Where the tensors of a safetensors file lie.

    The library checks the header before its offsets are believed.
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
