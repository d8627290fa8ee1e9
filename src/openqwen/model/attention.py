"""Who sees whom. The network asks one question, `attend`; the answer is an argument of the forward call.

`Packed` lays whole documents end to end (training, scoring); `Paged` continues sequences whose earlier keys and
values lie in a cache (generation). Shapes: T tokens, H query heads, K key/value heads, d head width, B documents
of one bucket, L their padded length, Q new tokens of a sequence, N layers, S slots of a page.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """What the decoder needs to know of its sequences."""

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layer: int) -> Tensor:
        """Causal attention of every token to what it may see, [T, H, d]; scale 1/√d."""
        ...


def _sdpa(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention of B padded sequences; causal unless a mask says who is seen. Returns [B, L, H, d]."""
    out = F.scaled_dot_product_attention(
        q_BLHd.transpose(1, 2),
        k_BLKd.transpose(1, 2),
        v_BLKd.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BLHd.shape[2] != k_BLKd.shape[2],
    )
    return out.transpose(1, 2)


class Packed:
    """Documents laid end to end, each blind to the others.

    Documents of like length are gathered into padded buckets, one fused causal call a bucket. Padding stands on the
    right, so causality hides it from every real token: no mask is needed and the result is exact.
    """

    WASTE = 1.25  # a bucket's padded size over its real size, at most

    def __init__(self, lengths: Sequence[int]):
        if not lengths or min(lengths) < 1:
            raise ValueError("every document needs at least one token")
        self.lengths = list(lengths)
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        self.total = starts[-1]
        self._even = len(set(lengths)) == 1
        self._gathers: list[Tensor] = []  # [B, L] indices into T, padding repeats the document's last token
        self._order = torch.empty(0, dtype=torch.long)  # [T]: where each token's output lies, buckets laid end to end
        if not self._even:
            self._fill_buckets(starts)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> "Packed":
        """Documents of these token counts, in this order."""
        return cls(lengths)

    @property
    def positions(self) -> Tensor:
        """0, 1, 2 … within each document, [T]."""
        return torch.cat([torch.arange(n) for n in self.lengths])

    def _fill_buckets(self, starts: list[int]) -> None:
        by_length = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i])
        self._order = torch.empty(self.total, dtype=torch.long)
        done = 0
        bucket: list[int] = []
        real = 0
        for rank, i in enumerate(by_length):
            bucket.append(i)
            real += self.lengths[i]
            follower = self.lengths[by_length[rank + 1]] if rank + 1 < len(by_length) else None
            if follower is not None and follower * (len(bucket) + 1) <= self.WASTE * (real + follower):
                continue
            width = self.lengths[i]
            steps = torch.arange(width)
            last = torch.tensor([self.lengths[j] for j in bucket])[:, None] - 1
            first = torch.tensor([starts[j] for j in bucket])[:, None]
            self._gathers.append(first + torch.minimum(steps, last))
            for row, j in enumerate(bucket):
                n = self.lengths[j]
                self._order[starts[j] : starts[j] + n] = torch.arange(n) + done + row * width
            done += len(bucket) * width
            bucket, real = [], 0

    def to(self, device: torch.device | str) -> "Packed":
        """Move the indices; returns self."""
        self._gathers = [g.to(device) for g in self._gathers]
        self._order = self._order.to(device)
        return self

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layer: int) -> Tensor:
        """See `Attention.attend`."""
        if self._even:
            shape = (len(self.lengths), self.lengths[0])
            return _sdpa(*(x.unflatten(0, shape) for x in (q_THd, k_TKd, v_TKd))).flatten(0, 1)
        outs = []
        for gather in self._gathers:
            rows = gather.flatten()
            parts = (x.index_select(0, rows).unflatten(0, gather.shape) for x in (q_THd, k_TKd, v_TKd))
            outs.append(_sdpa(*parts).flatten(0, 1))
        return torch.cat(outs).index_select(0, self._order)


class Paged:
    """New tokens of several sequences, whose earlier keys and values lie in a cache of pages.

    cache: [2, N, pages, page size, K, d], keys then values, written in place. Sequence b owns the pages `tables_BP[b]`
    in order (padded with any page); it holds `totals[b]` tokens, the last `new[b]` of which are in this call, laid end
    to end in the order of the sequences.
    """

    def __init__(self, cache: Tensor, tables_BP: Tensor, totals: Sequence[int], new: Sequence[int]):
        device = cache.device
        self.cache = cache
        size = cache.shape[3]
        totals_B1 = torch.tensor(totals, device=device)[:, None]
        new_B1 = torch.tensor(new, device=device)[:, None]
        # Query j of a sequence stands at position total − new + j and sees the keys up to itself.
        steps_1Q = torch.arange(max(new), device=device)[None]
        self._real_BQ = steps_1Q < new_B1
        at_BQ = torch.minimum(totals_B1 - new_B1 + steps_1Q, totals_B1 - 1)
        self._written_T = (tables_BP.gather(1, at_BQ // size) * size + at_BQ % size)[self._real_BQ]
        self._rows_BQ = new_B1.cumsum(0) - new_B1 + torch.minimum(steps_1Q, new_B1 - 1)
        self._tables_BP = tables_BP[:, : -(-max(totals) // size)]
        keys_L = torch.arange(self._tables_BP.shape[1] * size, device=device)
        self._mask_B1QL = (keys_L <= at_BQ[:, :, None])[:, None]

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layer: int) -> Tensor:
        """See `Attention.attend`; the new keys and values enter the cache on the way."""
        pages_PSKd, values_PSKd = self.cache[0, layer], self.cache[1, layer]
        pages_PSKd.flatten(0, 1)[self._written_T] = k_TKd
        values_PSKd.flatten(0, 1)[self._written_T] = v_TKd
        k_BLKd = pages_PSKd[self._tables_BP].flatten(1, 2)
        v_BLKd = values_PSKd[self._tables_BP].flatten(1, 2)
        return _sdpa(q_THd[self._rows_BQ], k_BLKd, v_BLKd, self._mask_B1QL)[self._real_BQ]
