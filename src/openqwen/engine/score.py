"""Whole texts read without a cache: log-probabilities of given tokens, and embeddings."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.model import LongContext, Packed, Qwen2

_SCORED = 256  # tokens scored over the vocabulary at a time
_PACKED = 8_192  # tokens embedded in one call, at most (one longer prompt alone may exceed it)


@torch.inference_mode()
def log_probs_of(model: Qwen2, ids: Sequence[int], long_context: LongContext | None = None) -> list[float]:
    """The log-probability of each token but the first, given those before it: len(ids) − 1 numbers."""
    hidden_TD = _read(model, [ids], long_context)[:-1]
    targets_T = torch.tensor(ids[1:], device=model.device)
    found = []
    for hidden, targets in zip(hidden_TD.split(_SCORED), targets_T.split(_SCORED)):
        logits_CV = model.logits(hidden).float()
        found.append(logits_CV.gather(1, targets[:, None]).squeeze(1) - torch.logsumexp(logits_CV, dim=-1))
    return torch.cat(found).tolist() if found else []


@torch.no_grad()  # not inference_mode: its tensors could not enter a training step
def embeddings(model: Qwen2, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The hidden state of each prompt's last token, of length 1: [B, D], float32."""
    found: list[Tensor] = []
    batch: list[Sequence[int]] = []
    for number, ids in enumerate(prompts, 1):
        batch.append(ids)
        if number == len(prompts) or sum(map(len, batch)) + len(prompts[number]) > _PACKED:
            last_B = torch.tensor([len(b) for b in batch], device=model.device).cumsum(0) - 1
            found.append(F.normalize(_read(model, batch, None)[last_B].float(), dim=-1))
            batch = []
    return torch.cat(found) if found else torch.empty(0, model.config.hidden_size)


def _read(model: Qwen2, texts: Sequence[Sequence[int]], long_context: LongContext | None) -> Tensor:
    packed = Packed.from_lengths([len(ids) for ids in texts], long_context).to(model.device)
    tokens_T = torch.tensor([i for ids in texts for i in ids], device=model.device)
    return model(tokens_T, packed.positions.to(model.device), packed)
