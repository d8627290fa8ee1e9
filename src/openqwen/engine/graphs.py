"""Decoding steps as CUDA graphs: one launch instead of a thousand, which take longer than they run.

A graph has fixed sizes, so the number of requests is padded to a power of two. Padded rows write
into a page of their own that no request reads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openqwen.model import Cache, LongContext, Qwen2
from openqwen.model.paged_gpu import PagedDecode, suits

_FEWEST_PAGES = 64  # of a sequence; longer ones get the next power of two


class _Graph(NamedTuple):
    """A captured call, its inputs (see `_views`) and its output."""

    graph: torch.cuda.CUDAGraph
    host: Tensor
    inputs: Tensor
    logits_BV: Tensor


class DecodeGraphs:
    """Decoding calls of one model over one cache, each captured on first use.

    scratch: a page that no request references.
    """

    def __init__(self, model: Qwen2, cache: Cache, scratch: int):
        self._model, self._cache, self._scratch = model, cache, scratch
        self._graphs: dict[tuple[int, int, LongContext | None], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._weights = self._addresses()

    @staticmethod
    def possible(model: Qwen2, cache: Cache) -> bool:
        """Whether this model can be captured; not with experts, which read counts from the GPU."""
        return suits(cache) and not model.config.num_experts and model.config.dual_chunk is None

    def run(
        self,
        tokens: Sequence[int],
        totals: Sequence[int],
        tables: Sequence[Sequence[int]],
        context: LongContext | None,
    ) -> Tensor:
        """Compute one new token of each sequence: scores [B, V], float32, until the next call.

        totals: the length of each sequence, with the new token. tables: its pages.
        """
        batch = _power_of_two(len(tokens))
        pages = max(_FEWEST_PAGES, _power_of_two(max(map(len, tables))))
        key = (batch, pages, context)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        graph = self._graphs[key]
        self._fill(graph.host, batch, pages, tokens, totals, tables)
        graph.inputs.copy_(graph.host, non_blocking=True)
        graph.graph.replay()
        return graph.logits_BV[: len(tokens)]

    def refresh(self) -> None:
        """Drop the graphs if the weights have moved in memory."""
        if (addresses := self._addresses()) != self._weights:
            self._graphs.clear()
            self._weights = addresses

    def _addresses(self) -> tuple[int, ...]:
        return tuple(x.data_ptr() for x in (*self._model.parameters(), *self._model.buffers()))

    def _fill(
        self,
        host: Tensor,
        batch: int,
        pages: int,
        tokens: Sequence[int],
        totals: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        tokens_B, totals_B, tables_BP = (x.numpy() for x in _views(host, batch, pages))
        tokens_B[:], totals_B[:], tables_BP[:] = 0, 1, self._scratch
        tokens_B[: len(tokens)], totals_B[: len(tokens)] = tokens, totals
        for row, table in zip(tables_BP, tables):
            row[: len(table)] = table

    def _capture(self, batch: int, pages: int, context: LongContext | None) -> _Graph:
        device = self._cache.device
        host = torch.zeros(batch * (2 + pages), dtype=torch.int64, pin_memory=True)
        self._fill(host, batch, pages, [], [], [])
        inputs = host.to(device)
        tokens_B, totals_B, tables_BP = _views(inputs, batch, pages)

        def call() -> Tensor:
            paged = PagedDecode(self._cache, tables_BP, totals_B, context)
            return self._model.logits(self._model(tokens_B, totals_B - 1, paged)).float()

        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are compiled and chosen before the capture
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = call()
        return _Graph(graph, host, inputs, logits_BV)


def _views(x: Tensor, batch: int, pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B], totals [B] and pages [B, P], all in one tensor, so that one copy moves them."""
    return x[:batch], x[batch : 2 * batch], x[2 * batch :].view(batch, pages)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
