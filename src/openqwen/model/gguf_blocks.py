"""ggml's block formats: weights in blocks of 32 or 256 that share scales, to float32 and back.

The arithmetic is llama.cpp's own package gguf: what it unpacks and packs is the same as there to
the last bit.
"""

import numpy as np


def dequantize(data: memoryview | bytes | np.ndarray, kind: str) -> np.ndarray:
    """The float32 weights [n] of whole blocks."""
    from gguf import (
        GGMLQuantizationType,
        quants,
    )  # a tenth of a second that only GGUF files are worth

    row = np.frombuffer(data, np.uint8)[
        None
    ]  # one row: the package cuts many into groups of sixteen
    return quants.dequantize(row, GGMLQuantizationType[kind])[0]


def quantize(weights: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of float32 weights [n] as llama.cpp rounds them; n is a multiple of the block."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # what a type cannot hold becomes infinite; who writes it looks
        return quants.quantize(weights[None], GGMLQuantizationType[kind])[0].view(np.uint8)
