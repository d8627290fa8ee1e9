"""What networks compute for given texts: log-probabilities of tokens, embeddings, and rewards.

`score_tokens` is the one function for log-probabilities without a gradient. What must be rounded
exactly as in training uses the trainer's functions (train/log_probs.py): the log-probabilities of
DPO's reference model, the held-out loss, and `verify`, which compares the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.engine.generator import TopTokens
from openqwen.engine.sampler import normalizers, top_tokens
from openqwen.model import LongContext, Packed, Qwen2, Scorer, load_scorer
from openqwen.support.batching import cut_to_budget
from openqwen.support.device import best_device
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.answers import encode_answer

SCORES = 2**24  # scores (tokens × vocabulary) computed at a time: 64 MiB of float32
_PACKED = 8_192  # most tokens of one call; a longer prompt goes alone


def score_tokens(
    model: Qwen2, hidden_ND: Tensor, targets_N: Tensor, top: int = 0, vocabulary: int | None = None
) -> tuple[Tensor, list[TopTokens]]:
    """Compute log-probabilities of tokens, without a gradient.

    The head is applied to the given hidden states only, a bounded number of them at a time.

    Args:
        hidden_ND: the hidden state of the token before each target.
        targets_N: ids of the tokens to score, int64.
        top: how many of the likeliest tokens to list at each position.
        vocabulary: the likeliest tokens have ids below this number; None allows all.

    Returns:
        The log-probabilities, float32 [N], and for each position its likeliest tokens.
    """
    rows = max(1, SCORES // model.config.vocab_size)
    logprobs, likeliest = [], list[TopTokens]()
    with torch.no_grad():
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
            logits_CV = model.logits(hidden_CD).float()
            normalizer_C = normalizers(logits_CV)
            logprobs.append(logits_CV.gather(1, targets_C[:, None]).squeeze(1) - normalizer_C)
            if vocabulary is not None:
                logits_CV[:, vocabulary:] = -torch.inf
            likeliest += top_tokens(logits_CV, normalizer_C, [top] * len(targets_C))
    return torch.cat(logprobs), likeliest


@torch.no_grad()  # not inference_mode: its tensors could not enter a training step
def embeddings(
    model: Qwen2, prompts: Sequence[Sequence[int]], contexts: Sequence[LongContext | None]
) -> Tensor:
    """The normalized hidden state of each prompt's last token: [B, D], float32.

    contexts: the RoPE scaling that each prompt is read under.
    """
    states: list[Tensor] = []
    for cut in cut_to_budget([len(ids) for ids in prompts], _PACKED):
        packed = Packed.from_lengths([len(ids) for ids in prompts[cut]], contexts[cut])
        tokens_T, positions_T, last_B = _laid(prompts[cut], packed, model.device)
        hidden_TD = model(tokens_T, positions_T, packed)
        states.append(F.normalize(hidden_TD[last_B].float(), dim=-1))
    return torch.cat(states) if states else torch.empty(0, model.config.hidden_size)


@dataclass(frozen=True)
class RewardModel:
    """A reward model with its tokenizer, to score conversations."""

    scorer: Scorer
    tokenizer: Tokenizer

    @classmethod
    def load(cls, source: str | Path) -> "RewardModel":
        """Read a reward model (see `load_scorer`) onto the best device."""
        return cls(load_scorer(source, device=best_device()), load_tokenizer(source))

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """The reward of each conversation, which ends with an assistant's answer."""
        talks = [[dict(message) for message in messages] for messages in conversations]
        ids = [encode_answer(self.tokenizer, talk[:-1], talk[-1])[0] for talk in talks]
        return score_sequences(self.scorer, ids)


def score_sequences(
    scorer: Scorer, sequences: Sequence[Sequence[int]], micro_tokens: int = _PACKED
) -> list[float]:
    """The reward of each token sequence, which ends where its answer ends."""
    return scorer.reward(criteria_scores(scorer, sequences, micro_tokens)).tolist()


@torch.inference_mode()
def criteria_scores(
    scorer: Scorer, sequences: Sequence[Sequence[int]], micro_tokens: int = _PACKED
) -> Tensor:
    """The scores of token sequences by the reward model's criteria: [B, C], float32, on the CPU.

    micro_tokens: most tokens of one call; a longer sequence goes alone.
    """
    scores = [torch.empty(0, len(scorer.criteria))]
    for cut in cut_to_budget([len(ids) for ids in sequences], micro_tokens):
        packed = Packed.from_lengths([len(ids) for ids in sequences[cut]])
        tokens_T, positions_T, last_B = _laid(sequences[cut], packed, scorer.device)
        scores.append(scorer(tokens_T, positions_T, packed, last_B).float().cpu())
    return torch.cat(scores)


def _laid(
    sequences: Sequence[Sequence[int]], packed: Packed, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [T], positions [T], and rows of the sequences' last tokens [B], on the device."""
    tokens_T = torch.tensor([i for ids in sequences for i in ids], device=device)
    last_B = torch.tensor([len(ids) for ids in sequences], device=device).cumsum(0) - 1
    packed.to(device)
    return tokens_T, packed.positions.to(device), last_B
