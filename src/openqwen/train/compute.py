"""In which numbers the network computes, whether it is compiled, and what to do when memory runs out.

Weights, gradients and optimizer states are float32 always. With bfloat16, matrix products and attention take rounded
copies of weights and activations (autocast); norms, softmax, the residual stream and losses stay float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from openqwen.model.decoder import Layer

Precision = Literal["auto", "float32", "bfloat16"]
LEVERS = (
    "lower micro_tokens, the tokens of one forward call; then train.recompute: cheap, then layers; "
    "then adapters (lora.rank 16); then more processes (torchrun), which share weights and optimizer states"
)


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Forward passes in here compute so; auto: bfloat16 on a GPU, float32 on a CPU."""
    low = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield


def compile_layers(model: nn.Module) -> None:
    """Compile each layer, in place, for any number of tokens. Names of parameters stay."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.compile(dynamic=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: a GPU's, PyTorch's on a CPU, or Python's own."""
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
