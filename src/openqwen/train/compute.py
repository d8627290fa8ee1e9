"""Precision of the computation, compilation of the layers, and running out of memory.

Weights, gradients and optimizer states are always float32. With bfloat16, matrix products and
attention take rounded copies of weights and activations (autocast); norms, softmax, the residual
stream and losses stay float32. Over several processes FSDP2 gathers the layers' weights in
bfloat16: half as much is sent, and unlike autocast's cache no rounded copy of the whole network
stays in memory after the forward pass.
"""

from typing import Literal

import torch
from torch import nn

from openqwen.model.decoder import Layer

Precision = Literal["auto", "float32", "bfloat16"]
LEVERS = (
    "lower micro_tokens, the tokens of one forward call; then train.recompute: cheap, then layers; "
    "then train.method adamw8bit; then adapters (lora.rank 16); "
    "then more processes (torchrun), which share weights and optimizer states"
)


def is_low(precision: Precision, device: torch.device) -> bool:
    """Whether products are computed in bfloat16; auto: on a GPU."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def computing(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which forward passes compute in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_low(precision, device))


def compile_layers(model: nn.Module) -> None:
    """Compile each layer in place, for any number of tokens; parameters keep their names."""
    # Otherwise each layer's number is a constant, and layers beyond the eighth are not compiled.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.compile(dynamic=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, in PyTorch on a CPU, or in Python."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)
