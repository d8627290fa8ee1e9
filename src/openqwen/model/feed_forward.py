"""The feed-forward network of a Qwen2 layer: SwiGLU (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model.fused import fused
from openqwen.model.linear import Linear


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) without bias; D inputs and outputs, `width` channels inside."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor, routing: object = None) -> Tensor:
        """[T, D] → [T, D]. routing: unused; the argument exists for `SparseFeedForward`."""
        return self.down_proj(_gated(self.gate_proj(x_TD), self.up_proj(x_TD)))


@fused
def _gated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return F.silu(gate_TF) * up_TF
