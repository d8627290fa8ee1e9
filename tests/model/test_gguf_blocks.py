"""ggml's block formats, as the package gguf computes them, against their formulas one weight at a
time in float64.
"""

import struct

import numpy as np
import pytest

from openqwen.model.gguf import KINDS
from openqwen.model.gguf_blocks import dequantize, quantize
from openqwen.support.gguf import BLOCKS

HALVES = {
    "Q4_0": 1,
    "Q4_1": 2,
    "Q5_0": 1,
    "Q5_1": 2,
    "Q8_0": 1,
    "Q4_K": 2,
    "Q5_K": 2,
}  # at the start of a block


LATER = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}  # where they stand at the end of it


def random_blocks(kind, count, seed=0):
    """Random bytes with sensible scales where the float16s stand."""
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (count, BLOCKS[kind][1]), dtype=np.uint8)
    for at in LATER[kind] if kind in LATER else [2 * i for i in range(HALVES[kind])]:
        data[:, at : at + 2] = draw.normal(0, 0.01, (count, 1)).astype(np.float16).view(np.uint8)
    return data


def half(block, at):
    return float(struct.unpack("<e", bytes(block[at : at + 2]))[0])


def nibble(packed, i, width):
    """Weight i of a run of `2 × width` weights packed in `width` bytes: low halves first."""
    return int(packed[i % width]) >> (4 if i >= width else 0) & 15


def bit(packed, i):
    return int(packed[i // 8]) >> i % 8 & 1


def k_scale(packed, group):
    if group < 4:
        return int(packed[group]) & 63, int(packed[group + 4]) & 63
    scale = int(packed[group + 4]) & 15 | int(packed[group - 4]) >> 6 << 4
    return scale, int(packed[group + 4]) >> 4 | int(packed[group]) >> 6 << 4


def by_formula(block, kind, i):
    """Weight i of one block, from the comments and structures of ggml-common.h."""
    if kind == "Q4_0":
        return half(block, 0) * (nibble(block[2:], i, 16) - 8)
    if kind == "Q4_1":
        return half(block, 0) * nibble(block[4:], i, 16) + half(block, 2)
    if kind == "Q5_0":
        return half(block, 0) * ((nibble(block[6:], i, 16) | bit(block[2:6], i) << 4) - 16)
    if kind == "Q5_1":
        return half(block, 0) * (nibble(block[8:], i, 16) | bit(block[4:8], i) << 4) + half(
            block, 2
        )
    if kind == "Q8_0":
        return half(block, 0) * int(np.int8(block[2 + i]))
    group, pair, place = i // 32, i // 64, i % 64
    if kind in ("Q4_K", "Q5_K"):
        scale, offset = k_scale(block[4:16], group)
        at = 16 if kind == "Q4_K" else 48
        q = nibble(block[at + 32 * pair : at + 32 * pair + 32], place, 32)
        if kind == "Q5_K":
            q |= (int(block[16 + i % 32]) >> group & 1) << 4
        return half(block, 0) * scale * q - half(block, 2) * offset
    part, quarter, place = i // 128, i % 128 // 32, i % 32
    if kind == "Q2_K":
        scales, q = int(block[i // 16]), int(block[16 + 32 * part + place]) >> 2 * quarter & 3
        return half(block, 80) * (scales & 15) * q - half(block, 82) * (scales >> 4)
    if kind == "Q3_K":
        at, high = i // 16, int(block[place]) >> 4 * part + quarter & 1
        scale = int(block[96 + at % 8]) >> (4 if at >= 8 else 0) & 15
        scale |= (int(block[104 + at % 4]) >> 2 * (at // 4) & 3) << 4
        q = int(block[32 + 32 * part + place]) >> 2 * quarter & 3
        return half(block, 108) * (scale - 32) * (q - (0 if high else 4))
    assert kind == "Q6_K"
    low = int(block[64 * part + place + 32 * (quarter % 2)]) >> (4 if quarter >= 2 else 0) & 15
    high = int(block[128 + 32 * part + place]) >> 2 * quarter & 3
    return half(block, 208) * int(np.int8(block[192 + i // 16])) * ((low | high << 4) - 32)


@pytest.mark.parametrize("kind", [*HALVES, *LATER])
def test_unpacking_is_the_formula(kind):
    blocks = random_blocks(kind, 20)
    ours = dequantize(blocks.tobytes(), kind).reshape(20, -1)
    expected = np.array(
        [[by_formula(block, kind, i) for i in range(BLOCKS[kind][0])] for block in blocks]
    )
    assert ours.dtype == np.float32
    np.testing.assert_allclose(
        ours, expected, rtol=3e-7, atol=3e-7
    )  # a product and a sum, rounded to float32


def weights():
    draw = np.random.default_rng(1)
    rows = [
        draw.normal(0, 0.02, (500, 32)),
        draw.integers(-9, 10, (500, 32)) / 16,  # ties, and equal magnitudes of both signs
        draw.standard_t(2, (500, 32)) * 1e-4,
        np.zeros((3, 32)),
    ]
    return np.concatenate(rows).astype(np.float32).reshape(-1)


def round_half_away(x):
    return int(abs(x) + 0.5) * (1 if x >= 0 else -1)


def test_packing_is_the_formula():
    for block in weights().reshape(-1, 32)[::7]:
        exact = block.astype(float)
        eight = quantize(block, "Q8_0")
        d = max(abs(exact)) / 127
        assert half(eight, 0) == float(np.float16(d))
        for x, q in zip(exact, eight[2:].view(np.int8)):
            ideal = x / d if d else 0
            assert q == round_half_away(ideal) or abs(abs(ideal) % 1 - 0.5) < 1e-4
        four = quantize(block, "Q4_0")
        largest = max(exact, key=abs)
        assert half(four, 0) == float(np.float16(largest / -8))
        for i, x in enumerate(exact):
            ideal = x / (largest / -8) + 8.5 if largest else 8.5
            assert (
                nibble(four[2:], i, 16) == min(15, int(ideal)) or abs(ideal - round(ideal)) < 1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_once_loses_nothing_more(kind):
    once = dequantize(quantize(weights(), kind), kind)
    assert np.array_equal(dequantize(quantize(once, kind), kind), once)


def test_bfloat16_rounds_to_even_and_keeps_what_is_no_number():
    x = np.array(
        [1.00390625, 1.01171875, -1.00390625, np.inf, -np.inf, np.nan, 3.39e38], np.float32
    )
    back = dequantize(quantize(x, "BF16"), "BF16")
    np.testing.assert_array_equal(
        back, np.array([1, 1.015625, -1, np.inf, -np.inf, np.nan, 3.3895314e38], np.float32)
    )
