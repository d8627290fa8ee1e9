"""One forward call over the new tokens of several requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np
import torch
from torch import Tensor

from openqwen.engine.request import Request
from openqwen.model import ModelConfig, Paged, Qwen2


@dataclass
class Read:
    """New tokens of a request, from position `request.computed` on; of the last `scored` the scores are wanted."""

    request: Request
    tokens: list[int]
    scored: int


def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page over all layers."""
    return 2 * config.num_hidden_layers * page_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


class Runner:
    """Holds the cache's memory, [2, N, pages, page size, K, d], and calls the model."""

    def __init__(self, model: Qwen2, pages: int, page_size: int):
        self.model = model
        config, dtype = model.config, cache_dtype(model)
        shape = (2, config.num_hidden_layers, pages, page_size, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty memory: masked keys are multiplied by a weight of 0, and 0 × NaN would be NaN. From numpy on
        # a CPU, where the system hands out zero pages only when they are touched: an engine that does little is small.
        if model.device.type == "cpu":
            self.cache = torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
        else:
            self.cache = torch.zeros(shape, device=model.device, dtype=dtype)

    def run(self, reads: Sequence[Read]) -> Tensor:
        """Read the tokens; returns the scores of the wanted ones, in order, [rows, V], float32."""
        device = self.model.device
        counts = [len(read.tokens) for read in reads]
        starts = [read.request.computed for read in reads]
        totals = [start + count for start, count in zip(starts, counts)]
        ends = list(accumulate(counts))
        table_BP = np.zeros((len(reads), max(len(read.request.pages) for read in reads)), np.int64)
        for row, read in zip(table_BP, reads):
            row[: len(read.request.pages)] = read.request.pages
        tokens_T = torch.tensor([t for read in reads for t in read.tokens], device=device)
        positions_T = torch.tensor([p for a, b in zip(starts, totals) for p in range(a, b)], device=device)
        paged = Paged(
            self.cache,
            torch.from_numpy(table_BP).to(device),
            totals,
            counts,
            [read.request.sampling.long_context for read in reads],
        )
        hidden_TD = self.model(tokens_T, positions_T, paged)
        wanted = [row for read, end in zip(reads, ends) for row in range(end - read.scored, end)]
        if len(wanted) < len(positions_T):
            hidden_TD = hidden_TD[torch.tensor(wanted, dtype=torch.long, device=device)]
        return self.model.logits(hidden_TD).float()


def cache_dtype(model: Qwen2) -> torch.dtype:
    """Keys and values are kept in the type that the network computes in."""
    return model.model.norm.weight.dtype
