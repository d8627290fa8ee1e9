"""Losses return (sum, count); only the trainer divides.

A sharded network needs the `World` whose mesh it is sharded over, so that the ranks that hold the
same rows divide the work of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from openqwen.model import Qwen2, Routing
from openqwen.train.log_probs import cross_entropy, log_probs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import ALONE, World


@dataclass
class Loss:
    """A loss summed over `count` targets or pairs, and sums of other quantities for the metrics."""

    sum: Tensor
    count: int
    extras: dict[str, float] = field(default_factory=dict)


def next_token(
    model: Qwen2, rows: PackedBatch, routing: Routing | None = None, world: World = ALONE
) -> Loss:
    """Cross-entropy of every target, for pre-training and SFT.

    routing: a record that the layers with experts fill.
    """
    return Loss(_at_targets(model, rows, cross_entropy, routing, world), len(rows.targets))


def token_log_probs(model: Qwen2, rows: PackedBatch, world: World = ALONE) -> Tensor:
    """Log-probability of each target: [N]."""
    return _at_targets(model, rows, log_probs, None, world)


def document_log_probs(model: Qwen2, rows: PackedBatch, world: World = ALONE) -> Tensor:
    """Log-probability of each document's targets, summed over them: [documents]."""
    tokens_N = token_log_probs(model, rows, world)
    owner_N = torch.repeat_interleave(torch.tensor(rows.counts, device=tokens_N.device))
    return torch.zeros(len(rows.counts), device=tokens_N.device).index_add(0, owner_N, tokens_N)


def _at_targets(
    model: Qwen2,
    rows: PackedBatch,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    routing: Routing | None,
    world: World,
) -> Tensor:
    """`score` of the hidden states [N, D] that predict a target, the head, and the targets [N]."""
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    assert world.mesh is not None or not sharded, "a sharded network needs its World"
    hidden_TD = model(rows.tokens, rows.positions, rows.attention, routing)
    # In pre-training every token predicts a target, and a copy of the rows would be waste.
    hidden_ND = hidden_TD if rows.whole else hidden_TD.index_select(0, rows.learned)
    parallel = world.token_parallel(lambda h_ND, targets_N: score(h_ND, model.head_VD, targets_N))
    return parallel(hidden_ND, rows.targets)


def reward(
    chosen_P: Tensor,
    rejected_P: Tensor,
    margins_P: Tensor | float = 0.0,
    lists_P: Tensor | None = None,
    center: float = 0.0,
) -> Loss:
    """−log σ(r⁺ − r⁻ − m) over P comparisons: the loss of the reward model, whose scores are r.

    Args:
        margins: how far r⁺ must be above r⁻ (Llama 2, equation 2).
        lists: the list of each comparison, numbered from 0. A list's loss is the mean of its
            comparisons: with k positives of n answers, −1/(k(n − k)) Σ log σ(r⁺ − r⁻ − m), the
            listwise form of Qwen2.5-Math. None: each comparison is a list of its own.
        center: weight of (r⁺ + r⁻)², which keeps scores around zero (Eisenstein et al. 2023).

    Returns:
        The loss summed over the lists, and their number.
    """
    gap_P = chosen_P - rejected_P
    losses_P = center * (chosen_P + rejected_P) ** 2 - F.logsigmoid(gap_P - margins_P)
    if lists_P is None:
        lists_P = torch.arange(len(gap_P), device=gap_P.device)
    sizes_L = lists_P.bincount()
    weights_P = 1 / sizes_L[lists_P].to(gap_P.dtype)
    right, gap = (float((weights_P * x_P).sum()) for x_P in (gap_P > 0, gap_P.detach()))
    return Loss((weights_P * losses_P).sum(), len(sizes_L), {"accuracy": right, "margin": gap})


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor) -> Loss:
    """−log σ(r⁺ − r⁻), summed over B pairs: the loss of the reward model, whose scores are r.

    In DPO r is β times the log-ratio of policy and reference.
    """
    margin_B = chosen_B - rejected_B
    extras = {"accuracy": float((margin_B > 0).sum()), "margin": float(margin_B.detach().sum())}
    return Loss(-F.logsigmoid(margin_B).sum(), len(margin_B), extras)


def dpo(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023), summed over B pairs.

    −log σ(β · [(log π⁺ − log ref⁺) − (log π⁻ − log ref⁻)])

    policy, reference: log-probabilities of the chosen (column 0) and the rejected (column 1)
    answer, each summed over the answer's tokens.
    """
    return bradley_terry(*(beta * (policy_B2 - reference_B2)).unbind(1))
