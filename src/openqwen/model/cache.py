"""The key/value cache: pages that sequences own, in float or int8.

Shapes: N layers, P pages, S slots of a page (one token each), K key/value heads, d head width, T
tokens, B sequences, L the padded length that their pages hold.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from openqwen.model.config import ModelConfig
from openqwen.model.long_context import LongContext, Yarn
from openqwen.model.rope import CosSin, inverse_frequencies, key_rotation, rotate
from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.model.decoder import Qwen2

Format = Literal["float", "int8"]

STEP = 16  # keys that the compiled attention takes at once; see `Cache.bias_rotation`


class Cache:
    """Keys and values of every layer, in pages.

    keys: [N, P, K, d, S], transposed within a page so that the scores of neighbouring keys are one
    vector. values: [N, P, K, S, d]. Keys are stored rotated by their position (within their chunk,
    where there are chunks), which does not depend on the query that reads them. Format "float"
    stores `dtype`; format "int8" stores bytes and one scale for each token and head.

    key_bias_NKd: the bias of `k_proj`, for int8. A rotated key is R(p)(W x + b) = R(p) W x +
    R(p) b. In Qwen2 the second term may be a hundred times the first: rounded together to int8, the
    first would be lost, and with it the model. So only the first term is stored. The second needs
    no memory, since it depends on the position alone; it is added in float32 when a key is read.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        format: Format = "float",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        key_bias_NKd: Tensor | None = None,
    ):
        if format not in ("float", "int8"):
            raise OpenQwenError(f"The cache has no format '{format}'.", do="choose float or int8")
        self.config, self.page_size, self.format, self.dtype = config, page_size, format, dtype
        heads = (config.num_hidden_layers, pages, config.num_key_value_heads)
        rounded = format == "int8"
        stored = torch.int8 if rounded else dtype
        # Zeros and not uninitialised memory: masked values are multiplied by a weight of 0, and
        # 0 × NaN would be NaN.
        self.keys = _zeros((*heads, config.head_dim, page_size), stored, device)
        self.values = _zeros((*heads, page_size, config.head_dim), stored, device)
        self.key_scales = _zeros((*heads, page_size), torch.float32, device) if rounded else None
        self.value_scales = _zeros((*heads, page_size), torch.float32, device) if rounded else None
        self.key_bias_NKd = None
        if rounded and key_bias_NKd is not None:
            bias_NKd = key_bias_NKd.detach().to(device, torch.float32, copy=True)
            self.key_bias_NKd = bias_NKd.contiguous()
        self._bias_rotations: dict[Yarn | None, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: "Qwen2", pages: int, page_size: int, format: Format = "float") -> "Cache":
        """A cache for this model: its dtype, its device, its key biases."""
        bias_NKd = torch.stack(list(_key_biases(model))).unflatten(1, (-1, model.config.head_dim))
        return cls(model.config, pages, page_size, format, model.dtype, model.device, bias_NKd)

    @staticmethod
    def bytes_per_page(
        config: ModelConfig, page_size: int, format: Format, dtype: torch.dtype
    ) -> int:
        """Bytes of one page in all layers."""
        width = config.head_dim + 4 if format == "int8" else config.head_dim * dtype.itemsize
        return 2 * config.num_hidden_layers * page_size * config.num_key_value_heads * width

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the pages."""
        return self.keys.device

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the pages `source` to the pages `target` in all layers."""
        for x_NP in (self.keys, self.values, *self._scales()):
            for x_P in x_NP:  # layer by layer: indexing all at once would hold a copy of all
                x_P[list(target)] = x_P[list(source)]

    def write(
        self, layer: int, places: tuple[Tensor, Tensor], k_TKd: Tensor, v_TKd: Tensor
    ) -> None:
        """Write keys [T, K, d], rotated and without `key_bias_NKd`, and values [T, K, d].

        places: the page of each token [T], and its slot in that page [T].
        """
        self._write_keys(layer, places, k_TKd)
        page_T, slot_T = places
        if self.value_scales is not None:
            v_TKd, self.value_scales[layer][page_T, :, slot_T] = _rounded(v_TKd)
        self.values[layer][page_T, :, slot_T] = v_TKd

    def _write_keys(self, layer: int, places: tuple[Tensor, Tensor], k_TKd: Tensor) -> None:
        page_T, slot_T = places
        if self.key_scales is not None:
            k_TKd, self.key_scales[layer][page_T, :, slot_T] = _rounded(k_TKd)
        self.keys[layer][page_T, :, :, slot_T] = k_TKd

    def read(self, layer: int, tables_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (without `key_bias_NKd`) and values of these pages, each [B, L, K, d] in `dtype`."""
        k_BLKd = self.keys[layer][tables_BP].permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
        v_BLKd = self.values[layer][tables_BP].permute(0, 1, 3, 2, 4).flatten(1, 2)
        if self.key_scales is None or self.value_scales is None:
            return k_BLKd, v_BLKd
        scales = (
            x[layer][tables_BP].transpose(2, 3).flatten(1, 2)[..., None] for x in self._scales()
        )
        k_BLKd, v_BLKd = (x * scale for x, scale in zip((k_BLKd, v_BLKd), scales, strict=True))
        return k_BLKd.to(self.dtype), v_BLKd.to(self.dtype)

    def bias_rotation(self, yarn: Yarn | None, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin that rotate a key bias to any position below `length`, in two tables.

        The first rotates to every STEP-th position, [⌈length / STEP⌉ or more, 2, d/2]; the second
        from there by 0 … STEP − 1, [2, d/2, STEP]. Together they take a sixteenth of the memory of
        one table of all positions. They are kept, since every call reads them.
        """
        tables = self._bias_rotations.get(yarn)
        if tables is None or len(tables[0]) * STEP < length:
            head_dim, theta = self.config.head_dim, self.config.rope_theta
            frequencies = inverse_frequencies(head_dim, theta, yarn).double()
            count = 1 << (max(length, 1024) // STEP).bit_length()
            angles = torch.arange(count)[:, None] * STEP * frequencies
            bases = torch.stack((angles.cos(), angles.sin()), dim=1)
            bases *= yarn.temperature if yarn else 1.0
            angles = torch.arange(STEP) * frequencies[:, None]
            steps = torch.stack((angles.cos(), angles.sin()))
            tables = bases.float().to(self.device), steps.float().to(self.device)
            self._bias_rotations[yarn] = tables
        return tables

    def rotated_bias(self, layer: int, yarn: Yarn | None, positions_L: Tensor) -> Tensor:
        """The key bias rotated to these positions (within their chunk), [L, K, d] in `dtype`."""
        assert self.key_bias_NKd is not None
        bases, steps = self.bias_rotation(yarn, int(positions_L.max()) + 1)
        base, step = bases[positions_L // STEP], steps[..., positions_L % STEP].permute(2, 0, 1)
        once = rotate(self.key_bias_NKd[layer], base[:, :1], base[:, 1:])
        return rotate(once, step[:, :1], step[:, 1:]).to(self.dtype)

    def rotate_keys(
        self,
        pages: Sequence[int],
        span: range,
        before: LongContext | None,
        after: LongContext | None,
    ) -> None:
        """Rotate a sequence's keys from one RoPE scaling to another, in place.

        For a sequence that outgrows its scaling: the time is linear in the length, where computing
        the keys again is quadratic. The keys become what `after` would have written from the same
        hidden states; the hidden states of deeper layers remain those that `before` gave.

        Args:
            pages: of the sequence, in order; pages that others share must be copied first.
            span: positions of the keys.
            before: how the keys were written; None: as the model's configuration says.
            after: how they shall be read.
        """
        at_T = torch.arange(span.start, span.stop, device=self.device)
        old = key_rotation(at_T, self.config, before)
        new = key_rotation(at_T, self.config, after)
        if all(map(torch.equal, old, new)):
            return  # such as between two contexts of Dual Chunk Attention, which scales queries
        table_P = torch.tensor(list(pages), device=self.device)
        places = table_P[at_T // self.page_size], at_T % self.page_size
        for layer in range(self.config.num_hidden_layers):
            k_TKd = self.read(layer, table_P[None])[0][0, at_T].float()
            k_TKd = rotate(rotate(k_TKd, *_inverse(old)), *new)
            self._write_keys(layer, places, k_TKd.to(self.dtype))

    def _scales(self) -> list[Tensor]:
        return [x for x in (self.key_scales, self.value_scales) if x is not None]


def _key_biases(model: "Qwen2") -> Iterator[Tensor]:
    """The bias of each layer's key projection, [K · d]."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    width = model.config.num_key_value_heads * model.config.head_dim
    for n in range(model.config.num_hidden_layers):
        layer = f"model.layers.{n}"
        # A plain layer; one with an adapter; one whose q, k and v are merged.
        for name in ("self_attn.k_proj.bias", "self_attn.k_proj.base.bias", "qkv_proj.bias"):
            if (bias := tensors.get(f"{layer}.{name}")) is not None:
                first = model.config.hidden_size if name == "qkv_proj.bias" else 0
                yield bias.detach()[first : first + width]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of zeros; on a CPU it takes memory only where it is written.

    np.zeros leaves the zeroing to the system, which does it page by page at the first access.
    torch.zeros would write all of it, perhaps gigabytes, at the start. Aligned to 64 bytes, as
    torch's own memory.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + 64, np.uint8))
    start = -raw.data_ptr() % 64
    return raw[start : start + size].view(dtype).view(shape)


def _rounded(x_TKd: Tensor) -> tuple[Tensor, Tensor]:
    """Values rounded to int8, and the scale of each token and head [T, K] for −127 … 127."""
    x_TKd = x_TKd.float()
    scale_TK = x_TKd.abs().amax(-1) / 127
    inverse_TK = torch.where(scale_TK > 0, 1 / scale_TK, 0)
    return (x_TKd * inverse_TK[..., None]).round().to(torch.int8), scale_TK


def _inverse(rotation: CosSin) -> CosSin:
    """The inverse rotation, with the inverse of its scale."""
    cos, sin = rotation
    square = cos.square() + sin.square()
    return cos / square, -sin / square
