"""From scores to the next tokens, all rows in one pass.

Random numbers are counter-based: the draw of a token is a function of its request's seed and its
position in the answer. So a sample does not depend on other requests, preemption or drafts.
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

_CANDIDATES = 64  # likeliest tokens that cuts are tried on before the whole vocabulary is sorted
_BLOCK = 128  # scores of one block; divides the vocabulary sizes of Qwen


@dataclass
class SamplingRow:
    """One row of scores to sample from: the token at `position` of the answer.

    prompt, answer: the token ids before it, for the penalties. allowed: bool [V], the tokens that a
    structure allows; None allows all.
    """

    sampling: Sampling
    seed: int
    position: int
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    allowed: Tensor | None = None


@dataclass
class SampledTokens:
    """The token of each row, and its log-probabilities.

    logprobs: under the model's own distribution. drawn_logprobs: under the one that it was drawn
    from (0 for greedy rows). top: the likeliest tokens. invalid: rows whose scores are not finite
    numbers; their other values mean nothing.
    """

    tokens: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    top: list[TopTokens]
    invalid: frozenset[int] = frozenset()


def sample(logits_RV: Tensor, rows: Sequence[SamplingRow], vocabulary: int) -> SampledTokens:
    """Choose a token for each row.

    Args:
        logits_RV: float32 [R, V]; overwritten.
        rows: how to sample each row.
        vocabulary: only ids below it are chosen; those from it on are padding.
    """
    normalizer_R = normalizers(logits_RV)
    logits_RV[:, vocabulary:] = -torch.inf
    changed = [r for r, row in enumerate(rows) if _changes_scores(row)]
    scores_RV = logits_RV.clone() if changed else logits_RV
    for r in changed:
        row = rows[r]
        penalize(scores_RV[r], row.sampling, row.prompt, row.answer)
        if row.allowed is not None:
            scores_RV[r].masked_fill_(~row.allowed, -torch.inf)
    totals_R = normalizers(scores_RV) if changed else normalizer_R
    tokens_R = likeliest(scores_RV)
    drawn_R = torch.zeros_like(normalizer_R)
    for cut in (False, True):
        sampled = []
        for r, row in enumerate(rows):
            if not row.sampling.greedy and row.sampling.cut == cut:
                sampled.append(r)
        if sampled:
            part_RV = scores_RV if len(sampled) == len(rows) else scores_RV[sampled]
            tokens, logprobs = _draw(part_RV, [rows[r] for r in sampled], cut)
            tokens_R[sampled], drawn_R[sampled] = tokens, logprobs.to(drawn_R)
    logprobs_R = logits_RV.gather(1, tokens_R[:, None]).squeeze(1) - normalizer_R
    top = top_tokens(logits_RV, normalizer_R, [row.sampling.top_logprobs for row in rows])
    # One transfer, since each waits for the device. A double holds every token id.
    columns = (tokens_R, logprobs_R, drawn_R, totals_R)
    tokens, logprobs, drawn, totals = torch.stack([x.double() for x in columns]).tolist()
    invalid = frozenset(r for r, total in enumerate(totals) if not isfinite(total))
    return SampledTokens([int(token) for token in tokens], logprobs, drawn, top, invalid)


def _changes_scores(row: SamplingRow) -> bool:
    sampling = row.sampling
    return sampling.penalised or bool(sampling.logit_bias) or row.allowed is not None


def penalize(
    scores_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> None:
    """Apply repetition penalty, then frequency and presence penalties, then biases, in place.

    The repetition penalty is that of transformers, for tokens of prompt and answer: it divides a
    positive score and multiplies a negative one. The other two are those of OpenAI's API, for
    tokens of the answer.
    """
    device = scores_V.device
    if sampling.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array([*prompt, *answer], np.int64))).to(device)
        scores = scores_V[seen]
        factor = sampling.repetition_penalty
        scores_V[seen] = torch.where(scores < 0, scores * factor, scores / factor)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        written, counts = np.unique(np.array(answer, np.int64), return_counts=True)
        off = sampling.presence_penalty + sampling.frequency_penalty * torch.from_numpy(counts)
        scores_V[torch.from_numpy(written).to(device)] -= off.to(scores_V)
    if sampling.logit_bias:
        ids, biases = (torch.tensor(x, device=device) for x in zip(*sampling.logit_bias))
        scores_V.index_add_(0, ids, biases.to(scores_V))  # not +=: an id can be there twice


def _draw(scores_RV: Tensor, rows: Sequence[SamplingRow], cut: bool) -> tuple[Tensor, Tensor]:
    """Draw the token of each row; returns tokens and their log-probabilities, each [R]."""
    device, samplings = scores_RV.device, [row.sampling for row in rows]
    temperature_R = _copied(torch.tensor([s.temperature for s in samplings]), device)
    uniform = draws([row.seed for row in rows], [row.position for row in rows])
    draws_R = _copied(torch.from_numpy(uniform), device)
    if cut:
        return _draw_candidates(scores_RV, temperature_R, samplings, draws_R, _CANDIDATES)
    return _draw_any(scores_RV, temperature_R, draws_R)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for what a GPU still computes."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def _draw_any(scores_RV: Tensor, temperature_R: Tensor, draws_R: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability exceeds the draw; its log-probability.

    The cumulative sum goes over blocks first, then within the block that holds the token.
    """
    peak_R, sums_RB = block_sums(scores_RV, temperature_R)
    ends_RB = sums_RB.double().cumsum(-1)
    total_R = ends_RB[:, -1]
    goal_R = _below(draws_R * total_R, total_R)
    block_R = _first_above(ends_RB, goal_R).squeeze(1)
    row_R = torch.arange(len(block_R), device=block_R.device)
    before_R = torch.where(block_R > 0, ends_RB[row_R, (block_R - 1).clamp(min=0)], 0.0)
    scores_Rb = scores_RV.unflatten(1, (sums_RB.shape[1], -1))[row_R, block_R]
    ends_Rb = ((scores_Rb - peak_R[:, None]) / temperature_R[:, None]).double().exp().cumsum(-1)
    rest_R = _below(goal_R - before_R, ends_Rb[:, -1])
    offset_R1 = _first_above(ends_Rb, rest_R)
    logprobs_R = (scores_Rb.gather(1, offset_R1).squeeze(1) - peak_R) / temperature_R
    return block_R * scores_Rb.shape[1] + offset_R1.squeeze(1), logprobs_R - total_R.log()


def _first_above(ends_RC: Tensor, goal_R: Tensor) -> Tensor:
    """The index of the first value above each row's goal, [R, 1]; the last one if a row is NaN."""
    index_R1 = torch.searchsorted(ends_RC, goal_R[:, None], right=True)
    return index_R1.clamp_(max=ends_RC.shape[1] - 1)


def _below(x: Tensor, bound: Tensor) -> Tensor:
    """x, or the largest number below `bound`: a draw must not land beyond the last token."""
    return torch.minimum(x, torch.nextafter(bound, torch.zeros_like(bound)))


def _draw_candidates(
    scores_RV: Tensor,
    temperature_R: Tensor,
    samplings: list[Sampling],
    draws_R: Tensor,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Cut to the likeliest tokens, then draw: tokens and their log-probabilities, each [R].

    The cuts are those of transformers: top_k, then top_p of what is left, then min_p. They look at
    the `candidates` likeliest tokens. Rows whose last candidate passes all cuts are sampled again
    from the whole vocabulary.
    """
    width, device = scores_RV.shape[1], scores_RV.device
    size = min(max(candidates, *(s.top_k + 1 for s in samplings)), width)
    values_RC, ids_RC = top_of(scores_RV, size)
    logprobs_RC = (
        values_RC / temperature_R[:, None] - normalizers(scores_RV, temperature_R)[:, None]
    )
    probs_RC = logprobs_RC.double().exp()
    columns = zip(*((s.top_k or width, s.top_p, s.min_p) for s in samplings))
    top_k, top_p, min_p = (_copied(torch.tensor(x), device)[:, None] for x in columns)
    keep_RC = torch.arange(size, device=device) < top_k
    left_R1 = torch.where(top_k < width, (probs_RC * keep_RC).sum(-1, keepdim=True), 1.0)
    before_RC = probs_RC.cumsum(-1) - probs_RC
    keep_RC &= (before_RC < top_p * left_R1) & (probs_RC >= min_p * probs_RC[:, :1])
    keep_RC[:, 0] = True
    # Drawn in the order of ids: similar scores then give similar samples, and a cut that removes
    # nothing gives the sample without a cut.
    order_RC = ids_RC.argsort(-1)
    ends_RC = (probs_RC * keep_RC).gather(1, order_RC).cumsum(-1)
    total_R = ends_RC[:, -1]
    goal_R = _below(draws_R * total_R, total_R)
    at_R1 = order_RC.gather(1, _first_above(ends_RC, goal_R))
    tokens_R = ids_RC.gather(1, at_R1).squeeze(1)
    logprobs_R = (probs_RC.gather(1, at_R1).squeeze(1) / total_R).log()
    again = keep_RC[:, -1].nonzero().squeeze(1)
    if size < width and len(again):
        rows = [samplings[r] for r in again.tolist()]
        part = scores_RV[again], temperature_R[again], rows, draws_R[again]
        tokens_R[again], logprobs_R[again] = _draw_candidates(*part, width)
    return tokens_R, logprobs_R


def likeliest(scores_RV: Tensor) -> Tensor:
    """argmax of each row; the first of equal ones. NumPy's, which is ten times as fast on a CPU."""
    if scores_RV.device.type == "cpu":
        return torch.from_numpy(scores_RV.numpy().argmax(-1))
    return scores_RV.argmax(-1)


def normalizers(scores_RV: Tensor, temperature_R: Tensor | None = None) -> Tensor:
    """log Σ exp(score / temperature) of each row, float32 [R]."""
    temperature_R = torch.ones_like(scores_RV[:, 0]) if temperature_R is None else temperature_R
    peak_R, sums_RB = block_sums(scores_RV, temperature_R)
    return peak_R / temperature_R + sums_RB.double().sum(-1).log().float()


def block_sums(scores_RV: Tensor, temperature_R: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest score [R], and Σ exp((score − largest) / temperature) of each block.

    The sums are [R, blocks]; both are float32. The C++ kernel writes nothing of the vocabulary's
    size.
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
    """The `count` largest scores of each row and their ids, largest first, each [R, count].

    They lie in the `count` blocks with the largest maxima, so only those are sorted.
    """
    width = scores_RV.shape[1]
    block = gcd(width, _BLOCK)
    if block < 32 or 4 * count > width // block:
        values_RC, ids_RC = scores_RV.topk(count, dim=-1)
        return values_RC, ids_RC
    blocks_RBb = scores_RV.unflatten(1, (-1, block))
    best_RC = blocks_RBb.amax(-1).topk(count, dim=-1).indices
    scores_RX = blocks_RBb.gather(1, best_RC[:, :, None].expand(-1, -1, block)).flatten(1)
    values_RC, at_RC = scores_RX.topk(count, dim=-1)
    return values_RC, best_RC.gather(1, at_RC // block) * block + at_RC % block


def top_tokens(logits_RV: Tensor, normalizer_R: Tensor, counts: Sequence[int]) -> list[TopTokens]:
    """The `counts` likeliest tokens of each row, under the model's own distribution."""
    top: list[TopTokens] = [[] for _ in counts]
    rows = [r for r, count in enumerate(counts) if count]
    if rows:
        values_RC, ids_RC = top_of(logits_RV[rows], min(max(counts), logits_RV.shape[1]))
        logprobs_RC = values_RC - normalizer_R[rows][:, None]
        for r, ids, logprobs in zip(rows, ids_RC.tolist(), logprobs_RC.tolist()):
            top[r] = list(zip(ids, logprobs))[: counts[r]]
    return top
