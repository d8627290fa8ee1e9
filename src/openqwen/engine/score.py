"""What the network says of given texts: log-probabilities of their tokens, and embeddings."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.engine.generator import TopTokens
from openqwen.engine.sampler import normalizers, top_tokens
from openqwen.model import Packed, Qwen2
from openqwen.support.batching import cut_to_budget

_SCORED = 256  # tokens scored over the vocabulary at a time
_PACKED = 8_192  # tokens embedded in one call, at most (one longer prompt alone may exceed it)


def tell(
    model: Qwen2, hidden_TD: Tensor, targets: Sequence[int], count: int, vocabulary: int
) -> tuple[list[float], list[TopTokens]]:
    """The log-probability of each target after its hidden state, and `count` of the likeliest
    tokens there, which are among the first `vocabulary`."""
    logprobs, top = list[float](), list[TopTokens]()
    for start in range(0, len(targets), _SCORED):
        targets_C1 = torch.tensor(targets[start : start + _SCORED], device=model.device)[:, None]
        logits_CV = model.logits(hidden_TD[start : start + len(targets_C1)]).float()
        normalizer_C = normalizers(logits_CV)
        logprobs += (logits_CV.gather(1, targets_C1).squeeze(1) - normalizer_C).tolist()
        logits_CV[:, vocabulary:] = -torch.inf
        top += top_tokens(logits_CV, normalizer_C, [count] * len(targets_C1))
    return logprobs, top


@torch.no_grad()  # not inference_mode: its tensors could not enter a training step
def embeddings(model: Qwen2, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The hidden state of each prompt's last token, of length 1: [B, D], float32."""
    found: list[Tensor] = []
    for cut in cut_to_budget([len(ids) for ids in prompts], _PACKED):
        packed = Packed.from_lengths([len(ids) for ids in prompts[cut]]).to(model.device)
        tokens_T = torch.tensor([i for ids in prompts[cut] for i in ids], device=model.device)
        hidden_TD = model(tokens_T, packed.positions.to(model.device), packed)
        last_B = torch.tensor(packed.lengths, device=model.device).cumsum(0) - 1
        found.append(F.normalize(hidden_TD[last_B].float(), dim=-1))
    return torch.cat(found) if found else torch.empty(0, model.config.hidden_size)
