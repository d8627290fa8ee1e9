"""Linear layers under bfloat16 autocast on a CPU.

Autocast keeps a rounded copy of every weight from the forward to the backward pass: 1 GB for a
0.5B. `Linear` rounds a weight once more in the backward pass instead, and keeps none.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`, which under autocast on a CPU keeps no rounded weights. Same results."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in] → [T, out]."""
        if _keeps_copies(x_TD, self.weight):
            return _Rounded.apply(x_TD, self.weight, self.bias, torch.get_autocast_dtype("cpu"))
        return super().forward(x_TD)


def _keeps_copies(x_TD: Tensor, weight_OI: Tensor) -> bool:
    """Whether autocast would keep a rounded copy of this weight."""
    if x_TD.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    # Shards of a weight (DTensor) and compiled layers take PyTorch's own way.
    plain = type(weight_OI) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return plain and weight_OI.dtype == torch.float32


class _Rounded(torch.autograd.Function):
    """x · Wᵀ + b of rounded x, W and b, rounded; the gradients of W and b are float32."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        low_TD = x_TD.to(dtype)
        ctx.save_for_backward(low_TD if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.dtype = x_TD.dtype
        bias = None if bias_O is None else bias_O.to(dtype)
        return product(low_TD, weight_OI.to(dtype).T, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low_TD, weight_OI = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        (slope_TO,) = grads
        grad_x = grad_weight = grad_bias = None
        if to_x:
            grad_x = product(slope_TO, weight_OI.to(slope_TO.dtype)).to(ctx.dtype)
        if to_weight:
            grad_weight = product(slope_TO.T, low_TD).float()
        if to_bias:
            grad_bias = slope_TO.sum(0).float()
        return grad_x, grad_weight, grad_bias, None


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias in the dtype of a.

    A CPU without instructions for bfloat16 multiplies the rounded numbers in float32, which gives
    the same result up to the order of the additions, about seven times as fast as its own loops.
    """
    if a.dtype == torch.float32 or a.device.type != "cpu" or _has_bfloat16():
        return a @ b if bias is None else torch.addmm(bias, a, b)
    with torch.autocast("cpu", enabled=False):  # it would round them again
        if bias is None:
            return (a.float() @ b.float()).to(a.dtype)
        return torch.addmm(bias.float(), a.float(), b.float()).to(a.dtype)


@cache
def _has_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 by oneDNN here (from AVX-512 on)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
