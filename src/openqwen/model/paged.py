"""Attention of new tokens to a cache of pages: in plain PyTorch anywhere, in compiled C++ where it can be.

Shapes: T new tokens, H query heads, K key/value heads, d head width, B sequences, Q new tokens of a sequence, P pages
of a sequence, S slots of a page, L = P · S, m tokens of a sequence.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from openqwen.model import dual_chunk, kernels
from openqwen.model.attention import LongContexts, divided, for_each, sdpa
from openqwen.model.cache import STEP, Cache
from openqwen.model.config import ModelConfig
from openqwen.model.long_context import LongContext, Yarn
from openqwen.model.rope import Rotation, rotate, rotation_of


class Paged:
    """New tokens of several sequences, whose earlier keys and values lie in a cache, which takes the new ones.

    Sequence b owns the pages `tables_BP[b]` in order (padded with any page); it holds `totals[b]` tokens, the last
    `new[b]` of which are in this call, laid end to end in the order of the sequences. long_context: as in
    `Packed.from_lengths`. Where Dual Chunk Attention scales queries by the length and the context names none
    (`LongContext.tokens`), it is the sequence's total at this call, as in vLLM: generating token by token then differs
    from one pass over the whole.

    On the CPU, in float32, without gradients, one compiled call does all that a layer asks, and a token's result is
    the same to the bit whatever shares the call, however its sequence was cut into calls, on any number of threads.
    """

    def __init__(
        self,
        cache: Cache,
        tables_BP: Tensor,
        totals: Sequence[int],
        new: Sequence[int],
        long_context: LongContexts = None,
    ):
        self.cache, self._tables_BP = cache, tables_BP
        self._totals, self._new = list(totals), list(new)
        self._contexts = for_each(long_context, len(self._new))
        self._all = tuple(range(len(self._new)))
        self._grids: dict[tuple[int, ...], _Grid] = {}
        self._call: tuple[Rotation, _Call] | None = None

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `Attention.rotation`."""
        return rotation_of(positions_T, config, self._contexts, self._new, self._totals)

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int) -> Tensor:
        """See `Attention.attend`; the new keys and values enter the cache on the way."""
        kernel = _kernel(self.cache, rotation) if q_THd.dtype == torch.float32 and not q_THd.requires_grad else None
        if kernel is None:
            return self._plain(q_THd, k_TKd, v_TKd, rotation, layer)
        kernels.follow_torch()
        if self._call is None or self._call[0] is not rotation:
            yarns = [self._context(i).yarn for i in self._all]
            sizes = (torch.tensor(self._totals), torch.tensor(self._new))
            self._call = rotation, _Call(self.cache, self._tables_BP, sizes, rotation, yarns)
        inputs = [x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THd, k_TKd, v_TKd)]
        out_THd = torch.empty(q_THd.shape)
        places = (n for x in inputs for n in (x.data_ptr(), x.stride(0)))
        kernel(self._call[1].address, layer, *places, out_THd.data_ptr())
        return out_THd

    def _context(self, sequence: int) -> LongContext:
        return self._contexts[sequence] or self.cache.config.long_context

    def _plain(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int) -> Tensor:
        near_THd = rotate(q_THd, *rotation.query)
        if self.cache.key_bias_NKd is not None:
            k_TKd = k_TKd - self.cache.key_bias_NKd[layer].to(k_TKd.dtype)
        self.cache.write(layer, self._places.written_T, rotate(k_TKd, *rotation.key), v_TKd)
        if not rotation.chunk_lens:
            return self._masked(near_THd, layer, self._all)
        outs = list(near_THd.split(self._new))
        for i, queries in divided(q_THd, near_THd, rotation, self._new).items():
            k_BLKd, v_BLKd = self._read(
                layer, self._tables_BP[i : i + 1, : self._pages(i)], [i], rotation.chunk_lens[i]
            )
            k_mKd, v_mKd = k_BLKd[0, : self._totals[i]], v_BLKd[0, : self._totals[i]]
            outs[i] = dual_chunk.attend(queries, k_mKd, v_mKd, rotation.chunk_lens[i])
        if short := tuple(i for i in self._all if not rotation.chunk_lens[i]):
            found = self._masked(near_THd, layer, short).split([self._new[i] for i in short])
            for i, out in zip(short, found, strict=True):
                outs[i] = out
        return torch.cat(outs)

    def _read(self, layer: int, tables_BP: Tensor, sequences: Sequence[int], chunk_len: int) -> tuple[Tensor, Tensor]:
        """Keys and values of these sequences, the keys' bias in its place; each [B, L, K, d]."""
        k_BLKd, v_BLKd = self.cache.read(layer, tables_BP)
        if self.cache.key_bias_NKd is not None:
            at_L = torch.arange(k_BLKd.shape[1], device=self.cache.device)
            at_L = at_L % chunk_len if chunk_len else at_L
            biases = [self.cache.turned_bias(layer, self._context(i).yarn, at_L) for i in sequences]
            k_BLKd = k_BLKd + torch.stack(biases)
        return k_BLKd, v_BLKd

    def _masked(self, q_THd: Tensor, layer: int, chosen: tuple[int, ...]) -> Tensor:
        """The chosen sequences in one padded call; a mask says who sees whom."""
        if chosen not in self._grids:
            self._grids[chosen] = self._grid(list(chosen))
        rows_BQ, real_BQ, tables_BP, mask_B1QL = self._grids[chosen]
        k_BLKd, v_BLKd = self._read(layer, tables_BP, chosen, 0)
        return sdpa(q_THd[rows_BQ], k_BLKd, v_BLKd, mask_B1QL)[real_BQ]

    @cached_property
    def _places(self) -> "_Places":
        device, size = self.cache.device, self.cache.page_size
        totals_B1 = torch.tensor(self._totals, device=device)[:, None]
        new_B1 = torch.tensor(self._new, device=device)[:, None]
        # Query j of a sequence stands at position total − new + j and sees the keys up to itself.
        steps_1Q = torch.arange(max(self._new), device=device)[None]
        real_BQ = steps_1Q < new_B1
        at_BQ = torch.minimum(totals_B1 - new_B1 + steps_1Q, totals_B1 - 1)
        written_T = (self._tables_BP.gather(1, at_BQ // size) * size + at_BQ % size)[real_BQ]
        return _Places(new_B1.cumsum(0) - new_B1 + torch.minimum(steps_1Q, new_B1 - 1), real_BQ, at_BQ, written_T)

    def _grid(self, chosen: list[int]) -> "_Grid":
        tables_BP = self._tables_BP[chosen, : max(self._pages(i) for i in chosen)]
        rows_BQ, real_BQ, at_BQ = (x[chosen, : max(self._new[i] for i in chosen)] for x in self._places[:3])
        keys_L = torch.arange(tables_BP.shape[1] * self.cache.page_size, device=self.cache.device)
        return _Grid(rows_BQ, real_BQ, tables_BP, (keys_L <= at_BQ[:, :, None])[:, None])

    def _pages(self, sequence: int) -> int:
        return -(-self._totals[sequence] // self.cache.page_size)


class _Places(NamedTuple):
    """Of the new tokens: their rows in the call, which are real, their positions; and the slots they are written to."""

    rows_BQ: Tensor
    real_BQ: Tensor
    at_BQ: Tensor
    written_T: Tensor


class _Grid(NamedTuple):
    """Rows of the queries, which of them are real, pages, and who sees whom."""

    rows_BQ: Tensor
    real_BQ: Tensor
    tables_BP: Tensor
    mask_B1QL: Tensor


def has_kernel(cache: Cache) -> bool:
    """Whether the compiled attention reads this cache."""
    suits = cache.device.type == "cpu" and cache.dtype == torch.float32
    return suits and cache.page_size % STEP == 0 and cache.config.head_dim % STEP == 0 and _function() is not None


def _kernel(cache: Cache, rotation: Rotation) -> Callable[..., None] | None:
    whole = all(n % STEP == 0 for n in rotation.chunk_lens)
    return _function() if whole and has_kernel(cache) else None


def _function() -> Callable[..., None] | None:
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    return kernels.function("openqwen_paged_attention", pointer, size, *(pointer, size) * 3, pointer)


class _Fields(ctypes.Structure):
    """`PagedCall` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "width", "slots", "pages", "sequences", "rows")),
        ("table_width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tables", "totals", "counts", "chunk_lens")),
        ("turns", ctypes.c_void_p * 8),  # cos and sin of keys, then of queries: own chunk, the one before, all earlier
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("key_bias", "bias_bases", "bias_steps")),
    ]


class _Call:
    """What a forward call tells the compiled attention once for all layers; keeps alive what it points to."""

    def __init__(
        self,
        cache: Cache,
        tables_BP: Tensor,
        totals_and_new: tuple[Tensor, Tensor],
        rotation: Rotation,
        yarns: Sequence[Yarn | None],
    ):
        config, new_B = cache.config, totals_and_new[1]
        chunk_lens_B = torch.tensor(rotation.chunk_lens) if rotation.chunk_lens else None
        turns = [*rotation.key, *rotation.query, *(rotation.successive or ()), *(rotation.inter or ())]
        turns = [x.contiguous() for x in turns]
        tables_BP = tables_BP.to("cpu", torch.int64).contiguous()
        biased = cache.key_bias_NKd is not None
        bias_turns = [cache.bias_turns(yarn, int(totals_and_new[0].max())) for yarn in yarns] if biased else []
        addresses = [torch.tensor([x.data_ptr() for x in column]) for column in zip(*bias_turns)]
        self._kept = (chunk_lens_B, turns, tables_BP, totals_and_new, bias_turns, addresses)
        self._fields = _Fields(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            cache.page_size,
            cache.pages,
            len(new_B),
            int(new_B.sum()),
            tables_BP.shape[1],
            *map(_address, (tables_BP, *totals_and_new, chunk_lens_B)),
            (ctypes.c_void_p * 8)(*map(_address, turns)),
            *map(_address, (cache.keys, cache.values, cache.key_scales, cache.value_scales)),
            *map(_address, (cache.key_bias_NKd, *(addresses or (None, None)))),
        )
        self.address = ctypes.addressof(self._fields)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
