"""`openqwen quantize SOURCE TARGET --to int8`: write a folder of quantised weights."""

from pathlib import Path
from typing import Annotated

import tyro

from openqwen.model import load_model
from openqwen.model.quantize import bits_per_weight, refuse_quantized
from openqwen.model.quantize import quantize as quantized
from openqwen.support.hub import local
from openqwen.support.progress import console, progress
from openqwen.support.settings import Quantization
from openqwen.tokenizer import load_tokenizer
from openqwen.train.convert import refuse, write_folder


def quantize(
    source: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="A folder, a .gguf file or a hub id.", metavar="SOURCE"),
    ],
    target: Annotated[
        Path, tyro.conf.Positional, tyro.conf.arg(help="The folder to make.", metavar="TARGET")
    ],
    to: Annotated[Quantization, tyro.conf.arg(help="Type of the weights.")] = "int8",
    overwrite: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Replace the target if it exists.")
    ] = False,
) -> None:
    """Write a model with weights of 8 or 4 bits.

    Where this fails, nothing is left at the target.
    """
    refuse(target, overwrite)
    path = local(source)
    with progress("reading", unit="weights") as work:
        model = refuse_quantized(load_model(path, dtype=None, advance=work.advance))
    tokenizer = load_tokenizer(path)
    made = quantized(model, to)
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress("writing", unit="tensors") as work:
        write_folder(made, tokenizer, target, work.advance)
    bits = bits_per_weight(made)
    console.print(
        f"{target}: {model.config.parameters():,} weights, {to}, {bits:.2f} bits each", markup=False
    )
