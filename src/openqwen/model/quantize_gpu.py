"""Weights of 8 or 4 bits on a CUDA GPU: torchao's, whose kernels read them so. model/quantize.py is
for CPUs.
"""

from openqwen.model.decoder import Qwen2
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

_GROUP = 32  # inputs of a scale in 4 bits


def quantize_on_gpu(model: Qwen2, kind: str) -> Qwen2:
    """The linear layers of a bfloat16 network in `kind`, in place; the embedding, the head and
    stacked experts stay.

    8 bits: a scale for each output; 4 bits: for each 32 inputs of it. Activations stay in bfloat16.
    Raises OpenQwenError where torchao is not installed.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise OpenQwenError(
            f"Weights in {kind} on a GPU need the library torchao.",
            do=pip_install("openqwen[train]"),
        ) from None
    tiles = "tile_packed_to_4d"  # what PyTorch's own kernel for 4 bits reads
    quantize_(
        model.model.layers,
        Int8WeightOnlyConfig()
        if kind == "int8"
        else Int4WeightOnlyConfig(_GROUP, int4_packing_format=tiles),
    )
    return model.requires_grad_(False)
