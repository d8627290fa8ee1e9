"""The cache's memory, in pages that sequences borrow and give back."""

import torch

from openqwen.model import Cache, ModelConfig

PAGE = 16  # tokens


class Pages:
    """A pool of pages and its free list."""

    def __init__(self, config: ModelConfig, count: int, device: torch.device, dtype: torch.dtype):
        self.cache = Cache(config, count, PAGE, dtype=dtype, device=device)
        self.free = list(range(count - 1, -1, -1))

    @staticmethod
    def needed(tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // PAGE)

    @staticmethod
    def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory of one page over all layers."""
        return Cache.bytes_per_page(config, PAGE, "float", dtype)

    def take(self, count: int) -> list[int]:
        """Borrow pages; the caller has seen that enough are free."""
        return [self.free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Return borrowed pages."""
        self.free.extend(pages)
