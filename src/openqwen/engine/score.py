"""What the network computes for given texts: log-probabilities of their tokens, and embeddings.

`score_tokens` is the one function for log-probabilities without a gradient. What must be rounded
exactly as in training uses the trainer's functions (train/log_probs.py): the log-probabilities of
DPO's reference model, the held-out loss, and `verify`, which compares the two.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.engine.generator import TopTokens
from openqwen.engine.sampler import normalizers, top_tokens
from openqwen.model import LongContext, Packed, Qwen2
from openqwen.support.batching import cut_to_budget

SCORES = 2**24  # scores (tokens × vocabulary) computed at a time: 64 MiB of float32
_PACKED = 8_192  # most tokens embedded in one call; a longer prompt goes alone


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
        packed = Packed.from_lengths([len(ids) for ids in prompts[cut]], contexts[cut]).to(
            model.device
        )
        tokens_T = torch.tensor([i for ids in prompts[cut] for i in ids], device=model.device)
        hidden_TD = model(tokens_T, packed.positions.to(model.device), packed)
        last_B = torch.tensor(packed.lengths, device=model.device).cumsum(0) - 1
        states.append(F.normalize(hidden_TD[last_B].float(), dim=-1))
    return torch.cat(states) if states else torch.empty(0, model.config.hidden_size)
