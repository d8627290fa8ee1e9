"""Quantised matrices: their packed form, and plain PyTorch's way to make, read and multiply them.

The form is described in native/packed.h. This is the definition that the compiled kernels follow,
and what runs where there is no compiler. Shapes: N outputs, K inputs, G groups of inputs, t tiles
of 32 outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # outputs
_SCALES = 2 * TILE  # bytes of a record's bfloat16 scales
_CODE = (
    -127,
    -100,
    -78,
    -61,
    -47,
    -34,
    -21,
    -9,
    2,
    13,
    25,
    36,
    50,
    65,
    82,
    106,
)  # what a nibble stands for
_LARGEST = (
    -135.0,
    -122.0,
    -110.0,
    100.0,
    112.0,
    125.0,
)  # what a group's largest weight may become, in these units


@dataclass(frozen=True)
class Format:
    """weight = scale · values[stored], a scale for every `group` inputs of an output."""

    bits: int
    group: int

    def values(self) -> Tensor:
        """What each stored number stands for, float32."""
        return torch.tensor(_CODE).float() if self.bits == 4 else torch.arange(-128.0, 128.0)

    def nearest(self, x: Tensor) -> Tensor:
        """The stored number whose value is nearest to each x."""
        if self.bits == 4:
            values = self.values()
            return torch.bucketize(x, (values[1:] + values[:-1]) / 2)
        return x.round().clamp(-127, 127).long() + 128

    def shape(self, outputs: int, inputs: int) -> tuple[int, int, int]:
        """Of the packed form, in bytes: tiles, groups, record."""
        return (
            -(-outputs // TILE),
            -(-inputs // self.group),
            _SCALES + TILE * self.group * self.bits // 8,
        )


FORMATS = {"int8": Format(8, 64), "int4": Format(4, 32)}


def choose(weight_NK: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """(stored uint8 [N, G·group], scale [N, G], exact in bfloat16) for a matrix, K padded with
    zeros.
    """
    w_NGk = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % form.group)).unflatten(
        1, (-1, form.group)
    )
    largest_NG1 = w_NGk.gather(2, w_NGk.abs().argmax(2, keepdim=True))
    if form.bits == 8:  # rounded up, lest the largest weight fall outside
        exact = (largest_NG1.abs() / 127).view(torch.int32)
        scale_NG1 = ((exact + 0xFFFF) & ~0xFFFF).view(torch.float32)
    else:
        scale_NG1 = _searched(w_NGk, largest_NG1)
    stored = form.nearest(w_NGk * _inverse(scale_NG1))
    return stored.to(torch.uint8).flatten(1), scale_NG1.squeeze(2)


def _searched(w_NGk: Tensor, largest_NG1: Tensor) -> Tensor:
    """Of a few candidates the scale, refitted by least squares, with the least squared error."""
    form = FORMATS["int4"]
    best, scale = torch.full_like(largest_NG1, -1.0), torch.zeros_like(largest_NG1)
    for target in _LARGEST:
        q = form.values()[form.nearest(w_NGk * (_inverse(largest_NG1) * target))]
        a, b = ((x * q).sum(2, keepdim=True) for x in (w_NGk, q))
        gain = a * a / b
        best, scale = torch.where(gain > best, gain, best), torch.where(gain > best, a / b, scale)
    return scale.bfloat16().float()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x.abs() > 1e-30, 1 / x, 0.0)


def pack(stored_NK: Tensor, scale_NG: Tensor, form: Format) -> Tensor:
    """The packed form of what `choose` gives, uint8 [t, G, record]."""
    rows, groups = -len(stored_NK) % TILE, scale_NG.shape[1]
    stored_NK = F.pad(stored_NK, (0, 0, 0, rows), value=int(form.nearest(torch.zeros(1))))
    scales_tGn = (
        F.pad(scale_NG, (0, 0, 0, rows)).unflatten(0, (-1, TILE)).transpose(1, 2).bfloat16()
    )
    # outputs: two sixteens of a tile; inputs: groups of fours
    quads = stored_NK.view(-1, 2, 16, groups, form.group // 4, 4).permute(0, 3, 4, 1, 2, 5)
    if form.bits == 4:
        low, high = quads.chunk(2, dim=2)
        quads = low | high << 4
    return torch.cat([scales_tGn.contiguous().view(torch.uint8), quads.flatten(2)], dim=2)


def unpack(packed_tGb: Tensor, form: Format, outputs: int, inputs: int) -> Tensor:
    """The matrix in float32, [N, K]."""
    scales_tnG1 = (
        packed_tGb[:, :, :_SCALES]
        .contiguous()
        .view(torch.bfloat16)
        .float()
        .transpose(1, 2)
        .unsqueeze(3)
    )
    quads = packed_tGb[:, :, _SCALES:].unflatten(2, (-1, 2, 16, 4))
    if form.bits == 4:
        quads = torch.cat([quads & 15, quads >> 4], dim=2)
    stored_tnGk = quads.permute(0, 3, 4, 1, 2, 5).reshape(-1, TILE, packed_tGb.shape[1], form.group)
    return (form.values()[stored_tnGk.long()] * scales_tnG1).reshape(
        -1, packed_tGb.shape[1] * form.group
    )[:outputs, :inputs]


def rows_of(packed_tGb: Tensor, form: Format, rows_T: Tensor, inputs: int) -> Tensor:
    """Rows of the matrix in float32, [T, K], without the others."""
    tile, lane = rows_T // TILE, rows_T % TILE
    scales_TG1 = (
        packed_tGb[:, :, :_SCALES]
        .unflatten(2, (TILE, 2))[tile, :, lane]
        .view(torch.bfloat16)
        .float()
    )
    quads = packed_tGb[:, :, _SCALES:].unflatten(2, (-1, TILE, 4))[tile, :, :, lane]
    if form.bits == 4:
        quads = torch.cat([quads & 15, quads >> 4], dim=2)
    return (form.values()[quads.flatten(2).long()] * scales_TG1).flatten(1)[:, :inputs]


def in_bytes(x_TK: Tensor, form: Format) -> Tensor:
    """Activations rounded to signed bytes, a scale for each group of each row, and back to
    float32.
    """
    x_TGk = F.pad(x_TK, (0, -x_TK.shape[1] % form.group)).unflatten(1, (-1, form.group))
    largest_TG1 = x_TGk.abs().amax(2, keepdim=True)
    inverse = torch.where(largest_TG1 > 1e-30, 127 / largest_TG1, 0.0)
    return ((x_TGk * inverse).round() * (largest_TG1 / 127)).flatten(1)[:, : x_TK.shape[1]]
