"""Weights of 8 or 4 bits on a CUDA GPU, by torchao; model/quantize.py is for CPUs."""

from openqwen.model.decoder import Qwen2
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

_GROUP = 32  # inputs of a scale in 4 bits


def quantize_on_gpu(model: Qwen2, kind: str) -> Qwen2:
    """Quantise the linear layers of a bfloat16 network in place; returns the network, frozen.

    The embedding, the head, fused experts and activations stay in bfloat16. 8 bits have one scale
    for each output, 4 bits one for each 32 inputs of an output. Raises OpenQwenError where torchao
    is not installed.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise OpenQwenError(
            f"Weights in {kind} on a GPU need the library torchao.",
            do=pip_install("openqwen[train]"),
        ) from None
    if kind == "int8":
        config = Int8WeightOnlyConfig()
    else:  # packed as PyTorch's own kernel for 4 bits reads it
        config = Int4WeightOnlyConfig(_GROUP, int4_packing_format="tile_packed_to_4d")
    quantize_(model.model.layers, config)
    return model.requires_grad_(False)
