"""Quantised matrices in plain PyTorch: how they are packed, unpacked and multiplied.

The packed form is described in native/packed.h. This code defines what the compiled kernels
compute, and runs where there is no compiler. Shapes: N outputs, K inputs, G groups of inputs, t
tiles of 32 outputs, T rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # outputs
_SCALES = 2 * TILE  # bytes of a record's bfloat16 scales
# What each nibble stands for, and what a group's largest weight may become in these units: see
# kCode in native/packed.h and kLargest in native/quantize.cpp.
_CODE = (-127, -100, -78, -61, -47, -34, -21, -9, 2, 13, 25, 36, 50, 65, 82, 106)
_LARGEST = (-135.0, -122.0, -110.0, 100.0, 112.0, 125.0)


@dataclass(frozen=True)
class Format:
    """weight = scale · values[stored], with one scale for each `group` inputs of an output."""

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
        """Shape of the packed matrix: tiles, groups, bytes of a record."""
        record = _SCALES + TILE * self.group * self.bits // 8
        return -(-outputs // TILE), -(-inputs // self.group), record


FORMATS = {"int8": Format(8, 64), "int4": Format(4, 32)}


def choose(weight_NK: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Quantise a matrix, its inputs padded with zeros.

    Returns stored numbers, uint8 [N, G·group], and scales that bfloat16 holds exactly, [N, G].
    """
    w_NGk = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % form.group)).unflatten(
        1, (-1, form.group)
    )
    largest_NG1 = w_NGk.gather(2, w_NGk.abs().argmax(2, keepdim=True))
    if form.bits == 8:  # rounded up to bfloat16, so that the largest weight stays within 127
        exact = (largest_NG1.abs() / 127).view(torch.int32)
        scale_NG1 = ((exact + 0xFFFF) & ~0xFFFF).view(torch.float32)
    else:
        scale_NG1 = _searched(w_NGk, largest_NG1)
    stored = form.nearest(w_NGk * _inverse(scale_NG1))
    return stored.to(torch.uint8).flatten(1), scale_NG1.squeeze(2)


def _searched(w_NGk: Tensor, largest_NG1: Tensor) -> Tensor:
    """Of a few candidate scales, each refitted by least squares, that with the least error."""
    form = FORMATS["int4"]
    best, scale = torch.full_like(largest_NG1, -1.0), torch.zeros_like(largest_NG1)
    for target in _LARGEST:
        q = form.values()[form.nearest(w_NGk * (_inverse(largest_NG1) * target))]
        # The least-squares scale is a / b; it reduces the squared error Σ w² by a² / b.
        a, b = ((x * q).sum(2, keepdim=True) for x in (w_NGk, q))
        gain = a * a / b
        best, scale = torch.where(gain > best, gain, best), torch.where(gain > best, a / b, scale)
    return scale.bfloat16().float()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x.abs() > 1e-30, 1 / x, 0.0)


def pack(stored_NK: Tensor, scale_NG: Tensor, form: Format) -> Tensor:
    """Pack the numbers and scales that `choose` returns: uint8 [t, G, record]."""
    rows, groups = -len(stored_NK) % TILE, scale_NG.shape[1]
    stored_NK = F.pad(stored_NK, (0, 0, 0, rows), value=int(form.nearest(torch.zeros(1))))
    scales_tnG = F.pad(scale_NG, (0, 0, 0, rows)).unflatten(0, (-1, TILE))
    scales_tGn = scales_tnG.transpose(1, 2).bfloat16()
    # Outputs: the two halves of a tile, sixteen each. Inputs: groups, quads, 4 inputs of a quad.
    quads = stored_NK.view(-1, 2, 16, groups, form.group // 4, 4).permute(0, 3, 4, 1, 2, 5)
    if form.bits == 4:
        low, high = quads.chunk(2, dim=2)
        quads = low | high << 4
    return torch.cat([scales_tGn.contiguous().view(torch.uint8), quads.flatten(2)], dim=2)


def unpack(packed_tGb: Tensor, form: Format, outputs: int, inputs: int) -> Tensor:
    """The matrix in float32, [N, K]."""
    scales_tGn = packed_tGb[:, :, :_SCALES].contiguous().view(torch.bfloat16).float()
    quads = packed_tGb[:, :, _SCALES:].unflatten(2, (-1, 2, 16, 4))
    if form.bits == 4:
        quads = torch.cat([quads & 15, quads >> 4], dim=2)
    stored_tnGk = quads.permute(0, 3, 4, 1, 2, 5).reshape(-1, TILE, packed_tGb.shape[1], form.group)
    weight_tnGk = form.values()[stored_tnGk.long()] * scales_tGn.transpose(1, 2).unsqueeze(3)
    return weight_tnGk.flatten(2).flatten(0, 1)[:outputs, :inputs]


def rows_of(packed_tGb: Tensor, form: Format, rows_T: Tensor, inputs: int) -> Tensor:
    """Some rows of the matrix in float32, [T, K]; the others are not unpacked."""
    tile, lane = rows_T // TILE, rows_T % TILE
    scales_TG2 = packed_tGb[:, :, :_SCALES].unflatten(2, (TILE, 2))[tile, :, lane]
    scales_TG1 = scales_TG2.view(torch.bfloat16).float()
    quads = packed_tGb[:, :, _SCALES:].unflatten(2, (-1, TILE, 4))[tile, :, :, lane]
    if form.bits == 4:
        quads = torch.cat([quads & 15, quads >> 4], dim=2)
    return (form.values()[quads.flatten(2).long()] * scales_TG1).flatten(1)[:, :inputs]


def in_bytes(x_TK: Tensor, form: Format) -> Tensor:
    """Activations rounded to signed bytes, in float32; each group of a row has its own scale."""
    x_TGk = F.pad(x_TK, (0, -x_TK.shape[1] % form.group)).unflatten(1, (-1, form.group))
    largest_TG1 = x_TGk.abs().amax(2, keepdim=True)
    inverse = torch.where(largest_TG1 > 1e-30, 127 / largest_TG1, 0.0)
    return ((x_TGk * inverse).round() * (largest_TG1 / 127)).flatten(1)[:, : x_TK.shape[1]]
