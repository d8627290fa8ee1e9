"""Dual Chunk Attention against a dense oracle in float64, forward and backward, and against
published positions.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from openqwen.model import DualChunk, LongContext, ModelConfig, Packed, Yarn
from openqwen.model.dual_chunk import _parts, attend, fused, plain, rotary_positions
from openqwen.model.rope import inverse_frequencies

PATHS = [fused, plain]


def relative(dual, i):
    """Row i of the matrix of rotary distances, from the three positions."""
    key, successive, inter = (x.tolist() for x in rotary_positions(torch.arange(i + 1), dual))
    s = dual.chunk_len
    query = [key[i], successive[i], inter[i]]
    return [query[min(i // s - j // s, 2)] - key[j] for j in range(i + 1)]


def test_positions_of_the_paper():
    paper = DualChunk(chunk_size=9, local_size=3)  # s = 6, c = 10, w = 4: caps at c − 1
    _, successive, inter = rotary_positions(torch.arange(12), paper)
    assert successive.tolist() == [6, 7, 8, 9, 9, 9] * 2
    assert inter.unique().tolist() == [9]
    assert relative(paper, 11) == [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]
    assert relative(paper, 12) == [9, 8, 7, 6, 5, 4, 6, 5, 4, 3, 2, 1, 0]
    assert relative(paper, 14) == [9, 8, 7, 6, 5, 4, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert relative(paper, 17) == [9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]


def test_positions_of_the_released_code():
    code = DualChunk(chunk_size=10, local_size=4)
    key, successive, inter = rotary_positions(torch.arange(12), code)
    assert key.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert successive.tolist() == [6, 7, 8, 9, 10, 10] * 2
    assert inter.unique().tolist() == [10]
    assert relative(code, 14)[:12] == [10, 9, 8, 7, 6, 5, 8, 7, 6, 5, 4, 3]
    million = DualChunk(262_144, 8_192, 262_144)
    _, successive, inter = rotary_positions(torch.tensor([253_951, 253_952 + 8_192]), million)
    assert successive.tolist() == [262_144, 262_144]
    assert inter.tolist() == [262_144, 262_144]
    short = DualChunk(chunk_size=10, local_size=8)  # chunks of 2: the inter query stands at 2·2 − 1
    assert [x.tolist() for x in rotary_positions(torch.arange(4), short)] == [
        [0, 1, 0, 1],
        [2, 3, 2, 3],
        [3] * 4,
    ]


@pytest.mark.parametrize("chunk_len", [1, 2, 3, 6, 7, 30])
def test_parts_hold_every_score_once_under_its_turn(chunk_len):
    for total in range(1, 23):
        for new in range(1, total + 1):
            found = torch.full((new, total), -1)
            for part in _parts(new, total, chunk_len):
                rows = torch.arange(new)[part.rows].view(part.blocks, -1)
                keys = torch.arange(total)[part.keys].view(part.blocks, -1)
                for r, k in zip(rows, keys):
                    square = torch.ones(len(r), len(k), dtype=torch.bool)
                    square = square.tril() if part.causal else square
                    assert (found[r[:, None], k][square] == -1).all()
                    found[r[:, None], k] = torch.where(square, part.rotation, found[r[:, None], k])
            at, key = torch.arange(total - new, total)[:, None], torch.arange(total)
            turn = (at // chunk_len - key // chunk_len).clamp(max=2)
            assert torch.equal(found, torch.where(key <= at, turn, -1))


def oracle(q, k, v, dual, frequencies, temperature=1.0, scale=1.0):
    """One softmax over all n × n scores; every pair turned by its own rotary distance, in complex
    numbers.
    """
    n, group = len(q), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    s, cap = dual.chunk_len, dual.chunk_size
    query = torch.where(i // s == j // s, i % s, (i % s + s).clamp(max=cap))
    query = torch.where(i // s - j // s > 1, min(2 * s - 1, cap), query)
    turn = torch.exp(1j * (query - j % s)[..., None] * frequencies.double())
    q_c, k_c = (torch.complex(*x.chunk(2, -1)) for x in (q, k))
    scores = torch.einsum("ihf,jhf,ijf->hij", q_c, k_c.conj(), turn).real
    scores = scores * temperature**2 * scale / math.sqrt(q.shape[-1])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(j > i, -math.inf).softmax(-1), v)


def tensors(n, heads, kv_heads, head_dim, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, heads, head_dim), (n, kv_heads, head_dim), (n, kv_heads, head_dim)]
    return [
        torch.randn(s, dtype=dtype, generator=generator).mul_(2).requires_grad_() for s in shapes
    ]


def through_packed(q, k, v, config, long_context, lengths):
    packed = Packed.from_lengths(lengths, long_context)
    return packed.attend(q, k, v, packed.rotation(packed.positions, config), 0)


def config_of(q, k):
    heads, head_dim = q.shape[1:]
    return ModelConfig(8, heads * head_dim, 8, 1, heads, k.shape[1], rope_theta=100.0)


def check_equal(out, expected, inputs, rtol=1e-5, seed=0):
    weight = torch.randn(
        expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(seed)
    )
    found = torch.autograd.grad(out, inputs, weight)
    wanted = torch.autograd.grad(expected, inputs, weight)
    assert_close(out, expected, rtol=rtol, atol=rtol)
    for mine, theirs in zip(found, wanted):
        assert_close(mine, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()) + 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    chunk_len=st.integers(1, 20),
    local_size=st.integers(0, 25),
    n=st.integers(1, 90),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    yarn=st.sampled_from([None, Yarn(4.0, 16), Yarn(1.0, 8)]),
    original=st.sampled_from([0, 1, 24, 1000]),
    path=st.sampled_from(["fused", "plain"]),
)
def test_dual_chunks_equal_the_dense_oracle(
    chunk_len, local_size, n, kv_heads, group, yarn, original, path
):
    dual = DualChunk(chunk_len + local_size, local_size, original)
    q, k, v = tensors(n, kv_heads * group, kv_heads, 8, seed=n)
    with pytest.MonkeyPatch.context() as patch:
        if path == "plain":
            patch.setattr("openqwen.model.dual_chunk.fused", plain)
        out = through_packed(q, k, v, config_of(q, k), LongContext(yarn, dual), [n])
    scale = (0.1 * math.log(n / original) + 1) ** 2 if original and n > original else 1.0
    temperature = yarn.temperature if yarn else 1.0
    expected = oracle(q, k, v, dual, inverse_frequencies(8, 100.0, yarn), temperature, scale)
    check_equal(out, expected, (q, k, v))


@pytest.mark.parametrize("new", [1, 4, 11, 23, 40])
def test_the_last_queries_alone_and_both_paths_agree_to_rounding(new, monkeypatch):
    monkeypatch.setattr("openqwen.model.dual_chunk._ROWS", 5)
    generator = torch.Generator().manual_seed(new)
    queries = [
        torch.randn(40, 6, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    _, k, v = tensors(40, 6, 2, 8, seed=1)
    for path in PATHS:
        whole = plain(queries, k, v, 9)[-new:]
        check_equal(path([q[-new:] for q in queries], k, v, 9), whole, (*queries, k, v), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_float64(dtype):
    q, k, v = tensors(100, 4, 2, 16, seed=5)
    config, long_context = config_of(q, k), LongContext(dual_chunk=DualChunk(20, 6))
    expected = through_packed(q, k, v, config, long_context, [100])
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), weight)
    limit = 20 * torch.finfo(dtype).eps
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openqwen.model.dual_chunk.fused", path)
            out = through_packed(*low, config, long_context, [100])
        assert out.dtype == dtype
        assert (out - expected).norm() / expected.norm() < limit
        for mine, theirs in zip(torch.autograd.grad(out, low, weight.to(dtype)), wanted):
            assert mine.dtype == dtype
            assert (mine - theirs).norm() / theirs.norm() < limit


def test_gradients_by_finite_differences():
    queries = [torch.randn(11, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    _, k, v = tensors(11, 2, 1, 4, seed=2)
    assert torch.autograd.gradcheck(lambda *x: attend(x[:3], *x[3:], 4), (*queries, k, v))


def test_a_gradient_that_is_one_number_for_all():
    queries = [torch.randn(20, 4, 8).requires_grad_() for _ in range(3)]
    _, k, v = tensors(20, 4, 2, 8, seed=2, dtype=torch.float32)
    found, wanted = (
        torch.autograd.grad(p(queries, k, v, 6).sum(), (*queries, k, v)) for p in PATHS
    )
    for a, b in zip(found, wanted):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def detached_merge(queries, k, v, chunk_len):
    """The reference code's backward pass: parts merged with weights that carry no gradient."""
    n, group = len(k), queries[0].shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    distance = torch.where(j <= i, (i // chunk_len - j // chunk_len).clamp(max=2), -1)
    outs, sums = [], []
    for turn, q in enumerate(queries):
        scores = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])).masked_fill(
            distance != turn, -math.inf
        )
        sums.append(scores.detach().logsumexp(-1).T)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(0.0), v))
    weights = torch.stack(sums).softmax(0)[..., None]
    return (weights * torch.stack(outs)).sum(0)


def test_merge_weights_without_a_gradient_would_optimise_another_function():
    generator = torch.Generator().manual_seed(0)
    queries = [
        torch.randn(48, 2, 32, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    _, k, v = tensors(48, 2, 2, 32, seed=3)
    exact, reference = attend(queries, k, v, 16), detached_merge(queries, k, v, 16)
    assert_close(exact, reference, rtol=1e-10, atol=1e-10)  # the same outputs …
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad(exact, queries, weight), torch.autograd.grad(reference, queries, weight)
    ):
        assert (mine - theirs).norm() / mine.norm() > 0.05  # … and not the same gradients
    check_equal(attend(queries, k, v, 16), plain(queries, k, v, 16), (*queries, k, v), rtol=1e-12)
