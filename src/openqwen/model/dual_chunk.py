"""Dual Chunk Attention (An et al. 2024) that trains: one exact softmax, exact gradients, memory
linear in the length.

A sequence is cut into chunks of s = chunk_len tokens. Keys are turned by their position within
their chunk, so they never depend on who reads them; a query is turned three ways, for the keys of
its own chunk (intra), of the one before (successive) and of all earlier ones (inter). Both paths
below compute the one softmax over all keys: `plain` anywhere, `fused` on the CPU and, in half
precision, on CUDA. Shapes: n queries, the last of m tokens whose keys are given, H query heads, K
key/value heads, G = H/K, d head width.
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

Queries = tuple[
    Tensor, Tensor, Tensor
]  # turned for the own chunk, for the one before, for all earlier; each [n, H, d]


def rotary_positions(positions_T: Tensor, dual: DualChunk) -> tuple[Tensor, Tensor, Tensor]:
    """Where keys and intra queries, successive queries and inter queries stand for RoPE, each [T].

    The code form (qwen2-recipe facts, 4.3). The paper's, which caps at c − 1, is chunk_size c − 1,
    local_size w − 1.
    """
    within_T = positions_T % dual.chunk_len
    successive_T = (within_T + dual.chunk_len).clamp(max=dual.chunk_size)
    inter_T = torch.full_like(within_T, min(2 * dual.chunk_len - 1, dual.chunk_size))
    return within_T, successive_T, inter_T


def attend(queries: Queries, k_mKd: Tensor, v_mKd: Tensor, chunk_len: int) -> Tensor:
    """Causal attention of the last n of m tokens, [n, H, d]; scale 1/√d.

    The first key stands at position 0.
    """
    way = fused if has_fused(k_mKd.device, k_mKd.dtype) else plain
    return way(queries, k_mKd, v_mKd, chunk_len)


def has_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `fused` runs on this device with queries and keys of this type."""
    if device.type == "cpu":
        return _CPU_FLASH is not None and _CPU_FLASH_BACKWARD is not None
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _flash(q_bHnd: Tensor, k_bKmd: Tensor, v_bKmd: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention of b rectangles: the output [b, H, n, d] and the log-sum-exps [b, H, n].

    From Hopper on cuDNN's is the faster one, before it PyTorch's own (FlashAttention 2).
    """
    if q_bHnd.device.type == "cpu":
        out, lse = _CPU_FLASH(q_bHnd, k_bKmd, v_bKmd, 0.0, causal)
        return out, lse
    if _has_cudnn(q_bHnd.device):
        found = _aten._scaled_dot_product_cudnn_attention(
            q_bHnd, k_bKmd, v_bKmd, None, True, 0.0, causal, False
        )
        return found[0], found[1].squeeze(-1)
    q, k, v = (x.transpose(1, 2) for x in (q_bHnd, k_bKmd, v_bKmd))
    found = _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False
    )
    return found[0].transpose(1, 2), found[1]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in the layout of `_flash`."""
    none = (None, None)
    if q.device.type == "cpu":
        found = _CPU_FLASH_BACKWARD(grad, q, k, v, out, lse, 0.0, causal)
        return found[0], found[1], found[2]
    lengths = (q.shape[2], k.shape[2])
    if _has_cudnn(q.device):
        seed = torch.zeros(
            (), dtype=torch.int64, device=q.device
        )  # of dropout, which there is none
        rest = (lse.contiguous()[..., None], seed, seed, None, *none, *lengths, 0.0, causal)
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), *rest
        )
        return found[0], found[1], found[2]
    turned = [x.transpose(1, 2).contiguous() for x in (grad, q, k, v, out)]
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    found = _aten._flash_attention_backward(
        *turned, lse.contiguous(), *none, *lengths, 0.0, causal, seed, seed[:0]
    )
    return found[0].transpose(1, 2), found[1].transpose(1, 2), found[2].transpose(1, 2)


@cache
def _has_cudnn(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (
        9,
        0,
    )


def plain(queries: Queries, k_mKd: Tensor, v_mKd: Tensor, chunk_len: int) -> Tensor:
    """See `attend`: dense scores of a few queries at a time, recomputed for the backward pass."""
    total = len(k_mKd)
    start = first = total - len(queries[0])
    outs = []
    while start < total:
        end = min(start + _ROWS, (start // chunk_len + 1) * chunk_len, total)
        some = [q_nHd[start - first : end - first] for q_nHd in queries]
        outs.append(
            checkpoint(
                _dense,
                *some,
                k_mKd[:end],
                v_mKd[:end],
                chunk_len,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
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
    """Queries of one chunk (of `s` tokens), which end with the keys: [n, H, d]."""
    n, m, kv_heads = len(intra_nHd), len(k_mKd), k_mKd.shape[1]
    own = (m - 1) // s * s
    before = max(own - s, 0)
    scores = []
    for q_nHd, start, end in (
        (inter_nHd, 0, before),
        (successive_nHd, before, own),
        (intra_nHd, own, m),
    ):
        q_KGnd = q_nHd.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        scores.append(q_KGnd @ k_mKd[start:end].permute(1, 2, 0)[:, None])
    s_KGnm = torch.cat(scores, dim=-1).to(_exact(k_mKd)) / math.sqrt(k_mKd.shape[-1])
    unseen_nm = torch.ones(n, m, dtype=torch.bool, device=k_mKd.device).triu(m - n + 1)
    p_KGnm = s_KGnm.masked_fill(unseen_nm, -math.inf).softmax(dim=-1).to(v_mKd.dtype)
    return (p_KGnm @ v_mKd.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)


def fused(queries: Queries, k_mKd: Tensor, v_mKd: Tensor, chunk_len: int) -> Tensor:
    """See `attend`: PyTorch's FlashAttention on each rectangle of the score matrix, merged
    exactly.
    """
    out_nHd: Tensor = _Fused.apply(*queries, k_mKd, v_mKd, chunk_len)
    return out_nHd


class _Part(NamedTuple):
    """`blocks` equal rectangles of the score matrix, side by side down the diagonal, all for one
    turn of the query.
    """

    turn: int  # 0 intra, 1 successive, 2 inter
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
    """All that the last `new` of `total` tokens see, each score once; causal parts, which cover
    every row, first.
    """
    first = total - new
    inner, last = min(-(-first // s) * s, total), max(total // s * s, first)
    groups = [(first, inner, 1), (inner, last, (last - inner) // s), (max(inner, last), total, 1)]
    groups = [(a, b, count) for a, b, count in groups if b > a]

    def part(
        turn: int, row: int, end: int, key: int, key_end: int, count: int = 1, causal: bool = False
    ) -> _Part:
        return _Part(turn, slice(row - first, end - first), slice(key, key_end), count, causal)

    for a, b, count in groups:
        yield part(0, a, b, a, b, count, causal=True)
    if first % s:  # the own chunk's keys from earlier calls
        yield part(0, first, inner, first // s * s, first)
    for a, b, count in groups:
        own = max(a // s * s, s)
        if count > 1 and own < b:
            yield part(1, own, b, own - s, b - s, (b - own) // s)
        elif own <= a:
            yield part(1, a, b, own - s, own)
    for own in range(max(first // s, 2) * s, total, s):
        yield part(2, max(own, first), min(own + s, total), 0, own - s)


class _Fused(torch.autograd.Function):
    """Forward: the parts' outputs merged by their log-sum-exps. Backward: each part again, with the
    merged output and log-sum-exp in place of its own; exp(score − log-sum-exp) then is the true
    probability, so the gradient is exact."""

    @staticmethod
    def forward(
        ctx: Any, intra: Tensor, successive: Tensor, inter: Tensor, k: Tensor, v: Tensor, s: int
    ) -> Tensor:
        turned = (intra, successive, inter)
        out_nHd = torch.empty_like(intra, dtype=_exact(intra))
        lse_nH = out_nHd.new_empty(intra.shape[:2])
        for part in _parts(len(intra), len(k), s):
            found = _flash(
                part.of_rows(turned[part.turn]), part.of_keys(k), part.of_keys(v), part.causal
            )
            more, more_lse = (x.transpose(1, 2).flatten(0, 1) for x in found)
            out, lse = out_nHd[part.rows], lse_nH[part.rows]
            if part.causal:
                out.copy_(more)
                lse.copy_(more_lse)
                continue
            both = torch.logaddexp(lse, more_lse)
            out.mul_((lse - both).exp_()[..., None]).addcmul_(
                more, (more_lse - both).exp_()[..., None]
            )
            lse.copy_(both)
        out_nHd = out_nHd.to(intra.dtype)
        ctx.save_for_backward(*turned, k, v, out_nHd, lse_nH)
        ctx.chunk_len = s
        return out_nHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nHd: Tensor) -> tuple[Tensor | None, ...]:
        *turned, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=_exact(x)) for x in (*turned, k, v)]
        for part in _parts(len(out), len(k), ctx.chunk_len):
            q = turned[part.turn]
            inputs = (
                part.of_rows(q),
                part.of_keys(k),
                part.of_keys(v),
                part.of_rows(out),
                part.of_rows(lse),
            )
            found = _flash_backward(part.of_rows(grad_nHd), *inputs, part.causal)
            for total, where, new in zip(
                (grads[part.turn], *grads[3:]),
                (part.rows, part.keys, part.keys),
                found,
                strict=True,
            ):
                total[where] += new.transpose(1, 2).flatten(0, 1)
        return *(g.to(k.dtype) for g in grads), None


def _exact(x: Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 where the input is."""
    return torch.promote_types(x.dtype, torch.float32)
