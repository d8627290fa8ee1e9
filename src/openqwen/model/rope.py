"""Rotary position embedding (Su et al. 2021), in Qwen2's rotate-half layout."""

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """θ_k = theta^(−2k/d) for k < d/2, in float32 whatever the weights' type. Shape [d/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents


def rotations(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle position × θ_k, each [T, 1, d/2], float32."""
    angles = positions_T.to(torch.float32)[:, None] * inverse_frequencies(head_dim, theta, positions_T.device)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x_THd: Tensor, cos_T1f: Tensor, sin_T1f: Tensor) -> Tensor:
    """Turn each pair (x_k, x_{k+d/2}) by its angle: first half against second half, not interleaved."""
    a, b = x_THd.chunk(2, dim=-1)
    cos, sin = cos_T1f.to(x_THd.dtype), sin_T1f.to(x_THd.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
