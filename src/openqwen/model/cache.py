"""The key/value cache: pages that sequences own, and the formats in which keys and values lie in
them.

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
from openqwen.model.rope import Turns, inverse_frequencies, key_turns, rotate
from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.model.decoder import Qwen2

Format = Literal["float", "int8"]

# positions that share one turn of the key bias, and keys that the compiled attention takes at once
STEP = 16


class Cache:
    """Keys and values of every layer, in pages.

    keys: [N, P, K, d, S], transposed within a page so that the scores of neighbouring keys are one
    vector; values: [N, P, K, S, d]. Keys lie turned by their position (within their chunk, where
    there are chunks), so they are right whoever reads them. Format "float" keeps `dtype`. Format
    "int8" keeps one scale for each token and head.

    key_bias_NKd: what `k_proj` adds, for int8. Turned, W x + b is R(p) W x + R(p) b, and in Qwen2
    the second term is a known constant that may be a hundred times the first. Only the first is
    rounded; the second is added in full when the key is read, from a table of sixteen steps and one
    of every sixteenth position. Without it int8 ruins Qwen2.
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
            raise OpenQwenError(f"'{format}' is no format of a cache.", do="choose float or int8")
        self.config, self.page_size, self.format, self.dtype = config, page_size, format, dtype
        heads = (config.num_hidden_layers, pages, config.num_key_value_heads)
        rounded = format == "int8"
        stored = torch.int8 if rounded else dtype
        # Zeros, not empty memory: masked keys are multiplied by a weight of 0, and 0 × NaN would be
        # NaN.
        self.keys = _zeros((*heads, config.head_dim, page_size), stored, device)
        self.values = _zeros((*heads, page_size, config.head_dim), stored, device)
        self.key_scales = _zeros((*heads, page_size), torch.float32, device) if rounded else None
        self.value_scales = _zeros((*heads, page_size), torch.float32, device) if rounded else None
        self.key_bias_NKd = None
        if rounded and key_bias_NKd is not None:
            self.key_bias_NKd = (
                key_bias_NKd.detach().to(device, torch.float32, copy=True).contiguous()
            )
        self._bias_turns: dict[Yarn | None, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: "Qwen2", pages: int, page_size: int, format: Format = "float") -> "Cache":
        """A cache for this model, in its type, where it is, with its key biases."""
        bias_NKd = torch.stack(list(_key_biases(model))).unflatten(1, (-1, model.config.head_dim))
        return cls(
            model.config,
            pages,
            page_size,
            format,
            model.model.norm.weight.dtype,
            model.device,
            bias_NKd,
        )

    @staticmethod
    def bytes_per_page(
        config: ModelConfig, page_size: int, format: Format, dtype: torch.dtype
    ) -> int:
        """Memory of one page over all layers."""
        width = config.head_dim + 4 if format == "int8" else config.head_dim * dtype.itemsize
        return 2 * config.num_hidden_layers * page_size * config.num_key_value_heads * width

    @property
    def pages(self) -> int:
        """How many there are."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys.device

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Make the pages `target` what the pages `source` are, over all layers."""
        for x_P in (x_P for x_NP in (self.keys, self.values, *self._scales()) for x_P in x_NP):
            x_P[list(target)] = x_P[list(source)]

    def write(self, layer: int, slots_T: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Keys, turned and without `key_bias_NKd`, and values into slots (page × page size + place
        in the page).
        """
        self._write_keys(layer, slots_T, k_TKd)
        page_T, place_T = slots_T // self.page_size, slots_T % self.page_size
        if self.value_scales is not None:
            v_TKd, self.value_scales[layer][page_T, :, place_T] = _rounded(v_TKd)
        self.values[layer][page_T, :, place_T] = v_TKd

    def _write_keys(self, layer: int, slots_T: Tensor, k_TKd: Tensor) -> None:
        page_T, place_T = slots_T // self.page_size, slots_T % self.page_size
        if self.key_scales is not None:
            k_TKd, self.key_scales[layer][page_T, :, place_T] = _rounded(k_TKd)
        self.keys[layer][page_T, :, :, place_T] = k_TKd

    def read(self, layer: int, tables_BP: Tensor) -> tuple[Tensor, Tensor]:
        """What was written to these pages, keys and values, each [B, L, K, d] in `dtype`."""
        k_BLKd = self.keys[layer][tables_BP].permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
        v_BLKd = self.values[layer][tables_BP].permute(0, 1, 3, 2, 4).flatten(1, 2)
        if self.key_scales is None or self.value_scales is None:
            return k_BLKd, v_BLKd
        scales = (
            x[layer][tables_BP].transpose(2, 3).flatten(1, 2)[..., None] for x in self._scales()
        )
        k_BLKd, v_BLKd = (x * scale for x, scale in zip((k_BLKd, v_BLKd), scales, strict=True))
        return k_BLKd.to(self.dtype), v_BLKd.to(self.dtype)

    def bias_turns(self, yarn: Yarn | None, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin that turn a key bias to positions below `length`: to every STEP-th [⌈length /
        STEP⌉ or more, 2, d/2], and from there by 0 … STEP − 1 [2, d/2, STEP]. Kept, since every
        call reads them."""
        found = self._bias_turns.get(yarn)
        if found is None or len(found[0]) * STEP < length:
            frequencies = inverse_frequencies(
                self.config.head_dim, self.config.rope_theta, yarn
            ).double()
            count = 1 << (max(length, 1024) // STEP).bit_length()
            angles = torch.arange(count)[:, None] * STEP * frequencies
            bases = torch.stack((angles.cos(), angles.sin()), dim=1) * (
                yarn.temperature if yarn else 1.0
            )
            angles = torch.arange(STEP) * frequencies[:, None]
            steps = torch.stack((angles.cos(), angles.sin()))
            self._bias_turns[yarn] = found = (
                bases.float().to(self.device),
                steps.float().to(self.device),
            )
        return found

    def turned_bias(self, layer: int, yarn: Yarn | None, positions_L: Tensor) -> Tensor:
        """The turned key bias at these positions (within their chunk), which the keys lack, [L, K,
        d] in `dtype`.
        """
        assert self.key_bias_NKd is not None
        bases, steps = self.bias_turns(yarn, int(positions_L.max()) + 1)
        base, step = bases[positions_L // STEP], steps[..., positions_L % STEP].permute(2, 0, 1)
        once = rotate(self.key_bias_NKd[layer], base[:, :1], base[:, 1:])
        return rotate(once, step[:, :1], step[:, 1:]).to(self.dtype)

    def rerotate(
        self,
        pages: Sequence[int],
        span: range,
        before: LongContext | None,
        after: LongContext | None,
    ) -> None:
        """Turn the keys at these positions of a sequence that owns these pages from one way of
        reading to another.

        For what outgrows its way: linear in the length where reading it anew is quadratic. The keys
        become what `after` would have written from the same hidden states; those of deeper layers
        remain what `before` made them. Pages that others share must be copied first.
        """
        at_T = torch.arange(span.start, span.stop, device=self.device)
        back = _inverse(key_turns(at_T, self.config, before))
        forth = key_turns(at_T, self.config, after)
        if all(map(torch.equal, key_turns(at_T, self.config, before), forth)):
            return  # Dual Chunk Attention scales queries alone
        table_P = torch.tensor(list(pages), device=self.device)
        slots_T = table_P[at_T // self.page_size] * self.page_size + at_T % self.page_size
        for layer in range(self.config.num_hidden_layers):
            k_TKd = self.read(layer, table_P[None])[0][0, at_T].float()
            self._write_keys(layer, slots_T, rotate(rotate(k_TKd, *back), *forth).to(self.dtype))

    def _scales(self) -> list[Tensor]:
        return [x for x in (self.key_scales, self.value_scales) if x is not None]


def _key_biases(model: "Qwen2") -> Iterator[Tensor]:
    """What each layer's key projection adds, [K · d], wherever the layer keeps it."""
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    keys = model.config.num_key_value_heads * model.config.head_dim
    for n in range(model.config.num_hidden_layers):
        layer = f"model.layers.{n}"
        for name in (
            f"{layer}.self_attn.k_proj.bias",
            f"{layer}.self_attn.k_proj.base.bias",
        ):  # base: an adapter's
            if name in known:
                yield known[name].detach()
        if (merged := known.get(f"{layer}.qkv_proj.bias")) is not None:
            yield merged.detach()[model.config.hidden_size :][:keys]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On a CPU memory that the system hands out when it is first touched: a cache that is hardly
    used takes hardly any, where torch.zeros would write a gigabyte at the start. Aligned as torch's
    own."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + 64, np.uint8))
    start = -raw.data_ptr() % 64
    return raw[start : start + size].view(dtype).view(shape)


def _rounded(x_TKd: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and the scale of each token and head, [T, K], which maps it onto −127 … 127."""
    x_TKd = x_TKd.float()
    scale_TK = x_TKd.abs().amax(-1) / 127
    inverse_TK = torch.where(scale_TK > 0, 1 / scale_TK, 0)
    return (x_TKd * inverse_TK[..., None]).round().to(torch.int8), scale_TK


def _inverse(turns: Turns) -> Turns:
    """What undoes them, their scale too."""
    cos, sin = turns
    square = cos.square() + sin.square()
    return cos / square, -sin / square
