"""Dual Chunk Attention (An et al. 2024) with exact gradients and memory linear in the length.

A sequence is cut into chunks of s = chunk_len tokens. Keys are rotated by their position within
their chunk, so they do not depend on the query that reads them. A query is rotated three ways: for
keys of its own chunk (intra), of the chunk before (successive) and of all earlier chunks (inter).
Both paths below compute one softmax over all keys: `plain` runs everywhere, `fused` on the CPU and,
in half precision, on CUDA. Shapes: n queries, which are the last of m tokens whose keys are given,
H query heads, K key/value heads, G = H/K, d head width.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from openqwen.model.long_context import DualChunk

_aten = torch.ops.aten
_CPU_FLASH: Any = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_CPU_FLASH_BACKWARD: Any = getattr(
    _aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)

_ROWS = 256  # queries whose scores `plain` holds at once

# Rotated for keys of the own chunk, of the chunk before, of all earlier chunks; each [n, H, d].
Queries = tuple[Tensor, Tensor, Tensor]


def rotary_positions(positions_T: Tensor, dual: DualChunk) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE positions of keys and intra queries, successive queries, inter queries; each [T].

    This is the form of the released code (ChunkLlama, vLLM). The paper caps positions at
    c − 1, which is the same with chunk_size c − 1 and local_size w − 1.
    """
    within_T = positions_T % dual.chunk_len
    successive_T = (within_T + dual.chunk_len).clamp(max=dual.chunk_size)
    inter_T = torch.full_like(within_T, min(2 * dual.chunk_len - 1, dual.chunk_size))
    return within_T, successive_T, inter_T


def attend(queries: Queries, k_mKd: Tensor, v_mKd: Tensor, chunk_len: int) -> Tensor:
    """Causal attention of the last n of m tokens, [n, H, d]; scale 1/√d.

    The first key is at position 0 of the sequence.
    """
    path = fused if has_fused(k_mKd.device, k_mKd.dtype) else plain
    return path(queries, k_mKd, v_mKd, chunk_len)


def has_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `fused` runs on this device with queries and keys of this type."""
    if device.type == "cpu":
        return _CPU_FLASH is not None and _CPU_FLASH_BACKWARD is not None
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _flash(q_bHnd: Tensor, k_bKmd: Tensor, v_bKmd: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention of b rectangles: outputs [b, H, n, d] and log-sum-exps [b, H, n].

    cuDNN's kernel is faster on Hopper and later, PyTorch's (FlashAttention 2) before.
    """
    if q_bHnd.device.type == "cpu":
        out, lse = _CPU_FLASH(q_bHnd, k_bKmd, v_bKmd, 0.0, causal)
        return out, lse
    if _has_cudnn(q_bHnd.device):
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q_bHnd, k_bKmd, v_bKmd, None, True, 0.0, causal, False
        )
        return out, lse.squeeze(-1)
    q, k, v = (x.transpose(1, 2) for x in (q_bHnd, k_bKmd, v_bKmd))
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False
    )
    return out.transpose(1, 2), lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in the layout of `_flash`."""
    none = (None, None)
    if q.device.type == "cpu":
        dq, dk, dv = _CPU_FLASH_BACKWARD(grad, q, k, v, out, lse, 0.0, causal)
        return dq, dk, dv
    lengths = (q.shape[2], k.shape[2])
    if _has_cudnn(q.device):
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which is off
        rest = (lse.contiguous()[..., None], seed, seed, None, *none, *lengths, 0.0, causal)
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), *rest
        )
        return dq, dk, dv
    tensors = [x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out)]
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv, *_ = _aten._flash_attention_backward(
        *tensors, lse.contiguous(), *none, *lengths, 0.0, causal, seed, seed[:0]
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@cache
def _has_cudnn(device: torch.device) -> bool:
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return torch.backends.cudnn.is_available() and hopper


def plain(queries: Queries, k_mKd: Tensor, v_mKd: Tensor, chunk_len: int) -> Tensor:
    """See `attend`: dense scores of a few queries at a time, recomputed for the backward pass."""
    total = len(k_mKd)
    start = first = total - len(queries[0])
    outs = []
    while start < total:
        end = min(start + _ROWS, (start // chunk_len + 1) * chunk_len, total)
        some = [q_nHd[start - first : end - first] for q_nHd in queries]
        inputs = (*some, k_mKd[:end], v_mKd[:end], chunk_len)
        out = checkpoint(_dense, *inputs, use_reentrant=False, preserve_rng_state=False)
        outs.append(out)
        start = end
    return torch.cat(outs)


def _dense(
    intra_nHd: Tensor,
    successive_nHd: Tensor,
    inter_nHd: Tensor,
    k_mKd: Tensor,
    v_mKd: Tensor,
    s: int,
) -> Tensor:
    """Attention of the last n of m tokens, all in one chunk of `s` tokens: [n, H, d].

    Keys of earlier chunks meet inter queries, of the chunk before successive, of the own intra.
    """
    n, m, kv_heads = len(intra_nHd), len(k_mKd), k_mKd.shape[1]
    chunk = (m - 1) // s * s
    previous = max(chunk - s, 0)
    spans = ((inter_nHd, 0, previous), (successive_nHd, previous, chunk), (intra_nHd, chunk, m))
    scores = []
    for q_nHd, start, end in spans:
        q_KGnd = q_nHd.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        scores.append(q_KGnd @ k_mKd[start:end].permute(1, 2, 0)[:, None])
    s_KGnm = torch.cat(scores, dim=-1).to(_exact(k_mKd)) / math.sqrt(k_mKd.shape[-1])
    unseen_nm = torch.ones(n, m, dtype=torch.bool, device=k_mKd.device).triu(m - n + 1)
    p_KGnm = s_KGnm.masked_fill(unseen_nm, -math.inf).softmax(dim=-1).to(v_mKd.dtype)
    return (p_KGnm @ v_mKd.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)


def fused(queries: Queries, k_mKd: Tensor, v_mKd: Tensor, chunk_len: int) -> Tensor:
    """See `attend`: FlashAttention of each rectangle of the score matrix, merged exactly."""
    out_nHd: Tensor = _Fused.apply(*queries, k_mKd, v_mKd, chunk_len)
    return out_nHd


class _Part(NamedTuple):
    """Rectangles of the score matrix that share a rotation of the queries and are done in one call.

    They are `blocks` equal rectangles in a row down the diagonal.
    """

    rotation: int  # 0 intra, 1 successive, 2 inter
    rows: slice
    keys: slice
    blocks: int
    causal: bool

    def of_rows(self, x_nHd: Tensor) -> Tensor:
        """[n, H, …] → [blocks, H, rows of one, …], a view."""
        return x_nHd[self.rows].unflatten(0, (self.blocks, -1)).transpose(1, 2)

    def of_keys(self, x_mKd: Tensor) -> Tensor:
        """[m, K, d] → [blocks, K, keys of one, d], a view."""
        return x_mKd[self.keys].unflatten(0, (self.blocks, -1)).transpose(1, 2)


def _parts(new: int, total: int, s: int) -> Iterator[_Part]:
    """Cover every score of the last `new` of `total` tokens once, by chunks of s tokens.

    The causal parts come first; they cover every row, so later parts have something to merge with.
    """
    first = total - new
    # The rows fall into the rest of a chunk, complete chunks, and the start of a chunk. All
    # complete chunks are done in one call, as blocks.
    inner, last = min(-(-first // s) * s, total), max(total // s * s, first)
    groups = [(first, inner, 1), (inner, last, (last - inner) // s), (max(inner, last), total, 1)]
    groups = [(a, b, count) for a, b, count in groups if b > a]

    def part(rotation: int, row: int, end: int, key: int, key_end: int, count: int = 1) -> _Part:
        causal = rotation == 0 and row == key
        return _Part(rotation, slice(row - first, end - first), slice(key, key_end), count, causal)

    for a, b, count in groups:  # intra, the triangles on the diagonal
        yield part(0, a, b, a, b, count)
    if first % s:  # intra, keys of the first row's chunk that earlier calls gave
        yield part(0, first, inner, first // s * s, first)
    for a, b, count in groups:  # successive; the first chunk has no chunk before it
        start = max(a // s * s, s)
        if count > 1 and start < b:
            yield part(1, start, b, start - s, b - s, (b - start) // s)
        elif start <= a:
            yield part(1, a, b, start - s, start)
    for start in range(max(first // s, 2) * s, total, s):  # inter, from the third chunk on
        yield part(2, max(start, first), min(start + s, total), 0, start - s)


class _Fused(torch.autograd.Function):
    """The parts of `_parts`, merged into one softmax.

    Forward: each part gives an output and a log-sum-exp; two are merged by the weights exp(lse −
    common lse). Backward: each part's own backward, given the merged output and log-sum-exp instead
    of its own. exp(score − lse) is then the probability in the one softmax, so gradients are exact.
    """

    @staticmethod
    def forward(
        ctx: Any, intra: Tensor, successive: Tensor, inter: Tensor, k: Tensor, v: Tensor, s: int
    ) -> Tensor:
        queries = (intra, successive, inter)
        out_nHd = torch.empty_like(intra, dtype=_exact(intra))
        lse_nH = out_nHd.new_empty(intra.shape[:2])
        for part in _parts(len(intra), len(k), s):
            q = part.of_rows(queries[part.rotation])
            result = _flash(q, part.of_keys(k), part.of_keys(v), part.causal)
            more, more_lse = (x.transpose(1, 2).flatten(0, 1) for x in result)
            out, lse = out_nHd[part.rows], lse_nH[part.rows]
            if part.causal:
                out.copy_(more)
                lse.copy_(more_lse)
                continue
            both = torch.logaddexp(lse, more_lse)
            weight, more_weight = (lse - both).exp_(), (more_lse - both).exp_()
            out.mul_(weight[..., None]).addcmul_(more, more_weight[..., None])
            lse.copy_(both)
        out_nHd = out_nHd.to(intra.dtype)
        ctx.save_for_backward(*queries, k, v, out_nHd, lse_nH)
        ctx.chunk_len = s
        return out_nHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nHd: Tensor) -> tuple[Tensor | None, ...]:
        *queries, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=_exact(x)) for x in (*queries, k, v)]
        for part in _parts(len(out), len(k), ctx.chunk_len):
            rows = [part.of_rows(x) for x in (grad_nHd, queries[part.rotation], out, lse)]
            grad, q, part_out, part_lse = rows
            keys, values = part.of_keys(k), part.of_keys(v)
            parts = _flash_backward(grad, q, keys, values, part_out, part_lse, part.causal)
            totals = (grads[part.rotation], *grads[3:])
            for total, where, new in zip(totals, (part.rows, part.keys, part.keys), parts):
                total[where] += new.transpose(1, 2).flatten(0, 1)
        return *(g.to(k.dtype) for g in grads), None


def _exact(x: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 if the input is float64."""
    return torch.promote_types(x.dtype, torch.float32)
