"""ggml's block formats: weights in blocks of 32 or 256 that share scales, to float32 and back.

Formulas of llama.cpp (ggml-quants.c), in float32 and its order of operations, so that the results are the same to the
last bit. N blocks are unpacked at once; `q` are the small integers, `d` the block's scale, `m` its offset.
"""

from collections.abc import Callable

import numpy as np

from openqwen.support.gguf import BLOCKS

Array = np.ndarray


def dequantize(data: memoryview | bytes | Array, kind: str) -> Array:
    """The float32 weights [n] of whole blocks."""
    blocks_NB = np.frombuffer(data, np.uint8).reshape(-1, BLOCKS[kind][1])
    return _UNPACK[kind](blocks_NB).reshape(-1)


def quantize(weights: Array, kind: str) -> Array:
    """The bytes of float32 weights [n] as llama.cpp rounds them; n is a multiple of the block."""
    weights = weights.astype(np.float32, copy=False).reshape(-1, BLOCKS[kind][0])
    with np.errstate(over="ignore", invalid="ignore"):  # what a type cannot hold becomes infinite; who writes it looks
        return _PACK[kind](weights).reshape(-1)


def _half(blocks: Array, at: int) -> Array:
    """A float16 of each block, as float32 [N, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """The low halves of the bytes, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Array) -> Array:
    """One bit a weight [N, 32], where it belongs above a nibble."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(blocks: Array) -> Array:
    q = _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)
    return _half(blocks, 0) * q


def _q4_1(blocks: Array) -> Array:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Array) -> Array:
    q = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).view(np.int8) - np.int8(16)
    return _half(blocks, 0) * q


def _q5_1(blocks: Array) -> Array:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q + _half(blocks, 2)


def _q8_0(blocks: Array) -> Array:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _six_bit_scales(packed: Array) -> tuple[Array, Array]:
    """12 bytes hold 8 scales and 8 offsets of 6 bits: the first four of each whole, the others in two parts."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return scales, offsets


def _q45_k(blocks: Array, q_N832: Array) -> Array:
    """Eight groups of 32 weights, each with its own scale and offset."""
    scales, offsets = _six_bit_scales(blocks[:, 4:16])
    d_N81 = (_half(blocks, 0) * scales)[..., None]
    m_N81 = (_half(blocks, 2) * offsets)[..., None]
    return d_N81 * q_N832 - m_N81


def _q4_k(blocks: Array) -> Array:
    return _q45_k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Array) -> Array:
    q_N832 = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bits_N832 = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _q45_k(blocks, q_N832 | bits_N832 << 4)


def _q6_k(blocks: Array) -> Array:
    """Two halves of 128; in each, bits 4 and 5 of the weights l, l + 32, l + 64, l + 96 share a byte."""
    low_N2x128 = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high_N2x128 = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 2, 128)
    q = (low_N2x128 | high_N2x128 << 4).view(np.int8) - np.int8(32)
    d_N16x1 = (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[..., None]
    return d_N16x1 * q.reshape(-1, 16, 16)


def _plain(kind: type) -> Callable[[Array], Array]:
    return lambda blocks: blocks.copy().view(kind).astype(np.float32)


def _bf16(blocks: Array) -> Array:
    return (blocks.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_UNPACK: dict[str, Callable[[Array], Array]] = {
    "F32": _plain(np.float32),
    "F16": _plain(np.float16),
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _reciprocal(d: Array) -> Array:
    return np.divide(1, d, out=np.zeros_like(d), where=d != 0)


def _to_q8_0(x_N32: Array) -> Array:
    """The largest magnitude becomes ±127; halves are rounded away from zero."""
    d = np.abs(x_N32).max(axis=1, keepdims=True) / np.float32(127)
    y = x_N32 * _reciprocal(d)
    size = np.abs(y)
    whole = np.floor(size)
    q = np.copysign(whole + (size - whole >= 0.5), y).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=1)


def _to_q4_0(x_N32: Array) -> Array:
    """The number of largest magnitude, whatever its sign, becomes −8, so the scale may be negative."""
    largest = np.take_along_axis(x_N32, np.abs(x_N32).argmax(axis=1, keepdims=True), axis=1)
    d = largest / np.float32(-8)
    q = (x_N32 * _reciprocal(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    packed = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([d.astype(np.float16).view(np.uint8), packed], axis=1)


def _to_bf16(x: Array) -> Array:
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), (bits >> 16 | 64).astype(np.uint16), rounded).view(np.uint8)


_PACK: dict[str, Callable[[Array], Array]] = {
    "F32": lambda x: x.view(np.uint8),
    "F16": lambda x: x.astype(np.float16).view(np.uint8),
    "BF16": _to_bf16,
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
}
WRITTEN = tuple(_PACK)
