"""ggml's block formats, in which 32 or 256 weights share scales, to float32 and back.

llama.cpp's own package gguf does the arithmetic, so the results are the same to the bit.
"""

import numpy as np


def dequantize(data: memoryview | bytes | np.ndarray, kind: str) -> np.ndarray:
    """The float32 weights [n] of complete blocks."""
    from gguf import GGMLQuantizationType, quants  # the import takes 0.1 s, for GGUF files only

    # As one row: the package cuts a matrix into groups of sixteen rows, which is slower.
    row = np.frombuffer(data, np.uint8)[None]
    return quants.dequantize(row, GGMLQuantizationType[kind])[0]


def quantize(weights: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of float32 weights [n], rounded as in llama.cpp; n is a multiple of the block.

    Numbers that the type cannot hold become infinite, without a warning.
    """
    from gguf import GGMLQuantizationType, quants

    with np.errstate(over="ignore", invalid="ignore"):
        return quants.quantize(weights[None], GGMLQuantizationType[kind])[0].view(np.uint8)
