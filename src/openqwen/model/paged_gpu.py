"""Attention to a paged cache on a GPU: FlashAttention for prompts, a Triton kernel for decoding.

`GpuPaged` is for calls with any mixture of both. `PagedDecode` is for calls in which every sequence
has one new token; all its inputs are on the GPU, so a CUDA graph can record the call. Shapes as in
paged.py; N keys of all sequences with several new tokens, laid end to end.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from openqwen.model.attention import HALF, packed_kernel
from openqwen.model.cache import Cache
from openqwen.model.config import ModelConfig
from openqwen.model.long_context import LongContext
from openqwen.model.rope import Rotation, rotate, rotation_of


@cache
def triton_kernels() -> ModuleType | None:
    """The module paged_triton; None where Triton is not installed."""
    try:
        return importlib.import_module("openqwen.model.paged_triton")
    except ImportError:
        return None


def suits(store: Cache) -> bool:
    """Whether these paths can read this cache: half precision on CUDA, not int8."""
    width = store.config.head_dim
    if store.format != "float" or store.device.type != "cuda" or width & (width - 1):
        return False
    return store.dtype in HALF and triton_kernels() is not None


class GpuPaged:
    """The indices of one call, computed once for all layers.

    Arguments as in `Paged`. Sequences with one new token go to the decoding kernel, the others to
    `packed_kernel`, which reads copies of their keys and values.
    """

    def __init__(self, store: Cache, tables_BP: Tensor, totals: Sequence[int], new: Sequence[int]):
        device, size = store.device, store.page_size
        self._cache = store
        ends = [0, *accumulate(new)]
        decoding = [i for i, count in enumerate(new) if count == 1]
        prefilling = [i for i, count in enumerate(new) if count > 1]
        self._decode_rows = torch.tensor([ends[i] for i in decoding], device=device)
        self._tables_BP = tables_BP[decoding].contiguous()
        self._totals_B = torch.tensor([totals[i] for i in decoding], device=device)
        rows = [torch.arange(ends[i], ends[i + 1]) for i in prefilling]
        self._prefill_rows = torch.cat(rows).to(device) if rows else None
        self._lengths = [_bounds([x[i] for i in prefilling], device) for x in (new, totals)]
        self._longest = [max((x[i] for i in prefilling), default=0) for x in (new, totals)]
        keys_N = [torch.arange(totals[i], device=device) for i in prefilling]
        pages_N = [tables_BP[i][at // size] for i, at in zip(prefilling, keys_N, strict=True)]
        self._pages_N = torch.cat(pages_N) if prefilling else None
        self._slots_N = torch.cat(keys_N) % size if prefilling else None

    def attend(self, q_THd: Tensor, layer: int) -> Tensor:
        """Attention of rotated queries to the cache, which has their keys already, [T, H, d]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out_THd = torch.empty_like(q_THd)
        if len(self._decode_rows):
            kernels = triton_kernels()
            assert kernels is not None
            inputs = q_THd[self._decode_rows], keys, values, self._tables_BP, self._totals_B
            out_THd[self._decode_rows] = kernels.paged_decode(*inputs)
        if self._prefill_rows is not None:
            kernel = packed_kernel(q_THd.device)
            assert kernel is not None
            k_NKd = keys[self._pages_N, :, :, self._slots_N]
            v_NKd = values[self._pages_N, :, self._slots_N]
            q = q_THd[self._prefill_rows]
            out_THd[self._prefill_rows] = kernel(q, k_NKd, v_NKd, *self._lengths, *self._longest)
        return out_THd


class PagedDecode:
    """One new token of each of B sequences. totals_B: int64, tokens of each with the new one."""

    def __init__(
        self, store: Cache, tables_BP: Tensor, totals_B: Tensor, context: LongContext | None
    ):
        self._cache, self._tables_BP, self._totals_B = store, tables_BP, totals_B
        self._context = context
        at_B, size = totals_B - 1, store.page_size
        self._places = tables_BP.gather(1, (at_B // size)[:, None]).squeeze(1), at_B % size

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `Attention.rotation`."""
        return rotation_of(positions_T, config, [self._context], [len(positions_T)], [1])

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """See `Attention.attend`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        kernels = triton_kernels()
        assert kernels is not None
        kernels.paged_write(k_TKd, v_TKd, rotation.key, keys, values, self._places)
        query = rotate(q_THd, *rotation.query)
        out_THd: Tensor = kernels.paged_decode(query, keys, values, self._tables_BP, self._totals_B)
        return out_THd


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The starts of sequences laid end to end, and the end of the last one, int32 [B + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
