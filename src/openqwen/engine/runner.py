"""One forward call over the new tokens of several requests."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openqwen.engine.adapters import Adapters
from openqwen.engine.graphs import DecodeGraphs
from openqwen.engine.request import Request, ScheduledRequest
from openqwen.engine.score import score_tokens
from openqwen.model import Cache, Paged, Qwen2
from openqwen.model.cache import Format


class Runner:
    """Holds the memory of the cache, and calls the model."""

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

    def rotate(self, request: Request, done: int, sources: Sequence[int]) -> None:
        """Rotate a request's keys from its previous RoPE scaling to the one in use.

        Its first `done` pages are rotated already; those after them get the content of `sources`.
        """
        self._cache.copy(sources, request.pages[done : done + len(sources)])
        positions = range(done * self._cache.page_size, request.computed)
        before = request.scalings[request.scaling - 1].way
        self._cache.rotate_keys(request.pages, positions, before, request.long_context)

    def run(self, scheduled: Sequence[ScheduledRequest]) -> Tensor:
        """Compute the scheduled tokens.

        Adds the log-probabilities of prompt tokens to the requests that ask for them.

        Returns:
            The scores of each request's `scored` last positions, in order: [rows, V], float32.
        """
        if self._graphs and _one_token_each(scheduled):
            requests = [item.request for item in scheduled]
            return self._graphs.run(
                [item.tokens[0] for item in scheduled],
                [request.computed + 1 for request in requests],
                [request.pages for request in requests],
                requests[0].long_context,
            )
        counts = [item.count + len(item.drafts) for item in scheduled]
        hidden_TD = self._hidden(scheduled, counts)
        rows, end = list[int](), 0
        for item, part_TD in zip(scheduled, hidden_TD.split(counts)):
            end += len(part_TD)
            rows += range(end - item.scored, end)
            if item.request.unscored:
                self._score_prompt(item.request, part_TD)
        if len(rows) < end:
            hidden_TD = hidden_TD[torch.tensor(rows, dtype=torch.long, device=hidden_TD.device)]
        return self._model.logits(hidden_TD).float()

    def refresh(self) -> None:
        """Adapt to weights that may have changed."""
        if self._graphs:
            self._graphs.refresh()

    def _hidden(self, scheduled: Sequence[ScheduledRequest], counts: list[int]) -> Tensor:
        """The hidden states of the new tokens, [T, D]; their keys and values go into the cache.

        counts: the number of new tokens of each request.
        """
        requests, device = [item.request for item in scheduled], self._model.device
        tokens, positions, totals = list[int](), list[int](), list[int]()
        pages_BP = np.zeros((len(requests), max(len(r.pages) for r in requests)), np.int64)
        for item, count, row in zip(scheduled, counts, pages_BP):
            request = item.request
            tokens += item.tokens
            totals.append(request.computed + count)
            positions += range(request.computed, totals[-1])
            row[: len(request.pages)] = request.pages
        table_BP = torch.from_numpy(pages_BP).to(device)
        contexts = [request.long_context for request in requests]
        paged = Paged(self._cache, table_BP, totals, counts, contexts)
        tokens_T = torch.tensor(tokens, device=device)
        positions_T = torch.tensor(positions, device=device)
        with self._adapters.applied([request.adapter for request in requests], counts):
            return self._model(tokens_T, positions_T, paged)

    def _score_prompt(self, request: Request, hidden_TD: Tensor) -> None:
        """Add the log-probabilities of the prompt tokens after those that were computed now.

        hidden_TD: the hidden states of the tokens from position `request.computed` on.
        """
        start = request.unscored.start
        stop = min(request.unscored.stop, request.computed + len(hidden_TD) + 1)
        if start >= stop:
            return
        first = start - 1 - request.computed
        targets_N = torch.tensor(request.prompt_ids[start:stop], device=hidden_TD.device)
        logprobs_N, top = score_tokens(
            self._model,
            hidden_TD[first : first + len(targets_N)],
            targets_N,
            request.sampling.prompt_logprobs or 0,
            self._vocabulary,
        )
        request.prompt_logprobs += logprobs_N.tolist()
        request.prompt_top += top


def _one_token_each(scheduled: Sequence[ScheduledRequest]) -> bool:
    """Whether a graph can run this: each request decodes one token, all read in the same way."""
    for item in scheduled:
        request = item.request
        if (len(item.tokens), item.scored) != (1, 1) or request.adapter or request.unscored:
            return False
        if request.long_context != scheduled[0].request.long_context:
            return False
        if request.long_context and request.long_context.dual_chunk:
            return False
    return True
