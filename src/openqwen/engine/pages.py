"""The cache's memory, in pages that sequences borrow and give back."""

import torch
from torch import Tensor

from openqwen.model import ModelConfig

PAGE = 16  # tokens


class Pages:
    """A pool of pages and its free list; the cache tensor is [2, N, pages, PAGE, K, d]."""

    def __init__(self, config: ModelConfig, count: int, device: torch.device, dtype: torch.dtype):
        shape = (2, config.num_hidden_layers, count, PAGE, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty memory: masked keys are multiplied by a weight of 0, and 0 × NaN would be NaN.
        self.cache: Tensor = torch.zeros(shape, device=device, dtype=dtype)
        self.free = list(range(count - 1, -1, -1))

    @staticmethod
    def needed(tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // PAGE)

    @staticmethod
    def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory of one page over all layers."""
        width = config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * PAGE * width * dtype.itemsize

    def take(self, count: int) -> list[int]:
        """Borrow pages; the caller has seen that enough are free."""
        return [self.free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Return borrowed pages."""
        self.free.extend(pages)
