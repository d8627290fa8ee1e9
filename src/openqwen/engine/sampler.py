"""From scores to the next token. A request's draws depend on its seed alone, never on its neighbours in the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop.

    max_tokens: most tokens to write. temperature 0 takes the likeliest token. top_k 0 and top_p 1 cut nothing.
    seed: of a request's draws. stop_ids: token ids that end the answer, besides the tokenizer's own.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


def uniforms(seed: int, count: int) -> np.ndarray:
    """The draws of one request, all `count` of them, in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def choose(logits_BV: Tensor, samplings: list[Sampling], draws_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities [B] under the model's own distribution (temperature 1, nothing cut).

    Sampling inverts the cumulative distribution at each request's own draw.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    tokens_B = logprobs_BV.argmax(dim=-1)
    rows = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if rows:
        chosen = [samplings[i] for i in rows]
        temperatures = torch.tensor([s.temperature for s in chosen], device=logits_BV.device)[:, None]
        probs_BV = torch.softmax(logprobs_BV[rows] / temperatures, dim=-1)
        if any(s.top_k or s.top_p < 1 for s in chosen):
            probs_BV = _cut(probs_BV, chosen)
        cumulative_BV = probs_BV.double().cumsum(dim=-1)
        targets_B1 = torch.from_numpy(draws_B[rows]).to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
        # right=True: a draw of exactly 0 never lands on a token of probability 0
        picked = torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)
        tokens_B[rows] = picked.clamp(max=probs_BV.shape[-1] - 1)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(-1)


def _cut(probs_BV: Tensor, samplings: list[Sampling]) -> Tensor:
    """Zero all but each row's top_k likeliest tokens, and all beyond the first top_p of the probability."""
    ordered_BV, index_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    vocabulary = probs_BV.shape[-1]
    ks_B1 = torch.tensor([s.top_k or vocabulary for s in samplings], device=probs_BV.device)[:, None]
    ps_B1 = torch.tensor([s.top_p for s in samplings], device=probs_BV.device)[:, None]
    before_BV = ordered_BV.cumsum(dim=-1) - ordered_BV
    kept_BV = (torch.arange(vocabulary, device=probs_BV.device) < ks_B1) & (before_BV < ps_B1)
    return torch.zeros_like(probs_BV).scatter(1, index_BV, ordered_BV * kept_BV)
