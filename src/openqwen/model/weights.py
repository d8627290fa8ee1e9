"""Weights between a network and files: which tensors a checkpoint publishes, filling a network,
writing shards.
"""

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
# Tensors that do not change what the network computes: those outside it (heads of other training,
# such as TRL's value head) and RoPE's tables, which old files keep. GGUF's `rope_freqs` would.
_UNUSED = re.compile(r"(?!model\.|lm_head\.bias|blk\.|rope_freqs).*|.*\.rotary_emb\.\w+")
_BLOCK = 2**20  # weights that `read_block` holds beside the block
_LISTED = 3  # tensors that an error names, of each kind

Network = TypeVar("Network", bound=nn.Module)


def ignore(weights: int) -> None:
    """The `advance` of those who do not look: called with the number of weights done since the last
    call.
    """


def published_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint's files as (name, view of the network's memory), in the published
    order.

    A sparse layer keeps its experts fused, `experts.gate_up_proj` [E, 2i, h] (gate first) and
    `experts.down_proj` [E, h, i]; the files name each: `experts.3.up_proj.weight`. All else has the
    same name and shape in both.
    """
    state = model.state_dict()
    for name in _norms_last(state):
        stem, _, own = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, state[name]
        elif own == "gate_up_proj":
            down = f"{stem}.down_proj"
            pieces = [*_pieces(name, state[name]), *_pieces(down, state[down])]
            yield from sorted(pieces, key=lambda piece: int(piece[0].split(".")[-3]))


def _norms_last(names: Iterable[str]) -> list[str]:
    """The names, each layer's norms after its matrices: shards are cut in that order."""
    groups: dict[str, int] = {}

    def place(name: str) -> tuple[int, bool]:
        layer = _LAYER.match(name)
        return groups.setdefault(layer[0] if layer else name, len(groups)), name.endswith(
            "layernorm.weight"
        )

    return sorted(names, key=place)


def _pieces(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The published tensors inside one of the network's, each as a view of it."""
    stem, _, own = name.rpartition(".")
    if not stem.endswith(".experts"):
        return [(name, tensor)]
    experts = [(f"{stem}.{number}", expert) for number, expert in enumerate(tensor)]
    if own == "down_proj":
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
    """Build a network without memory of its own and give it the stored tensors.

    dtype: of the weights; None keeps the files' own where they agree on one, else takes float32,
    which holds them all.
    device: with "meta" nothing is read. On the CPU a tensor that is `usable_in_place` is not
    copied: the network uses the file's pages, private to it once written. Raises OpenQwenError that
    counts and names missing, extra and mis-shaped tensors.
    """
    with without_memory():
        model = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in published_tensors(model)}
    _check(wanted, stored, where)
    to = _dtype(dtype, {stored[name].type for name in wanted})
    if str(device) == "meta":
        return model.to(to)
    with Reader() as reader:
        for name, parameter in list(model.named_parameters()):
            whole = stored.get(name)
            if whole and usable_in_place(whole, to) and str(device) == "cpu":
                weight = reader.mapped(whole)
            else:
                weight = torch.empty_like(parameter, dtype=to, device=device)
                for piece, view in _pieces(name, weight.detach()):
                    reader.copy(stored[piece], view)
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, nn.Parameter(weight.detach()))
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
    """Read the part of a parameter of this shape that begins at `offset` into `block`, and nothing
    else of it.

    Only the first and the last dimension may be cut.
    """
    row = math.prod(shape[1:-1]) if len(shape) > 1 else 1
    first, columns = offset[0] * row, slice(offset[-1], offset[-1] + block.shape[-1])
    flat = block.view(-1, *block.shape[-1:]) if len(shape) > 1 else block
    begin = 0
    for piece, _ in _pieces(name, torch.empty(tuple(shape), device="meta")):
        whole = stored[piece]
        start, end = max(first, begin), min(first + len(flat), begin + whole.shape[0])
        step = max(1, _BLOCK // max(1, math.prod(whole.shape[1:])))
        for at in range(start, end, step):
            some = whole.part(at - begin, min(step, end - at))
            buffer = torch.empty(some.shape, dtype=block.dtype)
            reader.copy(some, buffer)
            flat[at - first : at - first + len(buffer)] = (
                buffer[:, columns] if len(shape) > 1 else buffer
            )
        begin += whole.shape[0]


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks that are built inside have shapes but no values, and cost nothing."""
    with torch.device("meta"), _NoInitialization():
        yield


class _NoInitialization(TorchFunctionMode):
    """Random numbers that nobody will see are not drawn.

    On the meta device torch loads its compiler to draw them.
    """

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
    """Every tensor that the network needs is there with its shape, and no other that would change
    it.
    """
    missing = [f"'{name}' {list(shape)}" for name, shape in wanted.items() if name not in stored]
    others = [name for name in stored if name not in wanted]
    inside = [name for name in others if not _UNUSED.fullmatch(name)]
    extra = [f"'{name}' {list(stored[name].shape)}" for name in inside]
    shapes = [
        f"'{name}' {list(stored[name].shape)} in place of {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    types = {name: stored[name].type for name in wanted if name in stored}
    odd = [f"'{name}': {kind}" for name, kind in types.items() if kind not in BLOCKS]
    kinds = (
        (missing, "missing tensors"),
        (extra, "extra tensors"),
        (shapes, "tensors of another shape"),
        (odd, f"tensors of a type other than {', '.join(PLAIN)}"),
    )
    if told := [f"{len(names)} {kind}: {_listing(names)}" for names, kind in kinds if names]:
        raise OpenQwenError(
            (
                "These are not the weights of the network that the configuration describes. "
                f"{'; '.join(told)}."
            ),
            where=where,
            do=(
                "check that the configuration belongs to these weights, and that every file of "
                "them is there"
            ),
        )
    if others:
        text = f"{len(others)} tensors are left out, which the network does not use"
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
) -> None:
    """Write safetensors files of at most `shard_bytes` (a larger tensor has its own) and their
    index, as transformers.

    Each is written aside and renamed, weights of an earlier save that are not replaced are removed
    last: a network may be saved into the folder whose files it uses.
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
        _save({name: tensors[name] for name in names}, folder / file)
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
    with disk_errors(path):
        save_file(
            {name: t.cpu().contiguous() for name, t in tensors.items()},
            aside,
            metadata={"format": "pt"},
        )
        os.replace(aside, path)
