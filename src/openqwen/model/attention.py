"""Which tokens a token attends to, and by which rotations: an argument of the forward call.

The network calls `rotation` once and then `attend` in every layer. `Packed` is for complete
documents laid end to end (training, scoring); `Paged` (paged.py) is for sequences whose earlier
keys and values are in a cache (generation). Shapes: T tokens, H query heads, K key/value heads, d
head width, B documents of one bucket, L their padded length.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.model import dual_chunk
from openqwen.model.config import ModelConfig
from openqwen.model.long_context import LongContext
from openqwen.model.rope import Rotation, rotate, rotation_of

HALF = (torch.bfloat16, torch.float16)
# For all sequences, or for each; None: as the model's configuration says.
LongContexts = LongContext | Sequence[LongContext | None] | None


class Attention(Protocol):
    """What the decoder needs of the sequences in a call."""

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """The rotations of queries and keys in one forward call of this model."""

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """Causal attention of every token within its sequence, [T, H, d]; scale 1/√d.

        q_THd, k_TKd: not rotated yet. layer: number of the layer, from 0.
        """


def sdpa(q_BLHd: Tensor, k_BLKd: Tensor, v_BLKd: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention of B padded sequences, [B, L, H, d]; causal if there is no mask."""
    out = F.scaled_dot_product_attention(
        q_BLHd.transpose(1, 2),
        k_BLKd.transpose(1, 2),
        v_BLKd.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BLHd.shape[2] != k_BLKd.shape[2],
    )
    return out.transpose(1, 2)


@cache
def packed_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """PyTorch's attention for packed sequences in half precision on CUDA; None elsewhere.

    It needs no padding. Its arguments are q [T, H, d], k and v [N, K, d], the bounds of the
    sequences among queries and among keys (int32 [B + 1] each), and the longest length of each. The
    last query of a sequence sees all of its keys.
    """
    if device.type != "cuda":
        return None
    # Imported here because it imports PyTorch's compiler, which takes more than a second.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # PyTorch 2.11 has no such option
        options["enable_gqa"] = True
    kernel: Callable[..., Any] = partial(varlen_attn, **options)
    return kernel


def divided(
    q_THd: Tensor, near_THd: Tensor, rotation: Rotation, rows: list[int]
) -> dict[int, dual_chunk.Queries]:
    """The three rotations of the queries of each sequence that is divided into chunks, by number.

    near_THd: the queries rotated for their own chunk.
    """
    queries: dict[int, dual_chunk.Queries] = {}
    if rotation.successive is None or rotation.inter is None:
        return queries
    split = (x.split(rows) for x in (near_THd, q_THd, *rotation.successive, *rotation.inter))
    for i, (near, q, *cos_sin) in enumerate(zip(*split)):
        if rotation.chunk_lens[i]:
            queries[i] = near, rotate(q, *cos_sin[:2]), rotate(q, *cos_sin[2:])
    return queries


def for_each(long_context: LongContexts, count: int) -> list[LongContext | None]:
    """The context of each of `count` sequences."""
    if long_context is None or isinstance(long_context, LongContext):
        return [long_context] * count
    if len(long_context) != count:
        raise ValueError(f"{len(long_context)} long contexts for {count} sequences")
    return list(long_context)


class _Buckets:
    """Documents of similar length in padded rectangles; documents in `apart` are left out.

    gathers: for each bucket the indices [B, L] of its rows; padding repeats a document's last row.
    order: [T], the place of each row's output when the outputs of all buckets and then those of the
    documents in `apart` are laid end to end.
    """

    WASTE = 1.25  # at most this ratio of a bucket's padded size to its real size

    def __init__(self, lengths: Sequence[int], apart: Sequence[int], device: torch.device):
        starts = [0, *accumulate(lengths)]
        order = torch.empty(starts[-1], dtype=torch.long)
        gathers = []
        by_length = sorted(set(range(len(lengths))) - set(apart), key=lambda i: lengths[i])
        done = 0
        bucket: list[int] = []
        real = 0
        for rank, i in enumerate(by_length):
            bucket.append(i)
            real += lengths[i]
            if rank + 1 < len(by_length):
                longer = lengths[by_length[rank + 1]]
                if longer * (len(bucket) + 1) <= self.WASTE * (real + longer):
                    continue  # the next document fits into this bucket
            width = lengths[i]
            steps = torch.arange(width)
            last = torch.tensor([lengths[j] for j in bucket])[:, None] - 1
            first = torch.tensor([starts[j] for j in bucket])[:, None]
            gathers.append((first + torch.minimum(steps, last)).to(device))
            for row, j in enumerate(bucket):
                order[starts[j] : starts[j + 1]] = torch.arange(lengths[j]) + done + row * width
            done += len(bucket) * width
            bucket, real = [], 0
        for j in apart:
            order[starts[j] : starts[j + 1]] = torch.arange(lengths[j]) + done
            done += lengths[j]
        self.gathers, self.order = gathers, order.to(device)


class Packed:
    """Documents laid end to end; each attends to itself alone and starts at position 0.

    Documents of similar length are gathered into padded buckets, with one fused causal call for
    each bucket. Padding is on the right, so causality hides it from every real token: no mask is
    needed, and the result is exact. Documents longer than a chunk of Dual Chunk Attention are read
    one by one. On a GPU in half precision one call of `packed_kernel` reads all documents.
    """

    def __init__(self, lengths: Sequence[int], long_context: LongContexts = None):
        if not lengths or min(lengths) < 1:
            raise ValueError("every document needs at least one token")
        self.lengths = list(lengths)
        self.total = sum(lengths)
        self._contexts = for_each(long_context, len(lengths))
        self._even = len(set(lengths)) == 1
        self._device = torch.device("cpu")
        self._layouts: dict[tuple[int, ...], _Buckets] = {}  # by the documents outside of buckets
        self._bounds: Tensor | None = None
        self._kernel: Callable[..., Tensor] | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], long_context: LongContexts = None) -> "Packed":
        """Documents of these numbers of tokens, in this order.

        long_context: how all or each of them are read; None: as the model's configuration says.
        """
        return cls(lengths, long_context)

    @property
    def positions(self) -> Tensor:
        """Each token's position in its document, [T]."""
        return torch.cat([torch.arange(n) for n in self.lengths])

    def to(self, device: torch.device | str) -> "Packed":
        """Move the indices to this device; returns self."""
        self._device = torch.device(device)
        self._layouts.clear()
        self._kernel = packed_kernel(self._device)
        bounds = [0, *accumulate(self.lengths)]
        self._bounds = torch.tensor(bounds, dtype=torch.int32, device=self._device)
        return self

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `Attention.rotation`."""
        return rotation_of(positions_T, config, self._contexts, self.lengths, self.lengths)

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """See `Attention.attend`."""
        near_THd = rotate(q_THd, *rotation.query)
        k_TKd = rotate(k_TKd, *rotation.key)
        if self._even and not rotation.chunk_lens:
            shape = (len(self.lengths), self.lengths[0])
            return sdpa(*(x.unflatten(0, shape) for x in (near_THd, k_TKd, v_TKd))).flatten(0, 1)
        if self._kernel and q_THd.dtype in HALF and not rotation.chunk_lens:
            bounds, longest = self._bounds, max(self.lengths)
            return self._kernel(near_THd, k_TKd, v_TKd, bounds, bounds, longest, longest)
        apart = tuple(i for i, chunk_len in enumerate(rotation.chunk_lens) if chunk_len)
        layout = self._layout(apart)
        outs = []
        for gather in layout.gathers:
            rows = gather.flatten()
            parts = (
                x.index_select(0, rows).unflatten(0, gather.shape) for x in (near_THd, k_TKd, v_TKd)
            )
            outs.append(sdpa(*parts).flatten(0, 1))
        if apart:
            queries = divided(q_THd, near_THd, rotation, self.lengths)
            ks, vs = k_TKd.split(self.lengths), v_TKd.split(self.lengths)
            for i in apart:
                chunk_len = rotation.chunk_lens[i]
                outs.append(dual_chunk.attend(queries[i], ks[i], vs[i], chunk_len))
        return torch.cat(outs).index_select(0, layout.order) if layout.gathers else torch.cat(outs)

    def _layout(self, apart: tuple[int, ...]) -> _Buckets:
        if apart not in self._layouts:
            # Not inference tensors, since a later call with the same layout may train.
            with torch.inference_mode(False):
                self._layouts[apart] = _Buckets(self.lengths, apart, self._device)
        return self._layouts[apart]
