"""`openqwen convert SOURCE TARGET`: write a checkpoint in another form, and list what was lost."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from openqwen.model import Qwen2, load_model, save_checkpoint
from openqwen.model.gguf import Rounded, not_stored, save_gguf
from openqwen.model.quantize import refuse_quantized
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import fresh_folder, replace_folder
from openqwen.support.hub import local
from openqwen.support.progress import console, progress
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.gguf import gguf_metadata

_GGUF_OF = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def convert(
    source: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="A folder, a .gguf file or a hub id.", metavar="SOURCE"),
    ],
    target: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(help="A folder, or a name that ends in .gguf.", metavar="TARGET"),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(help="Precision of a folder; none: the source's, float32 if it has blocks."),
    ] = None,
    type: Annotated[
        Literal["f32", "bf16", "f16", "q8_0", "q4_0"] | None,
        tyro.conf.arg(help="Type of a .gguf file's matrices; none: the source's precision."),
    ] = None,
    overwrite: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Replace the target if it exists.")
    ] = False,
) -> None:
    """Write a checkpoint in another form, and say what was lost.

    Where this fails, nothing is left at the target.
    """
    to_gguf = target.suffix == ".gguf"
    if (dtype if to_gguf else type) is not None:
        flag, other = "--type", "a folder, which takes --dtype"
        if to_gguf:
            flag, other = "--dtype", "a .gguf file, which takes --type"
        raise OpenQwenError(f"{flag} does not go with {other}.", where=target)
    refuse(target, overwrite)
    path = local(source)
    with progress("reading", unit="weights") as work:
        model = refuse_quantized(load_model(path, dtype=None, advance=work.advance))
    tokenizer = load_tokenizer(path)
    before = _dtype(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress("writing", model.config.parameters(), "weights") as work:
        if to_gguf:
            kind = type.upper() if type else _GGUF_OF[next(model.parameters()).dtype]
            rounded = _write_gguf(model, tokenizer, target, kind, work.advance)
            lost = not_stored(model.config)
        else:
            kind = dtype or before
            rounded = _cast(model, getattr(torch, kind))
            write_folder(model, tokenizer, target, work.advance)
            lost = []
            if not model.config.generation:
                lost.append("the source has no generation defaults: only stop tokens are set")
    console.print(f"{target}: {model.config.parameters():,} weights, {kind}", markup=False)
    for line in [*_roundings(rounded, before, kind, len(list(model.parameters()))), *lost]:
        console.print(f"  {line}", markup=False)


def refuse(target: Path, overwrite: bool) -> None:
    """OpenQwenError if something is at the target that may not be replaced.

    Without `overwrite` this is everything but an empty folder; with it, all that is no checkpoint.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise OpenQwenError(
            "The target exists.", where=target, do="choose another, or add --overwrite"
        )
    file = target if target.suffix == ".gguf" else target / "config.json"
    if not file.is_file():
        raise OpenQwenError(
            "The target is no checkpoint, and is not replaced.", where=target, do="choose another"
        )


def _write_gguf(
    model: Qwen2, tokenizer: Tokenizer, target: Path, kind: str, advance: Callable[[int], None]
) -> list[Rounded]:
    stops = model.config.stops or (tokenizer.eos_id,)
    vocabulary = gguf_metadata(tokenizer, model.config.vocab_size, stops[0])
    # llama.cpp stops at Qwen2's two end tokens by their names; two others have their own entries.
    others = [i for i in stops[1:] if i not in (tokenizer.eos_id, tokenizer.endoftext_id)]
    vocabulary |= {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(("eot", "eom"), others)}
    return save_gguf(model, target, kind, target.stem, vocabulary, advance)


def write_folder(
    model: Qwen2, tokenizer: Tokenizer, target: Path, advance: Callable[[int], None]
) -> None:
    """Save a checkpoint beside the target, then rename it."""
    aside = target.with_name(f".{target.name}.aside")
    try:
        save_checkpoint(model, tokenizer, fresh_folder(aside), advance=advance)
        replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _cast(model: Qwen2, dtype: torch.dtype) -> list[Rounded]:
    """Change the weights' dtype in place, tensor by tensor; returns those that lost precision."""
    rounded = []
    for name, parameter in model.named_parameters():
        if parameter.dtype == dtype:
            continue
        real, parameter.data = parameter.data, parameter.data.to(dtype)
        wrong = total = 0.0
        pieces = zip(real.flatten().split(2**17), parameter.detach().flatten().split(2**17))
        for before, after in pieces:
            wrong += float((after.double() - before.double()).square().sum())
            total += float(before.double().square().sum())
        if not math.isfinite(wrong):
            raise OpenQwenError(
                f"'{name}' has weights that {dtype} cannot hold.", do="choose float32 or bfloat16"
            )
        if wrong:
            kind = str(dtype).removeprefix("torch.")
            rounded.append(Rounded(name, kind, math.sqrt(wrong / total)))
    return rounded


def _dtype(model: Qwen2) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _roundings(rounded: list[Rounded], before: str, kind: str, count: int) -> list[str]:
    if not rounded:
        return ["no weight changed"]
    worst = max(rounded, key=lambda tensor: tensor.error)
    return [
        f"rounded from {before} to {kind}: {len(rounded)} of {count} tensors,"
        f" largest relative error {worst.error:.1e} ({worst.name}, {worst.type})"
    ]
