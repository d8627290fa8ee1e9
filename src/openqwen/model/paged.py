"""Attention of new tokens to a paged cache: plain PyTorch everywhere, C++ or Triton where possible.

Shapes: T new tokens, H query heads, K key/value heads, d head width, B sequences, Q new tokens of a
sequence, P pages of a sequence, S slots of a page, L = P · S, m tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from ctypes import addressof, c_int64, c_void_p
from functools import cached_property

import torch
from torch import Tensor

from openqwen.model import dual_chunk, kernels
from openqwen.model.attention import LongContexts, divided, for_each, sdpa
from openqwen.model.cache import STEP, Cache
from openqwen.model.config import ModelConfig
from openqwen.model.paged_gpu import GpuPaged, suits
from openqwen.model.rope import Rotation, rotate, rotation_of
from openqwen.model.structs import PagedCall


class Paged:
    """New tokens of several sequences; keys and values of earlier tokens are in a paged cache.

    A call writes the keys and values of its new tokens to the cache. Its rows are the new tokens of
    all sequences, laid end to end.

    On the CPU, in float32, without gradients, one compiled call does the attention of a layer. A
    token's result is then the same to the bit whatever else is in the call, however its sequence
    was cut into calls, on any number of threads.

    Where Dual Chunk Attention scales queries by the length of the sequence and the context states
    none (`LongContext.tokens`), it is the total at this call, as in vLLM. Generating token by token
    then differs from one pass over the same tokens.

    Args:
        cache: it takes the new keys and values.
        tables_BP: the pages of each sequence in order, padded with any page.
        totals: tokens of each sequence, the new ones included.
        new: new tokens of each sequence, at least one.
        long_context: as in `Packed.from_lengths`.
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
        """See `Attention.attend`; it writes the new keys and values to the cache first."""
        plain_only = q_THd.dtype != torch.float32 or q_THd.requires_grad
        call = None if plain_only else self.compiled(rotation, len(q_THd))
        if not self._kernel or call is None:
            return self._plain(q_THd, k_TKd, v_TKd, rotation, layer)
        # The kernel takes a stride between tokens, since q, k and v may be slices of one product.
        inputs = [
            x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
            for x in (q_THd, k_TKd, v_TKd)
        ]
        out_THd = torch.empty(q_THd.shape)
        places = [n for x in inputs for n in (x.data_ptr(), x.stride(0))]
        self._kernel(call, layer, *places, out_THd.data_ptr())
        return out_THd

    def compiled(self, rotation: Rotation, rows: int) -> int | None:
        """The address of this call's `PagedCall`, prepared once for all layers.

        None where the kernels cannot do it. rows: of the call.
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
        if self.cache.key_bias_NKd is not None:  # it is not stored: see `Cache`
            k_TKd = k_TKd - self.cache.key_bias_NKd[layer].to(k_TKd.dtype)
        self.cache.write(layer, self._places[3], rotate(k_TKd, *rotation.key), v_TKd)
        if not rotation.chunk_lens:
            if self._gpu is not None and near_THd.dtype == self.cache.dtype:
                return self._gpu.attend(near_THd, layer)
            return self._masked(near_THd, layer, self._all)
        # Sequences that Dual Chunk Attention divides are read one by one, the others together.
        outs = list(near_THd.split(self.new))
        for i, queries in divided(q_THd, near_THd, rotation, self.new).items():
            chunk_len = rotation.chunk_lens[i]
            table_1P = self.tables_BP[i : i + 1, : self._pages(i)]
            k_1LKd, v_1LKd = self._read(layer, table_1P, [i], chunk_len)
            k_mKd, v_mKd = k_1LKd[0, : self.totals[i]], v_1LKd[0, : self.totals[i]]
            outs[i] = dual_chunk.attend(queries, k_mKd, v_mKd, chunk_len)
        if short := tuple(i for i in self._all if not rotation.chunk_lens[i]):
            counts = [self.new[i] for i in short]
            short_outs = self._masked(near_THd, layer, short).split(counts)
            for i, out in zip(short, short_outs, strict=True):
                outs[i] = out
        return torch.cat(outs)

    def _read(
        self, layer: int, tables_BP: Tensor, sequences: Sequence[int], chunk_len: int
    ) -> tuple[Tensor, Tensor]:
        """Keys of these sequences with their bias, and values; each [B, L, K, d]."""
        k_BLKd, v_BLKd = self.cache.read(layer, tables_BP)
        if self.cache.key_bias_NKd is not None:
            at_L = torch.arange(k_BLKd.shape[1], device=self.cache.device)
            at_L = at_L % chunk_len if chunk_len else at_L
            yarns = [self.contexts[i].yarn for i in sequences]
            biases = [self.cache.rotated_bias(layer, yarn, at_L) for yarn in yarns]
            k_BLKd = k_BLKd + torch.stack(biases)
        return k_BLKd, v_BLKd

    def _masked(self, q_THd: Tensor, layer: int, chosen: tuple[int, ...]) -> Tensor:
        """Attention of the chosen sequences in one padded call, causal by a mask."""
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
    def _places(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Of the new tokens [B, Q]: rows in the call, which are no padding, positions.

        The last are the page of each row's key and value and its slot there, each [T].
        """
        device, size = self.cache.device, self.cache.page_size
        totals_B1 = torch.tensor(self.totals, device=device)[:, None]
        new_B1 = torch.tensor(self.new, device=device)[:, None]
        # Query j of a sequence stands at position total − new + j and sees the keys up to itself.
        # Padding repeats the last query, so that no index leaves the sequence's pages.
        steps_1Q = torch.arange(max(self.new), device=device)[None]
        real_BQ = steps_1Q < new_B1
        rows_BQ = new_B1.cumsum(0) - new_B1 + torch.minimum(steps_1Q, new_B1 - 1)
        at_BQ = torch.minimum(totals_B1 - new_B1 + steps_1Q, totals_B1 - 1)
        page_T = self.tables_BP.gather(1, at_BQ // size)[real_BQ]
        return rows_BQ, real_BQ, at_BQ, (page_T, (at_BQ % size)[real_BQ])

    def _grid(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of the queries, which of them are no padding, pages, and the mask [B, 1, Q, L]."""
        tables_BP = self.tables_BP[chosen, : max(self._pages(i) for i in chosen)]
        longest = max(self.new[i] for i in chosen)
        rows_BQ, real_BQ, at_BQ = (x[chosen, :longest] for x in self._places[:3])
        keys_L = torch.arange(tables_BP.shape[1] * self.cache.page_size, device=self.cache.device)
        return rows_BQ, real_BQ, tables_BP, (keys_L <= at_BQ[:, :, None])[:, None]

    def _pages(self, sequence: int) -> int:
        return -(-self.totals[sequence] // self.cache.page_size)


def has_kernel(cache: Cache) -> bool:
    """Whether the compiled attention can read this cache."""
    if cache.page_size % STEP or cache.config.head_dim % STEP:  # it takes sixteen numbers at once
        return False
    on_cpu = cache.device.type == "cpu" and cache.dtype == torch.float32
    return on_cpu and _kernel() is not None


def _kernel() -> Callable[..., None] | None:
    inputs = (c_void_p, c_int64) * 3  # q, k and v, each with its stride
    return kernels.function("openqwen_paged_attention", c_void_p, c_int64, *inputs, c_void_p)


class _Call:
    """The `PagedCall` of one forward call, with the tensors that it points to.

    Raises ValueError where the pages do not hold the tokens: the kernels check nothing.
    """

    def __init__(self, paged: Paged, rotation: Rotation, rows: int):
        cache, config = paged.cache, paged.cache.config
        tables_BP = paged.tables_BP.to("cpu", torch.int64).contiguous()
        room = tables_BP.shape[1] * cache.page_size
        outside = int(tables_BP.min()) < 0 or int(tables_BP.max()) >= cache.pages
        if outside or rows != sum(paged.new) or max(paged.totals) > room:
            raise ValueError(
                f"{rows} rows for {sum(paged.new)} new tokens, or pages that do not exist or are "
                f"too few for {max(paged.totals)} tokens"
            )
        self._kept: list[object] = []  # alive as long as their addresses are used
        call = PagedCall(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=config.head_dim,
            slots=cache.page_size,
            pages=cache.pages,
            sequences=len(paged.new),
            rows=rows,
            table_width=tables_BP.shape[1],
            tables=self._address(tables_BP),
            totals=self._address(torch.tensor(paged.totals)),
            counts=self._address(torch.tensor(paged.new)),
            keys=self._address(cache.keys),
            values=self._address(cache.values),
            key_scales=self._address(cache.key_scales),
            value_scales=self._address(cache.value_scales),
            key_bias=self._address(cache.key_bias_NKd),
        )
        if rotation.chunk_lens:
            call.chunk_lens = self._address(torch.tensor(rotation.chunk_lens))
        call.key_cos, call.key_sin = map(self._address, rotation.key)
        for way, cos_sin in enumerate((rotation.query, rotation.successive, rotation.inter)):
            if cos_sin is not None:
                call.query_cos[way], call.query_sin[way] = map(self._address, cos_sin)
        if cache.key_bias_NKd is not None:
            longest = max(paged.totals)
            tables = [cache.bias_rotation(c.yarn, longest) for c in paged.contexts]
            self._kept.append(tables)
            bases, steps = (torch.tensor([x.data_ptr() for x in column]) for column in zip(*tables))
            call.bias_bases, call.bias_steps = self._address(bases), self._address(steps)
        self._call = call
        self.address = addressof(call)

    def _address(self, tensor: Tensor | None) -> int:
        """The address of a tensor that stays alive with this object; 0 for None."""
        self._kept.append(tensor)
        return kernels.address(tensor)
