"""Losses return (sum, count); only the trainer divides (law 2)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.model import Qwen2, Routing
from openqwen.train.log_probs import cross_entropy, log_probs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import world_of


@dataclass
class Loss:
    """A loss summed over `count` things (tokens, pairs), and sums of whatever else is worth a
    curve.
    """

    sum: Tensor
    count: int
    extras: dict[str, float] = field(default_factory=dict)


def token_log_probs(model: Qwen2, rows: PackedBatch, routing: Routing | None = None) -> Tensor:
    """Log-probabilities [N] of the rows' targets; `routing` is filled by experts."""
    return _scored(model, rows, routing, log_probs)


def _scored(
    model: Qwen2,
    rows: PackedBatch,
    routing: Routing | None,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """What `score` makes of the hidden states [N, D] that predict, the head, and the targets [N];
    ranks share it.
    """
    hidden_TD = model(rows.tokens, rows.positions, rows.attention, routing)
    # Where every token predicts one (pre-training), copying the rows would be waste.
    picked_ND = hidden_TD if rows.whole else hidden_TD.index_select(0, rows.learned)
    shared = world_of(model).token_parallel(
        lambda hidden_ND, targets_N: score(hidden_ND, model.head_VD, targets_N)
    )
    return shared(picked_ND, rows.targets)


def document_log_probs(model: Qwen2, rows: PackedBatch) -> Tensor:
    """Log-probability of each document's targets, summed over them: [documents]."""
    tokens_N = token_log_probs(model, rows)
    owner_N = torch.repeat_interleave(torch.tensor(rows.counts, device=tokens_N.device))
    return torch.zeros(len(rows.counts), device=tokens_N.device).index_add(0, owner_N, tokens_N)


def next_token(model: Qwen2, rows: PackedBatch, routing: Routing | None = None) -> Loss:
    """Cross-entropy of every target: pre-training and SFT; `routing` is filled by experts."""
    return Loss(_scored(model, rows, routing, cross_entropy), len(rows.targets))


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor) -> Loss:
    """−log σ(r⁺ − r⁻), summed over pairs: the reward model's loss, and DPO's with what the policy
    gained as r.
    """
    margin_B = chosen_B - rejected_B
    extras = {"accuracy": float((margin_B > 0).sum()), "margin": float(margin_B.detach().sum())}
    return Loss(-F.logsigmoid(margin_B).sum(), len(margin_B), extras)


def dpo(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023), summed over pairs.

    policy, reference: log-probabilities of the chosen (column 0) and the rejected (column 1)
    answer, each summed over the answer's tokens. −log σ(β · [(log π⁺ − log ref⁺) − (log π⁻ − log
    ref⁻)]).
    """
    return bradley_terry(*(beta * (policy_B2 - reference_B2)).unbind(1))
