"""Attention of new tokens to a cache of pages: in plain PyTorch anywhere, in compiled C++ where it
can be.

Shapes: T new tokens, H query heads, K key/value heads, d head width, B sequences, Q new tokens of a
sequence, P pages of a sequence, S slots of a page, L = P · S, m tokens of a sequence.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from openqwen.model import dual_chunk, kernels
from openqwen.model.attention import LongContexts, divided, for_each, sdpa
from openqwen.model.cache import STEP, Cache
from openqwen.model.config import ModelConfig
from openqwen.model.paged_gpu import GpuPaged, suits
from openqwen.model.rope import Rotation, rotate, rotation_of


class Paged:
    """New tokens of several sequences, whose earlier keys and values lie in a cache, which takes
    the new ones.

    Sequence b owns the pages `tables_BP[b]` in order (padded with any page); it holds `totals[b]`
    tokens, the last `new[b]` of which are in this call, laid end to end in the order of the
    sequences. long_context: as in `Packed.from_lengths`. Where Dual Chunk Attention scales queries
    by the length and the context names none (`LongContext.tokens`), it is the sequence's total at
    this call, as in vLLM: generating token by token then differs from one pass over the whole.

    On the CPU, in float32, without gradients, one compiled call does all that a layer asks, and a
    token's result is the same to the bit whatever shares the call, however its sequence was cut
    into calls, on any number of threads.
    """

    def __init__(
        self,
        cache: Cache,
        tables_BP: Tensor,
        totals: Sequence[int],
        new: Sequence[int],
        long_context: LongContexts = None,
    ):
        self.cache, self.tables_BP = cache, tables_BP
        self.totals, self.new = list(totals), list(new)
        self.contexts = [
            c or cache.config.long_context for c in for_each(long_context, len(self.new))
        ]
        self._kernel = _kernel() if has_kernel(cache) else None
        self._all = tuple(range(len(self.new)))
        self._grids: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._call: tuple[Rotation, _Call] | None = None

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `Attention.rotation`."""
        return rotation_of(positions_T, config, self.contexts, self.new, self.totals)

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """See `Attention.attend`; the new keys and values enter the cache on the way."""
        suits = q_THd.dtype == torch.float32 and not q_THd.requires_grad
        call = self.compiled(rotation, len(q_THd)) if suits else None
        if not self._kernel or call is None:
            return self._plain(q_THd, k_TKd, v_TKd, rotation, layer)
        inputs = [
            x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
            for x in (q_THd, k_TKd, v_TKd)
        ]
        out_THd = torch.empty(q_THd.shape)
        places = (n for x in inputs for n in (x.data_ptr(), x.stride(0)))
        self._kernel(call, layer, *places, out_THd.data_ptr())
        return out_THd

    def compiled(self, rotation: Rotation, rows: int) -> int | None:
        """Where `PagedCall` of native/layers.h lies for this call of so many rows; None where only
        PyTorch can.
        """
        if not self._kernel or any(n % STEP for n in rotation.chunk_lens):
            return None
        if self._call is None or self._call[0] is not rotation:
            kernels.follow_torch()
            self._call = rotation, _Call(self, rotation, rows)
        return self._call[1].address

    def _plain(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        near_THd = rotate(q_THd, *rotation.query)
        if self.cache.key_bias_NKd is not None:
            k_TKd = k_TKd - self.cache.key_bias_NKd[layer].to(k_TKd.dtype)
        self.cache.write(layer, self._places[3], rotate(k_TKd, *rotation.key), v_TKd)
        if not rotation.chunk_lens:
            if self._gpu is not None and near_THd.dtype == self.cache.dtype:
                return self._gpu.attend(near_THd, layer)
            return self._masked(near_THd, layer, self._all)
        outs = list(near_THd.split(self.new))
        for i, queries in divided(q_THd, near_THd, rotation, self.new).items():
            k_BLKd, v_BLKd = self._read(
                layer, self.tables_BP[i : i + 1, : self._pages(i)], [i], rotation.chunk_lens[i]
            )
            k_mKd, v_mKd = k_BLKd[0, : self.totals[i]], v_BLKd[0, : self.totals[i]]
            outs[i] = dual_chunk.attend(queries, k_mKd, v_mKd, rotation.chunk_lens[i])
        if short := tuple(i for i in self._all if not rotation.chunk_lens[i]):
            found = self._masked(near_THd, layer, short).split([self.new[i] for i in short])
            for i, out in zip(short, found, strict=True):
                outs[i] = out
        return torch.cat(outs)

    def _read(
        self, layer: int, tables_BP: Tensor, sequences: Sequence[int], chunk_len: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of these sequences, the keys' bias in its place; each [B, L, K, d]."""
        k_BLKd, v_BLKd = self.cache.read(layer, tables_BP)
        if self.cache.key_bias_NKd is not None:
            at_L = torch.arange(k_BLKd.shape[1], device=self.cache.device)
            at_L = at_L % chunk_len if chunk_len else at_L
            biases = [self.cache.turned_bias(layer, self.contexts[i].yarn, at_L) for i in sequences]
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
    def _gpu(self) -> GpuPaged | None:
        if not suits(self.cache):
            return None
        return GpuPaged(self.cache, self.tables_BP, self.totals, self.new)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the new tokens the rows in the call, which are real, the positions; and the slots they
        are written to.
        """
        device, size = self.cache.device, self.cache.page_size
        totals_B1 = torch.tensor(self.totals, device=device)[:, None]
        new_B1 = torch.tensor(self.new, device=device)[:, None]
        # Query j of a sequence stands at position total − new + j and sees the keys up to itself.
        steps_1Q = torch.arange(max(self.new), device=device)[None]
        real_BQ = steps_1Q < new_B1
        at_BQ = torch.minimum(totals_B1 - new_B1 + steps_1Q, totals_B1 - 1)
        written_T = (self.tables_BP.gather(1, at_BQ // size) * size + at_BQ % size)[real_BQ]
        return (
            new_B1.cumsum(0) - new_B1 + torch.minimum(steps_1Q, new_B1 - 1),
            real_BQ,
            at_BQ,
            written_T,
        )

    def _grid(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of the queries, which of them are real, pages, and who sees whom."""
        tables_BP = self.tables_BP[chosen, : max(self._pages(i) for i in chosen)]
        rows_BQ, real_BQ, at_BQ = (
            x[chosen, : max(self.new[i] for i in chosen)] for x in self._places[:3]
        )
        keys_L = torch.arange(tables_BP.shape[1] * self.cache.page_size, device=self.cache.device)
        return rows_BQ, real_BQ, tables_BP, (keys_L <= at_BQ[:, :, None])[:, None]

    def _pages(self, sequence: int) -> int:
        return -(-self.totals[sequence] // self.cache.page_size)


def has_kernel(cache: Cache) -> bool:
    """Whether the compiled attention reads this cache."""
    whole = cache.page_size % STEP == 0 and cache.config.head_dim % STEP == 0
    return (
        whole
        and cache.device.type == "cpu"
        and cache.dtype == torch.float32
        and _kernel() is not None
    )


def _kernel() -> Callable[..., None] | None:
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    return kernels.function(
        "openqwen_paged_attention", pointer, size, *(pointer, size) * 3, pointer
    )


class _Call:
    """What a forward call tells the compiled attention once for all layers; keeps alive what it
    points to.

    It is `PagedCall` of native/layers.h: numbers and addresses of 8 bytes, an address 0 where
    something is not there.
    """

    def __init__(self, paged: Paged, rotation: Rotation, rows: int):
        cache, config, yarns = (
            paged.cache,
            paged.cache.config,
            [context.yarn for context in paged.contexts],
        )
        tables_BP = paged.tables_BP.to("cpu", torch.int64).contiguous()
        outside = int(tables_BP.min()) < 0 or int(tables_BP.max()) >= cache.pages
        if (
            outside
            or rows != sum(paged.new)
            or max(paged.totals) > tables_BP.shape[1] * cache.page_size
        ):
            raise ValueError(
                f"pages do not hold {paged.totals} tokens, or there are not {sum(paged.new)} "
                "new ones"
            )
        sizes = [torch.tensor(paged.totals), torch.tensor(paged.new)]
        chunk_lens_B = torch.tensor(rotation.chunk_lens) if rotation.chunk_lens else None
        nothing = (None, None)
        turns = [
            *rotation.key,
            *rotation.query,
            *(rotation.successive or nothing),
            *(rotation.inter or nothing),
        ]
        bias = (
            []
            if cache.key_bias_NKd is None
            else [cache.bias_turns(yarn, max(paged.totals)) for yarn in yarns]
        )
        bias_turns = [torch.tensor([x.data_ptr() for x in column]) for column in zip(*bias)]
        stored = [
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            cache.key_bias_NKd,
        ]
        tensors = [tables_BP, *sizes, chunk_lens_B, *turns, *stored, *(bias_turns or nothing)]
        shape = [
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            cache.page_size,
            cache.pages,
        ]
        numbers = [*shape, len(paged.new), rows, tables_BP.shape[1]]
        self._fields = torch.tensor(numbers + [kernels.address(x) or 0 for x in tensors])
        self._kept = (tensors, bias)
        self.address = self._fields.data_ptr()
