"""The feed-forward network of a Qwen2 layer: SwiGLU (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model.config import ModelConfig


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), no bias. [T, D] → [T, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """See the class."""
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
