"""`openqwen quantize SOURCE TARGET --to int8`: a folder of quantised weights, which loads as fast as it is read."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from openqwen.model import load_model
from openqwen.model.quantize import bits_per_weight, second_moments
from openqwen.model.quantize import quantize as quantized
from openqwen.recipe.convert import refuse, write_folder
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.support.progress import console, progress
from openqwen.tokenizer import load_tokenizer

_WINDOW, _WINDOWS = 1_024, 16  # tokens of text that calibration reads at once, and how many times at most


def quantize(
    source: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(help="A folder, a .gguf file or a hub id.", metavar="SOURCE")
    ],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="The folder to make.", metavar="TARGET")],
    to: Annotated[Literal["int8", "int4"], tyro.conf.arg(help="Of the weights.")] = "int8",
    calibrate: Annotated[
        Path | None,
        tyro.conf.arg(
            help="A text file of the kind the model will read: what it makes large is rounded with more care."
        ),
    ] = None,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Replace what is there.")] = False,
) -> None:
    """Write a model with weights of 8 or 4 bits. The target is whole or not there."""
    refuse(target, overwrite)
    path = local(source)
    with progress("reading", unit="weights") as work:
        model = load_model(path, dtype=None, advance=work.advance)
    tokenizer, matters = load_tokenizer(path), None
    if calibrate is not None:
        windows = torch.tensor(tokenizer.encode(_text(calibrate))).split(_WINDOW)[:_WINDOWS]
        with progress("calibrating", sum(map(len, windows)), "tokens"):
            matters = second_moments(model.float(), windows)
    made = quantized(model, to, matters)
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress("writing", unit="tensors") as work:
        write_folder(made, tokenizer, target, work.advance)
    bits = bits_per_weight(made)
    console.print(f"{target}: {model.config.parameters():,} weights, {to}, {bits:.2f} bits each", markup=False)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenQwenError(f"The text for calibration cannot be read: {error}", where=path) from None
    if not text.strip():
        raise OpenQwenError("The text for calibration is empty.", where=path)
    return text
