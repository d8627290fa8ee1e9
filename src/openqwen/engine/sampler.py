"""From scores to the next tokens, all rows in one pass.

Randomness is counter-based: the draw of a token is a function of its request's seed and its place
in the answer, so a sample depends neither on its neighbours nor on preemption nor on speculation.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd, isfinite

import numpy as np
import torch
from torch import Tensor

from openqwen.engine.generator import Sampling, TopTokens
from openqwen.engine.seeds import draws
from openqwen.model import kernels

_CANDIDATES = 64  # tokens that cuts look at first; where more would pass, all are sorted
_BLOCK = (
    128  # scores are searched in blocks of this size (that of Qwen's vocabularies is a multiple)
)


@dataclass
class Row:
    """One position whose token is to be chosen: of a request with this seed, the `place`-th of its
    answer.

    prompt, answer: the ids before it, for the penalties. allowed: [V], where a structure rules.
    """

    sampling: Sampling
    seed: int
    place: int
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    allowed: Tensor | None = None


@dataclass
class Choice:
    """Of each row: the token; its log-probability under the model, and under the distribution that
    it was drawn from; and the likeliest tokens.

    broken: the rows whose scores are no numbers, so that nothing was chosen.
    """

    tokens: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    top: list[TopTokens]
    broken: frozenset[int] = frozenset()


def choose(logits_RV: Tensor, rows: Sequence[Row], vocabulary: int) -> Choice:
    """Choose a token for each row. Those of `vocabulary` and beyond (padding) are never chosen.

    logits_RV: float32, and free to be written to.
    """
    normalizer_R = normalizers(logits_RV)
    logits_RV[:, vocabulary:] = -torch.inf
    asked = [
        (row.sampling.penalised, row.sampling.logit_bias, row.allowed is not None) for row in rows
    ]
    changed = [r for r, changes in enumerate(asked) if any(changes)]
    scores_RV = logits_RV.clone() if changed else logits_RV
    for r in changed:
        row = rows[r]
        penalise(scores_RV[r], row.sampling, row.prompt, row.answer)
        if row.allowed is not None:
            scores_RV[r].masked_fill_(~row.allowed, -torch.inf)
    own_R = normalizers(scores_RV) if changed else normalizer_R
    broken = [r for r, total in enumerate(own_R.tolist()) if not isfinite(total)]
    for r in broken:  # nothing can be chosen there: something else is, and thrown away
        scores_RV[r] = logits_RV[r] = normalizer_R[r] = 0.0
    tokens_R = likeliest(scores_RV)
    drawn_R = torch.zeros_like(normalizer_R)
    for cut in (False, True):
        if some := [
            r
            for r, row in enumerate(rows)
            if row.sampling.temperature > 0 and row.sampling.cut == cut
        ]:
            _draw(scores_RV, rows, some, cut, (tokens_R, drawn_R))
    found_R = logits_RV.gather(1, tokens_R[:, None]).squeeze(1) - normalizer_R
    top = top_tokens(logits_RV, normalizer_R, [row.sampling.top_logprobs for row in rows])
    return Choice(tokens_R.tolist(), found_R.tolist(), drawn_R.tolist(), top, frozenset(broken))


def penalise(
    scores_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> None:
    """Change scores in place: repetition (prompt and answer), then frequency and presence (the
    answer), then biases.

    Repetition as in transformers: a positive score is divided by the penalty, a negative one
    multiplied. Frequency and presence as in OpenAI's API.
    """
    device = scores_V.device
    if sampling.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array([*prompt, *answer], np.int64))).to(device)
        found = scores_V[seen]
        factor = sampling.repetition_penalty
        scores_V[seen] = torch.where(found < 0, found * factor, found / factor)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        written, counts = np.unique(np.array(answer, np.int64), return_counts=True)
        off = sampling.presence_penalty + sampling.frequency_penalty * torch.from_numpy(counts)
        scores_V[torch.from_numpy(written).to(device)] -= off.to(scores_V)
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias)
        # index_add, not +=: an id may be named twice.
        scores_V.index_add_(
            0, torch.tensor(ids, device=device), torch.tensor(biases, device=device).to(scores_V)
        )


def _draw(
    scores_RV: Tensor, rows: Sequence[Row], some: list[int], cut: bool, into: tuple[Tensor, Tensor]
) -> None:
    """Draw the tokens of some rows; writes tokens and log-probabilities into the rows of `into`."""
    chosen = [rows[r] for r in some]
    device = scores_RV.device
    temperature_R = torch.tensor([row.sampling.temperature for row in chosen], device=device)
    own_RV = scores_RV if len(some) == len(rows) else scores_RV[some]
    draws_R = torch.from_numpy(
        draws([row.seed for row in chosen], [row.place for row in chosen])
    ).to(device)
    if cut:
        found = _among_candidates(
            own_RV, temperature_R, [row.sampling for row in chosen], draws_R, _CANDIDATES
        )
    else:
        found = _among_all(own_RV, temperature_R, draws_R)
    for whole, part in zip(into, found):
        whole[some] = part.to(whole)


def _among_all(scores_RV: Tensor, temperature_R: Tensor, draws_R: Tensor) -> tuple[Tensor, Tensor]:
    """The first token at which the cumulative probability exceeds the draw: first its block, then
    within it.

    Returns tokens and their log-probabilities, each [R].
    """
    peak_R, sums_RB = block_sums(scores_RV, temperature_R)
    ends_RB = sums_RB.double().cumsum(-1)
    total_R = ends_RB[:, -1]
    goal_R = _below(draws_R * total_R, total_R)
    at_R = torch.searchsorted(ends_RB, goal_R[:, None], right=True).squeeze(1)
    every_R = torch.arange(len(at_R), device=at_R.device)
    before_R = torch.where(at_R > 0, ends_RB[every_R, (at_R - 1).clamp(min=0)], 0.0)
    own_Rb = scores_RV.unflatten(1, (sums_RB.shape[1], -1))[every_R, at_R]
    within_Rb = ((own_Rb - peak_R[:, None]) / temperature_R[:, None]).double().exp().cumsum(-1)
    rest_R = _below(goal_R - before_R, within_Rb[:, -1])
    place_R1 = torch.searchsorted(within_Rb, rest_R[:, None], right=True)
    found_R = (own_Rb.gather(1, place_R1).squeeze(1) - peak_R) / temperature_R - total_R.log()
    return at_R * own_Rb.shape[1] + place_R1.squeeze(1), found_R


def _below(x: Tensor, bound: Tensor) -> Tensor:
    """x, or the largest number below `bound` if that is less: a draw never lands beyond the last
    possible token.
    """
    return torch.minimum(x, torch.nextafter(bound, torch.zeros_like(bound)))


def _among_candidates(
    scores_RV: Tensor,
    temperature_R: Tensor,
    samplings: list[Sampling],
    draws_R: Tensor,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Cut to the likeliest tokens, then draw: tokens and their log-probabilities, each [R].

    Each row's cuts as in transformers: top_k, then top_p of what is left, then min_p. `candidates`
    likeliest tokens are looked at; rows in which the last of them passes all cuts are done again
    over the whole vocabulary.
    """
    width, device = scores_RV.shape[1], scores_RV.device
    size = min(max(candidates, *(s.top_k + 1 for s in samplings)), width)
    values_RC, ids_RC = top_of(scores_RV, size)
    probs_RC = (
        (values_RC / temperature_R[:, None] - normalizers(scores_RV, temperature_R)[:, None])
        .double()
        .exp()
    )
    rank_C = torch.arange(size, device=device)
    top_k, top_p, min_p = (
        torch.tensor(column, device=device)[:, None]
        for column in zip(*((s.top_k or width, s.top_p, s.min_p) for s in samplings))
    )
    keep_RC = rank_C < top_k
    left_R1 = torch.where(top_k < width, (probs_RC * keep_RC).sum(-1, keepdim=True), 1.0)
    before_RC = probs_RC.cumsum(-1) - probs_RC
    keep_RC &= (before_RC < top_p * left_R1) & (probs_RC >= min_p * probs_RC[:, :1])
    keep_RC[:, 0] = True
    # Drawn in the order of ids: similar scores then give similar samples, and a cut that cuts
    # nothing the uncut one's.
    order_RC = ids_RC.argsort(-1)
    kept_RC = (probs_RC * keep_RC).gather(1, order_RC).cumsum(-1)
    total_R = kept_RC[:, -1]
    goal_R = _below(draws_R * total_R, total_R)
    at_R1 = order_RC.gather(1, torch.searchsorted(kept_RC, goal_R[:, None], right=True))
    tokens_R = ids_RC.gather(1, at_R1).squeeze(1)
    logprobs_R = (probs_RC.gather(1, at_R1).squeeze(1) / total_R).log()
    if size < width and len(again := keep_RC[:, -1].nonzero().squeeze(1)):
        rows = again.tolist()
        own = scores_RV[again], temperature_R[again], [samplings[r] for r in rows], draws_R[again]
        found = _among_candidates(*own, width)
        for whole, part in zip((tokens_R, logprobs_R), found):
            whole[again] = part
    return tokens_R, logprobs_R


def likeliest(scores_RV: Tensor) -> Tensor:
    """argmax of each row, the first where several are largest.

    On a CPU by NumPy, ten times as fast as torch there.
    """
    if scores_RV.device.type == "cpu":
        return torch.from_numpy(scores_RV.numpy().argmax(-1))
    return scores_RV.argmax(-1)


def normalizers(scores_RV: Tensor, temperature_R: Tensor | None = None) -> Tensor:
    """log Σ exp(score / temperature) of each row."""
    temperature_R = torch.ones_like(scores_RV[:, 0]) if temperature_R is None else temperature_R
    peak_R, sums_RB = block_sums(scores_RV, temperature_R)
    return peak_R / temperature_R + sums_RB.double().sum(-1).log().float()


def block_sums(scores_RV: Tensor, temperature_R: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest score [R], and Σ exp((score − largest) / temperature) over each block [R,
    blocks].

    In C++ where it can be, which writes nothing as wide as the vocabulary; float32 both.
    """
    block = gcd(scores_RV.shape[1], _BLOCK)
    on_cpu = scores_RV.device.type == "cpu" and scores_RV.stride(1) == 1 and block % 16 == 0
    if on_cpu and (kernel := _kernel()):
        kernels.follow_torch()
        rows, width = scores_RV.shape
        peak_R, sums_RB = scores_RV.new_empty(rows), scores_RV.new_empty(rows, width // block)
        outputs = temperature_R.data_ptr(), peak_R.data_ptr(), sums_RB.data_ptr()
        kernel(scores_RV.data_ptr(), rows, scores_RV.stride(0), width, block, *outputs)
        return peak_R, sums_RB
    peak_R = scores_RV.amax(-1)
    powers_RV = ((scores_RV - peak_R[:, None]) / temperature_R[:, None]).exp_()
    return peak_R, powers_RV.unflatten(1, (-1, block)).sum(-1)


@cache
def _kernel() -> Callable[..., None] | None:
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    return kernels.function("openqwen_block_sums", pointer, *(size,) * 4, *(pointer,) * 3)


def top_of(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores of each row and their ids, in order, without sorting the
    vocabulary.

    They lie in the `count` blocks whose largest scores are the largest, so only those are searched.
    """
    width = scores_RV.shape[1]
    block = gcd(width, _BLOCK)
    if block < 32 or 4 * count > width // block:
        values_RC, ids_RC = scores_RV.topk(count, dim=-1)
        return values_RC, ids_RC
    blocks_RBb = scores_RV.unflatten(1, (-1, block))
    best_RC = blocks_RBb.amax(-1).topk(count, dim=-1).indices
    found_RX = blocks_RBb.gather(1, best_RC[:, :, None].expand(-1, -1, block)).flatten(1)
    values_RC, at_RC = found_RX.topk(count, dim=-1)
    return values_RC, best_RC.gather(1, at_RC // block) * block + at_RC % block


def top_tokens(logits_RV: Tensor, normalizer_R: Tensor, counts: Sequence[int]) -> list[TopTokens]:
    """The likeliest tokens of each row that asks for some, by the model's own distribution."""
    top: list[TopTokens] = [[] for _ in counts]
    asking = [r for r, count in enumerate(counts) if count]
    if asking:
        values_RC, ids_RC = top_of(logits_RV[asking], min(max(counts), logits_RV.shape[1]))
        logprobs_RC = values_RC - normalizer_R[asking][:, None]
        for r, ids, logprobs in zip(asking, ids_RC.tolist(), logprobs_RC.tolist()):
            top[r] = list(zip(ids, logprobs))[: counts[r]]
    return top
