"""Weights between a network and files: published names, filling a network, writing shards."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openqwen.model.stored import INDEX, PLAIN, WEIGHTS, Reader, Stored, usable_in_place
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import write_text
from openqwen.support.gguf import BLOCKS
from openqwen.support.progress import notice

SHARD_BYTES = 5 * 10**9
_WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_LAYER = re.compile(r"model\.layers\.\d+\.")
# Tensors that do not change what the network computes, so they may be ignored: those outside of it
# (such as TRL's value head) and RoPE's tables in old files. GGUF's `rope_freqs` does change it.
_UNUSED = re.compile(r"(?!model\.|lm_head\.bias|blk\.|rope_freqs).*|.*\.rotary_emb\.\w+")
_BLOCK = 2**20  # weights of working memory in `read_block`
_LISTED = 3  # tensors of each kind that an error names

Network = TypeVar("Network", bound=nn.Module)


def ignore(weights: int) -> None:
    """A callback for `advance` that does nothing."""


def published_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors as (name, view of the network's memory), in published order.

    The network has a layer's experts fused, `experts.gate_up_proj` [E, 2i, h] (gate first) and
    `experts.down_proj` [E, h, i]. The files have one tensor for each expert and matrix, such as
    `experts.3.up_proj.weight`. All other names and shapes are the same.
    """
    state = model.state_dict()
    for name in _norms_last(state):
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, state[name]
        elif kind == "gate_up_proj":
            down = f"{stem}.down_proj"
            pieces = [*_pieces(name, state[name]), *_pieces(down, state[down])]
            yield from sorted(pieces, key=lambda piece: int(piece[0].split(".")[-3]))


def _norms_last(names: Iterable[str]) -> list[str]:
    """The names with each layer's norms after its matrices, the order of published shards."""
    groups: dict[str, int] = {}

    def place(name: str) -> tuple[int, bool]:
        layer = _LAYER.match(name)
        group = groups.setdefault(layer[0] if layer else name, len(groups))
        return group, name.endswith("layernorm.weight")

    return sorted(names, key=place)


def _pieces(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The published tensors in one of the network's tensors, each as a view of it."""
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".experts"):
        return [(name, tensor)]
    experts = [(f"{stem}.{number}", expert) for number, expert in enumerate(tensor)]
    if kind == "down_proj":
        return [(f"{expert}.down_proj.weight", view_hI) for expert, view_hI in experts]
    return [
        (f"{expert}.{half}_proj.weight", view_Ih)
        for expert, both_2Ih in experts
        for half, view_Ih in zip(("gate", "up"), both_2Ih.chunk(2))
    ]


def fill(
    build: Callable[[], Network],
    stored: Mapping[str, Stored],
    where: Path,
    dtype: str | None = "float32",
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = ignore,
) -> Network:
    """Build a network and give it the stored tensors.

    On the CPU a tensor that is `usable_in_place` is not copied: the network uses the file's pages,
    of which it gets private copies when it writes to them.

    Args:
        build: makes the network.
        stored: tensors by their published names.
        where: path to name in errors.
        dtype: of the weights. None keeps the files' dtype if they have only one, else it means
            float32.
        device: "meta" reads nothing.
        advance: called with the number of weights read since the last call.

    Raises:
        OpenQwenError: tensors are missing, superfluous, or have another shape or type.
    """
    with without_memory():
        model = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in published_tensors(model)}
    _check(wanted, stored, where)
    weight_dtype = _dtype(dtype, {stored[name].type for name in wanted})
    if str(device) == "meta":
        return model.to(weight_dtype)
    with Reader() as reader:
        for name, parameter in list(model.named_parameters()):
            tensor = stored.get(name)
            if tensor and usable_in_place(tensor, weight_dtype) and str(device) == "cpu":
                weight = reader.mapped(tensor)
            else:
                weight = torch.empty_like(parameter, dtype=weight_dtype, device=device)
                for piece, view in _pieces(name, weight.detach()):
                    reader.copy(stored[piece], view)
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, nn.Parameter(weight.detach()))
            advance(weight.numel())
    return model


def read_block(
    reader: Reader,
    stored: Mapping[str, Stored],
    name: str,
    shape: Sequence[int],
    offset: Sequence[int],
    block: Tensor,
) -> None:
    """Read a part of a parameter into `block`: only the rows that it lies in are read.

    A rank uses it to read its shard. Only the first and the last dimension may be cut.

    Args:
        reader: an open one.
        stored: tensors by their published names.
        name: of the parameter.
        shape: of the complete parameter.
        offset: where the part begins in each dimension.
        block: takes the part; its shape is that of the part.
    """
    row = math.prod(shape[1:-1]) if len(shape) > 1 else 1
    first, columns = offset[0] * row, slice(offset[-1], offset[-1] + block.shape[-1])
    flat = block.view(-1, *block.shape[-1:]) if len(shape) > 1 else block
    begin = 0
    for piece, _ in _pieces(name, torch.empty(tuple(shape), device="meta")):
        tensor = stored[piece]
        start, end = max(first, begin), min(first + len(flat), begin + tensor.shape[0])
        step = max(1, _BLOCK // max(1, math.prod(tensor.shape[1:])))
        for at in range(start, end, step):
            part = tensor.part(at - begin, min(step, end - at))
            buffer = torch.empty(part.shape, dtype=block.dtype)
            reader.copy(part, buffer)
            rows = buffer[:, columns] if len(shape) > 1 else buffer
            flat[at - first : at - first + len(rows)] = rows
        begin += tensor.shape[0]


@contextmanager
def without_memory() -> Iterator[None]:
    """Build networks within the block on the meta device: with shapes, without memory or values."""
    with torch.device("meta"), _NoInitialization():
        yield


class _NoInitialization(TorchFunctionMode):
    """Skip the functions of torch.nn.init: on the meta device they would import the compiler."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _check(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], where: Path
) -> None:
    """Raise OpenQwenError unless the network's tensors are there, and no others that matter."""
    missing = [f"'{name}' {list(shape)}" for name, shape in wanted.items() if name not in stored]
    others = [name for name in stored if name not in wanted]
    unexpected = [name for name in others if not _UNUSED.fullmatch(name)]
    extra = [f"'{name}' {list(stored[name].shape)}" for name in unexpected]
    shapes, odd = [], []
    for name, shape in wanted.items():
        if name not in stored:
            continue
        if stored[name].shape != shape:
            shapes.append(f"'{name}' {list(stored[name].shape)} in place of {list(shape)}")
        if stored[name].type not in BLOCKS:
            odd.append(f"'{name}': {stored[name].type}")
    kinds = (
        (missing, "missing tensors"),
        (extra, "extra tensors"),
        (shapes, "tensors of another shape"),
        (odd, f"tensors of a type other than {', '.join(PLAIN)}"),
    )
    if faults := [f"{len(names)} {kind}: {_listing(names)}" for names, kind in kinds if names]:
        what = "These are not the weights of the network that the configuration describes."
        do = "check that the configuration belongs to these weights, and that no file is missing"
        raise OpenQwenError(f"{what} {'; '.join(faults)}.", where=where, do=do)
    if others:
        text = f"{len(others)} tensors that the network does not use are ignored"
        notice(f"{text}: {_listing(others)}", where)


def _listing(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _dtype(name: str | None, types: set[str]) -> torch.dtype:
    if name is None:
        return PLAIN.get(next(iter(types)), torch.float32) if len(types) == 1 else torch.float32
    known = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN.values()}
    if name not in known:
        raise OpenQwenError(
            f"Weights cannot be of the dtype '{name}'.",
            do=f"choose one of {', '.join(known)}, or None",
        )
    return known[name]


def save_weights(
    model: nn.Module,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = ignore,
    values: Callable[[str], Tensor] | None = None,
) -> None:
    """Write safetensors files of at most `shard_bytes` and their index, as transformers does.

    A tensor larger than that has its own file. Each file is written aside and then renamed, and
    files of an earlier save that were not replaced are removed at the end. So a network can be
    saved into the folder whose files it uses as memory.

    values: returns the tensor of a published name, for a network without memory; one file is in
    memory at a time.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors = {name: tensor.detach() for name, tensor in published_tensors(model)}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: values(name) if values else tensors[name] for name in names}
        _save(shard, folder / file)
        advance(sum(tensors[name].numel() for name in names))
    if split.is_sharded:
        counts = {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            **split.metadata,
        }
        index = {"metadata": counts, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob(WEIGHTS.replace(".", "*.")):
        if _WRITTEN.fullmatch(path.name) and path.name not in split.filename_to_tensors:
            path.unlink()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    aside = path.with_name(f".{path.name}.aside")
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        try:
            save_file(contiguous, aside, metadata={"format": "pt"})
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
