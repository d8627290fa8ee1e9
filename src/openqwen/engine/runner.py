"""One forward call over the new tokens of several requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from openqwen.engine.adapters import Adapters
from openqwen.engine.graphs import DecodeGraphs
from openqwen.engine.request import Request
from openqwen.engine.score import tell
from openqwen.model import Cache, Paged, Qwen2
from openqwen.model.cache import Format


@dataclass
class Read:
    """New tokens of a request, from position `request.computed` on; of the last `scored` the scores
    are wanted.
    """

    request: Request
    tokens: list[int]
    scored: int


class Runner:
    """Holds the cache's memory and calls the model."""

    def __init__(
        self,
        model: Qwen2,
        adapters: Adapters,
        vocabulary: int,
        pages: int,
        page_size: int,
        format: Format = "float",
    ):
        self._model, self._adapters, self._vocabulary = model, adapters, vocabulary
        # One page more, which belongs to no request: padded rows of a graph write there.
        self._cache = Cache.of(model, pages + 1, page_size, format)
        possible = DecodeGraphs.possible(model, self._cache)
        self._graphs = DecodeGraphs(model, self._cache, scratch=pages) if possible else None

    def turn(self, request: Request, done: int, pages: Sequence[int]) -> None:
        """Fill a request's pages, but for the first `done`, with what these hold, which was read in
        the way before its own, and turn the keys."""
        self._cache.copy(pages, request.pages[done : done + len(pages)])
        span, before = (
            range(done * self._cache.page_size, request.computed),
            request.stages[request.stage - 1].way,
        )
        self._cache.rotate_keys(request.pages, span, before, request.long_context)

    def run(self, reads: Sequence[Read]) -> Tensor:
        """Read the tokens; returns the scores of the wanted ones, in order, [rows, V], float32.
        Requests that ask for log-probabilities of their prompts are told them."""
        if self._graphs and _decoding_alike(reads):
            requests = [read.request for read in reads]
            return self._graphs.run(
                [read.tokens[0] for read in reads],
                [request.computed + 1 for request in requests],
                [request.pages for request in requests],
                requests[0].long_context,
            )
        device = self._model.device
        counts = [len(read.tokens) for read in reads]
        starts = [read.request.computed for read in reads]
        totals = [start + count for start, count in zip(starts, counts)]
        ends = list(accumulate(counts))
        table_BP = np.zeros((len(reads), max(len(read.request.pages) for read in reads)), np.int64)
        for row, read in zip(table_BP, reads):
            row[: len(read.request.pages)] = read.request.pages
        tokens_T = torch.tensor([t for read in reads for t in read.tokens], device=device)
        positions_T = torch.tensor(
            [p for a, b in zip(starts, totals) for p in range(a, b)], device=device
        )
        paged = Paged(
            self._cache,
            torch.from_numpy(table_BP).to(device),
            totals,
            counts,
            [read.request.long_context for read in reads],
        )
        with self._adapters.on([read.request.adapter for read in reads], counts):
            hidden_TD = self._model(tokens_T, positions_T, paged)
        for read, end in zip(reads, ends):
            if read.request.untold:
                self._tell(read.request, hidden_TD[end - len(read.tokens) : end])
        wanted = [row for read, end in zip(reads, ends) for row in range(end - read.scored, end)]
        if len(wanted) < len(positions_T):
            hidden_TD = hidden_TD[torch.tensor(wanted, dtype=torch.long, device=device)]
        return self._model.logits(hidden_TD).float()

    def refresh(self) -> None:
        """The weights may have changed."""
        if self._graphs:
            self._graphs.refresh()

    def _tell(self, request: Request, hidden_TD: Tensor) -> None:
        """Log-probabilities of the prompt's tokens after those that were read now."""
        here = request.untold[
            : max(0, request.computed + len(hidden_TD) + 1 - request.untold.start)
        ]
        targets, before_TD = (
            [request.prompt_ids[n] for n in here],
            hidden_TD[here.start - 1 - request.computed :],
        )
        found = tell(
            self._model, before_TD, targets, request.sampling.prompt_logprobs or 0, self._vocabulary
        )
        request.prompt_logprobs += found[0]
        request.prompt_top += found[1]


def _decoding_alike(reads: Sequence[Read]) -> bool:
    """Whether each request reads one token that is scored, all in one way, none through an
    adapter.
    """
    for read in reads:
        request = read.request
        if (len(read.tokens), read.scored) != (1, 1) or request.adapter or request.untold:
            return False
        if request.long_context != reads[0].request.long_context:
            return False
        if request.long_context and request.long_context.dual_chunk:
            return False
    return True
