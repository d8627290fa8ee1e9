"""Weights of 8 or 4 bits on a CUDA GPU; model/quantize.py is for CPUs.

8 bits are ours: a Triton kernel for decoding, plain products for prompts. 4 bits are torchao's.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model.decoder import Qwen2
from openqwen.model.experts import SparseFeedForward
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

_GROUP = 32  # inputs of a scale in 4 bits
_FEW_ROWS = 64  # a call with at most so many rows is bound by reading the weights


def quantize_on_gpu(model: Qwen2, kind: str) -> Qwen2:
    """Quantise the linear layers of a bfloat16 network in place; returns the network, frozen.

    The embedding, the head, fused experts and activations stay in bfloat16. 8 bits have one scale
    for each output, 4 bits one for each 32 inputs of an output. Raises OpenQwenError where 4 bits
    are asked for and torchao is not installed.
    """
    if kind == "int8":
        _replace_linear(model.model.layers)
        return model.requires_grad_(False)
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError:
        raise OpenQwenError(
            "Weights in int4 on a GPU need the library torchao.",
            do=pip_install("openqwen[train]"),
        ) from None
    # Packed as PyTorch's own kernel for 4 bits reads it.
    config = Int4WeightOnlyConfig(_GROUP, int4_packing_format="tile_packed_to_4d")
    quantize_(model.model.layers, config)
    return model.requires_grad_(False)


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with one float32 scale for each output."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        weight_NK = source.weight.detach().float()
        scale_N = (weight_NK.abs().amax(1) / 127).clamp(min=1e-12)
        rounded_NK = (weight_NK / scale_N[:, None]).round().to(torch.int8)
        self.register_buffer("weight", rounded_NK)
        self.register_buffer("scale", scale_N)
        self.bias = source.bias
        self.weight: Tensor
        self.scale: Tensor

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] → [T, N]."""
        kernel = int8_kernel() if x_TK.is_cuda and len(x_TK) <= _FEW_ROWS else None
        if kernel is not None:
            return kernel(x_TK, self.weight, self.scale, self.bias)
        weight_NK = (self.weight * self.scale[:, None]).to(x_TK.dtype)
        return F.linear(x_TK, weight_NK, self.bias)


@cache
def int8_kernel() -> Callable[..., Tensor] | None:
    """The Triton kernel for few rows; None where Triton is not installed."""
    try:
        module = importlib.import_module("openqwen.model.int8_triton")
    except ImportError:
        return None
    kernel: Callable[..., Tensor] = module.product
    return kernel


def _replace_linear(parent: nn.Module) -> None:
    router = isinstance(parent, SparseFeedForward)  # its own matrices are small and decide much
    for name, child in parent.named_children():
        if isinstance(child, nn.Linear) and not router:
            setattr(parent, name, Int8Linear(child))
        else:
            _replace_linear(child)
