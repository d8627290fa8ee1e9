"""In which numbers the network computes, whether it is compiled, and what to do when memory runs
out.

Weights, gradients and optimizer states are float32 always. With bfloat16, matrix products and
attention take rounded copies of weights and activations (autocast); norms, softmax, the residual
stream and losses stay float32. Over several processes FSDP2 gathers the layers' weights rounded:
half is sent, and no rounded copy of the whole network outlives the forward pass, as autocast's
would.
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
    """Whether bfloat16 is meant; auto: on a GPU."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def computing(precision: Precision, device: torch.device) -> torch.autocast:
    """Forward passes in this context compute so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_low(precision, device))


def compile_layers(model: nn.Module) -> None:
    """Compile each layer, in place, for any number of tokens. Names of parameters stay."""
    # Without this each layer's number would be a constant, and the layers beyond the eighth not
    # compiled.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.compile(dynamic=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: a GPU's, PyTorch's on a CPU, or Python's
    own.
    """
    told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
