"""Attention of one new token per sequence to a paged cache, in Triton (FlashDecoding, Dao 2023).

The keys of a sequence are cut into splits that run in parallel. Each gives an output and a
log-sum-exp, and `paged_decode` merges them. Shapes: B sequences, H query heads, K key/value heads,
G = H / K, d head width, P pages of a sequence, S slots of a page.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openqwen.model.fused import fused

_SPLITS = 16  # of a sequence, so that one request alone can use the whole GPU


@triton.jit
def _decode(
    q,
    keys,
    values,
    tables,
    totals,
    out,
    lse,
    scale,
    pages,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    b, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    total = tl.load(totals + b)
    share = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK  # keys of a split
    first = split * share
    end = tl.minimum(first + share, total)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    j = tl.arange(0, BLOCK)
    real = (g < G)[:, None]
    query = tl.load(q + ((b * K + head) * G + g)[:, None] * D + d[None, :], mask=real, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, BLOCK):
        at = start + j
        seen = at < end
        page = tl.load(tables + b * pages + at // S, mask=seen, other=0)
        slot = at % S
        base = (page * K + head) * D * S
        k = tl.load(
            keys + base[None, :] + d[:, None] * S + slot[None, :], mask=seen[None, :], other=0.0
        )
        v = tl.load(
            values + base[:, None] + slot[:, None] * D + d[None, :], mask=seen[:, None], other=0.0
        )
        scores = tl.dot(query, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        kept = tl.exp(top - higher)
        weight = weight * kept + tl.sum(p, 1)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    # A split beyond the sequence's end has no keys. Its log-sum-exp is −inf, so its weight in the
    # merge is 0.
    empty = first >= end
    acc = acc / tl.where(empty, 1.0, weight)[:, None]
    row = ((b * K + head) * G + g) * SPLITS + split
    tl.store(out + row[:, None] * D + d[None, :], acc, mask=real)
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(weight)), mask=g < G)


def paged_decode(
    q_BHd: Tensor, keys: Tensor, values: Tensor, tables_BP: Tensor, totals_B: Tensor
) -> Tensor:
    """Attention of each query to all keys of its sequence, [B, H, d]; scale 1/√d.

    It never waits for the GPU.

    Args:
        q_BHd: queries, rotated.
        keys: of a layer as in `Cache`, [pages, K, d, S].
        values: [pages, K, S, d].
        tables_BP: int64, the pages of each sequence in order.
        totals_B: int64, keys of each sequence, at least 1.
    """
    batch, heads, width = q_BHd.shape
    kv_heads, size = values.shape[1:3]
    out = q_BHd.new_empty((batch, heads, _SPLITS, width), dtype=torch.float32)
    lse = q_BHd.new_empty((batch, heads, _SPLITS), dtype=torch.float32)
    _decode[(batch, kv_heads, _SPLITS)](
        q_BHd.contiguous(),
        keys,
        values,
        tables_BP,
        totals_B,
        out,
        lse,
        width**-0.5,
        tables_BP.shape[1],
        K=kv_heads,
        G=heads // kv_heads,
        D=width,
        S=size,
        SPLITS=_SPLITS,
        BLOCK=64,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
    )
    return _merge(out, lse, q_BHd.dtype)


@triton.jit
def _write(
    k,
    v,
    cos,
    sin,
    keys,
    values,
    pages,
    slots,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
):
    b, head = tl.program_id(0), tl.program_id(1)
    f = tl.arange(0, D // 2)
    page, slot = tl.load(pages + b), tl.load(slots + b)
    source = (b * K + head) * D
    c, s = tl.load(cos + b * (D // 2) + f), tl.load(sin + b * (D // 2) + f)
    first = tl.load(k + source + f).to(tl.float32)
    second = tl.load(k + source + D // 2 + f).to(tl.float32)
    target = (page * K + head) * D * S
    tl.store(keys + target + f * S + slot, first * c - second * s)
    tl.store(keys + target + (D // 2 + f) * S + slot, second * c + first * s)
    d = tl.arange(0, D)
    tl.store(values + target + slot * D + d, tl.load(v + source + d))


def paged_write(
    k_BKd: Tensor,
    v_BKd: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    places: tuple[Tensor, Tensor],
) -> None:
    """Rotate one new key of each sequence, and write it and its value into their pages.

    Args:
        k_BKd: keys, not rotated.
        v_BKd: values.
        rotation: cos and sin of each key's angles, float32 [B, 1, d/2].
        keys: of a layer as in `Cache`, [pages, K, d, S].
        values: [pages, K, S, d].
        places: the page of each sequence's new token and its slot there, int64 [B].
    """
    batch, kv_heads, width = k_BKd.shape
    _write[(batch, kv_heads)](
        k_BKd.contiguous(),
        v_BKd.contiguous(),
        *(x.contiguous() for x in rotation),
        keys,
        values,
        *places,
        K=kv_heads,
        D=width,
        S=values.shape[2],
        num_warps=1,
    )


@fused
def _merge(out_BHSd: Tensor, lse_BHS: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention to all splits, [B, H, d], from the attention to each and its log-sum-exp."""
    return (out_BHSd * lse_BHS.softmax(-1)[..., None]).sum(2).to(dtype)
