"""Losses return (sum, count); only the trainer divides.

A sharded network needs the `World` whose mesh it is sharded over, so that the ranks that hold the
same rows divide the work of the head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

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


def token_log_probs(
    model: Qwen2, rows: PackedBatch, world: World = ALONE, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each target under the logits over the temperature: [N]."""

    def score(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        return log_probs(hidden_ND / temperature, head_VD, targets_N)

    return _at_targets(model, rows, log_probs if temperature == 1 else score, None, world)


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


def dpo(
    policy_B2: Tensor,
    reference_B2: Tensor,
    beta: float,
    smoothing: float = 0.0,
    lengths_B2: Tensor | None = None,
) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023), summed over B pairs.

    −log σ(m), m = β · [(log π⁺ − log ref⁺) − (log π⁻ − log ref⁻)]

    Args:
        policy_B2, reference_B2: log-probabilities of the chosen (column 0) and the rejected
            (column 1) answer, each summed over the answer's tokens.
        beta: strength of the tie to the reference.
        smoothing: the probability ε that a pair is the wrong way round (cDPO, Mitchell 2023):
            −(1 − ε) log σ(m) − ε log σ(−m).
        lengths_B2: tokens of the answers. If given, log-ratios are means over tokens.
    """
    rewards_B2 = beta * _log_ratios(policy_B2, reference_B2, lengths_B2)
    loss = bradley_terry(*rewards_B2.unbind(1))
    if smoothing:  # log σ(m) − log σ(−m) = m
        loss.sum = loss.sum + smoothing * (rewards_B2[:, 0] - rewards_B2[:, 1]).sum()
    return loss


def ipo(
    policy_B2: Tensor, reference_B2: Tensor, beta: float, lengths_B2: Tensor | None = None
) -> Loss:
    """Identity preference optimisation (Azar et al. 2023, equation 17), summed over B pairs.

    (h − 1 / 2β)², where h is the difference of the two answers' log-ratios. Arguments as of `dpo`.
    With lengths, log-ratios are means over tokens, as TRL computes them.
    """
    ratios_B2 = _log_ratios(policy_B2, reference_B2, lengths_B2)
    difference_B = ratios_B2[:, 0] - ratios_B2[:, 1]
    margin = beta * float(difference_B.detach().sum())
    extras = {"accuracy": float((difference_B > 0).sum()), "margin": margin}
    return Loss((difference_B - 1 / (2 * beta)).square().sum(), len(difference_B), extras)


def _log_ratios(policy: Tensor, reference: Tensor, lengths: Tensor | None) -> Tensor:
    ratios = policy - reference
    return ratios if lengths is None else ratios / lengths


def kto(
    policy_A: Tensor,
    reference_A: Tensor,
    desirable_A: Tensor,
    divergence: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 8), summed over A answers.

    λ · (1 − σ(±β (log π − log ref − z))), + for desirable answers and − for the others

    Args:
        policy_A, reference_A: log-probabilities of the answers, each summed over its tokens.
        desirable_A: which answers are good, bool.
        divergence: z, the mean log-ratio of answers to other prompts, at least 0. It is a constant:
            no gradient flows through it.
        beta: strength of the tie to the reference.
        desirable_weight, undesirable_weight: λ of the two kinds.
    """
    ratio_A = policy_A - reference_A
    sign_A = torch.where(desirable_A, 1.0, -1.0).to(ratio_A)
    weight_A = torch.where(desirable_A, desirable_weight, undesirable_weight).to(ratio_A)
    value_A = torch.sigmoid(sign_A * beta * (ratio_A - max(divergence, 0.0)))
    margin_A = beta * (sign_A * ratio_A).detach()
    extras = {"accuracy": float((margin_A > 0).sum()), "margin": float(margin_A.sum())}
    return Loss((weight_A * (1 - value_A)).sum(), len(ratio_A), extras)


Aggregate = Literal["answer", "token", "constant"]


def grpo(
    policy_N: Tensor,
    advantages: Tensor,
    lengths: Sequence[int],
    old_N: Tensor | None = None,
    reference_N: Tensor | None = None,
    sampler_N: Tensor | None = None,
    beta: float = 0.0,
    clip: tuple[float, float] = (0.2, 0.2),
    aggregate: Aggregate = "answer",
    longest: int = 1,
    cap: float = 2.0,
) -> Loss:
    """Group relative policy optimisation (Shao et al. 2024, equation 3), negated.

    Of each token, with ρ = π / π_old and the answer's advantage A:

        −w · min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) + β (ref/π − log(ref/π) − 1)

    The last term is the k3 estimate of the divergence from the reference. w = min(π_old / sampler,
    cap) corrects for a sampler that computes other probabilities than the trainer, such as a
    quantised one (truncated importance sampling, Yao et al. 2025).

    Args:
        policy_N: log-probabilities of the N tokens of all A answers, end to end.
        advantages: of each answer, [A] (see `group_advantages`), or of each token, [N] (see
            `token_advantages`).
        lengths: tokens of each answer.
        old_N: the same log-probabilities before the first step on these answers; None: the
            policy's own, as it is in the first step.
        reference_N: those of the reference model; None leaves out the last term.
        sampler_N: those that the sampler reported, NaN where it reported none; None: w is 1.
        beta: weight of the divergence.
        clip: ε_low and ε_high; two different ones are DAPO's clip-higher (Yu et al. 2025).
        aggregate: "answer": the mean over the tokens of each answer, count: answers (GRPO).
            "token": the sum over all tokens, count: tokens (DAPO).
            "constant": the sum over tokens over `longest`, count: answers (Dr. GRPO, Liu et al.).
        longest: the most tokens that an answer may have, for "constant".
        cap: largest w.
    """
    lengths_A = torch.tensor(lengths, device=policy_N.device)
    advantages_N = advantages
    if len(advantages) < len(policy_N):
        advantages_N = advantages.repeat_interleave(lengths_A)
    frozen_N = policy_N.detach()
    old_N = frozen_N if old_N is None else old_N
    ratio_N = (policy_N - old_N).exp()
    clipped_N = ratio_N.clamp(1 - clip[0], 1 + clip[1])
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    outside_N = torch.where(advantages_N > 0, ratio_N > 1 + clip[1], ratio_N < 1 - clip[0])
    # The mean of −log π over sampled tokens estimates the entropy.
    extras_N = {"entropy": -frozen_N, "clip_share": outside_N & (advantages_N != 0)}
    if sampler_N is not None:
        weight_N = (old_N - sampler_N).exp().nan_to_num(1.0).clamp(max=cap)
        loss_N = loss_N * weight_N
        extras_N["importance"] = weight_N
    if reference_N is not None:
        difference_N = reference_N - policy_N
        divergence_N = difference_N.exp() - difference_N - 1
        loss_N = loss_N + beta * divergence_N
        extras_N["kl"] = divergence_N.detach()
    mean_N = (1 / lengths_A.to(policy_N.dtype)).repeat_interleave(lengths_A)
    one_N = torch.ones_like(frozen_N)
    shares = {"answer": mean_N, "token": one_N, "constant": one_N / longest}
    noted_N = one_N if aggregate == "token" else mean_N
    extras = {name: float((noted_N * x_N).sum()) for name, x_N in extras_N.items()}
    count = len(policy_N) if aggregate == "token" else len(lengths)
    return Loss((shares[aggregate] * loss_N).sum(), count, extras)


_NO_VARIANCE = 1e-6  # of rewards, relative: the same answer's may differ by rounding


def group_advantages(rewards: Sequence[float], scale: bool = True) -> list[float]:
    """The advantage of each answer to one prompt: (r − mean) / (standard deviation + 1e-4).

    The deviation is that of the population, as in DeepSeekMath (TRL divides by n − 1). Rewards that
    are all equal give zeros.

    scale: divide by the deviation; Dr. GRPO does not.
    """
    mean = math.fsum(rewards) / len(rewards)
    spread = max(rewards) - min(rewards)
    if spread <= _NO_VARIANCE * max(1.0, *map(abs, rewards)):
        return [0.0] * len(rewards)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (deviation + 1e-4 if scale else 1.0) for r in rewards]


def token_advantages(
    answers: Sequence[Sequence[int]], advantages: Sequence[float]
) -> list[list[float]]:
    """The advantage of each token of the answers to one prompt, from those of the answers.

    The answers are paths of a tree that branches where they first differ. A branch is worth the
    mean advantage of the answers through it, and a token what its branch is worth more than the
    one before it. So what all answers share has none, the token that decides has most, and the
    tokens behind it, which one answer alone has, have none: of these nothing is known, and in
    GRPO they are noise. The tokens of an answer sum to its own advantage (tree advantages as in
    TreeRPO, Yang et al. 2025, here from the samples that GRPO has anyway).
    """
    totals, counts = [math.fsum(advantages)], [len(answers)]
    branches: dict[tuple[int, int], int] = {}
    paths = []
    for answer, advantage in zip(answers, advantages, strict=True):
        path = [0]
        for token in answer:
            path.append(branches.setdefault((path[-1], token), len(totals)))
            if path[-1] == len(totals):
                totals.append(0.0)
                counts.append(0)
            totals[path[-1]] += advantage
            counts[path[-1]] += 1
        paths.append(path)
    worth = [total / count for total, count in zip(totals, counts)]
    return [[worth[b] - worth[a] for a, b in pairwise(path)] for path in paths]
