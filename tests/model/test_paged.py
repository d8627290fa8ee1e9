"""The compiled attention over pages: equal to the plain path, and the same bits however the work is
cut.
"""

import platform
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from openqwen.model import (
    Cache,
    DualChunk,
    LongContext,
    ModelConfig,
    Paged,
    Qwen2,
    Yarn,
    initialize,
    kernels,
    paged,
)
from openqwen.model.quantize import quantize
from openqwen.support import native

PLAIN = LongContext()
YARN = LongContext(Yarn(4.0, 64))
CHUNKS = LongContext(dual_chunk=DualChunk(80, 16, 100), tokens=900)
BOTH = LongContext(Yarn(2.0, 64), DualChunk(48, 32))
WAYS = [PLAIN, YARN, CHUNKS, BOTH]

pytestmark = pytest.mark.skipif(
    not paged.has_kernel(Cache(ModelConfig(8, 64, 8, 1, 4, 2), 1, 16)),
    reason="no C++ compiler here",
)


def config_of(heads=4, kv_heads=2, width=16, layers=1):
    return ModelConfig(8, heads * width, 8, layers, heads, kv_heads, rope_theta=1_000.0)


def bias_of(config, size=0.0):
    generator = torch.Generator().manual_seed(11)
    return size * torch.randn(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, generator=generator
    )


class Sequences:
    """Queries, keys and values of whole sequences, fed in calls to a cache; rows of one projection,
    so strided.
    """

    def __init__(self, config, lengths, ways, page_size=16, format="float", bias=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.config, self.lengths, self.ways = config, lengths, ways
        heads, kv_heads, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias_NKd = bias_of(config, bias)
        self.parts = []
        for length in lengths:
            merged = torch.randn(length, (heads + 2 * kv_heads) * width, generator=generator)
            _, k, _ = merged.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
            k += bias_NKd[0].flatten()
            self.parts.append(merged)
        needed = [-(-length // page_size) for length in lengths]
        self.cache = Cache(config, sum(needed) + 1, page_size, format, key_bias_NKd=bias_NKd)
        free = (torch.randperm(sum(needed), generator=generator) + 1).split(needed)
        self.tables = torch.zeros(len(lengths), max(needed), dtype=torch.long)
        for i, pages in enumerate(free):
            self.tables[i, : len(pages)] = pages
        self.done = [0] * len(lengths)
        self.outs = [[] for _ in lengths]

    def call(self, new, way="compiled"):
        """Feed so many more tokens of each."""
        active = [i for i, n in enumerate(new) if n]
        counts = [new[i] for i in active]
        merged = torch.cat([self.parts[i][self.done[i] : self.done[i] + new[i]] for i in active])
        width = self.config.head_dim
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = merged.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
        positions = torch.cat([torch.arange(self.done[i], self.done[i] + new[i]) for i in active])
        totals = [self.done[i] + new[i] for i in active]
        attention = Paged(
            self.cache, self.tables[active], totals, counts, [self.ways[i] for i in active]
        )
        inputs = [
            q.unflatten(1, (heads, width)),
            k.unflatten(1, (kv_heads, width)),
            v.unflatten(1, (kv_heads, width)),
        ]
        rotation = attention.rotation(positions, self.config)
        run = attention.attend if way == "compiled" else attention._plain
        for i, out in zip(active, run(*inputs, rotation, 0).split(counts), strict=True):
            self.outs[i].append(out)
            self.done[i] += new[i]

    def result(self):
        return [torch.cat(out) for out in self.outs]


def run(calls, *arguments, way="compiled", **options):
    sequences = Sequences(*arguments, **options)
    for new in calls:
        sequences.call(new, way)
    return sequences


def pieces(draw, length):
    """A cut of a length into calls."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=3)))
    edges = [0, *(c for c in cuts if c < length), length]
    return [b - a for a, b in pairwise(edges)]


@st.composite
def cases(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 7), (2, 3), (1, 9), (2, 70)]))
    config = config_of(kv_heads * group, kv_heads, draw(st.sampled_from([16, 32, 48])))
    lengths = draw(st.lists(st.integers(1, 700), min_size=1, max_size=4))
    ways = [draw(st.sampled_from(WAYS)) for _ in lengths]
    fed = [pieces(draw, n) for n in lengths]
    calls = [[f[c] if c < len(f) else 0 for f in fed] for c in range(max(map(len, fed)))]
    page_size, format = draw(st.sampled_from([16, 32])), draw(st.sampled_from(["float", "int8"]))
    return (
        calls,
        config,
        lengths,
        ways,
        {"page_size": page_size, "format": format, "bias": draw(st.sampled_from([0.0, 5.0]))},
    )


@settings(max_examples=30, deadline=None)
@given(cases())
def test_compiled_equals_plain_for_any_mixture(case):
    calls, *arguments, options = case
    ours, plain = (run(calls, *arguments, way=way, **options) for way in ("compiled", "plain"))
    # Where rounding to int8 meets a tie, the two paths may fall on its two sides; hence the wider
    # tolerance there. A bias makes scores large, and their rounding with them.
    exact = {"rtol": 1e-5, "atol": 5e-5 if options["bias"] else 1e-5}
    limits = exact if options["format"] == "float" else {"rtol": 1e-3, "atol": 2e-2}
    for a, b in zip(ours.result(), plain.result(), strict=True):
        assert_close(a, b, **limits)
    rounding = 1e-4 if options["format"] == "float" else 1
    assert_close(ours.cache.keys.float(), plain.cache.keys.float(), rtol=1e-5, atol=rounding)
    assert_close(ours.cache.values.float(), plain.cache.values.float(), rtol=0, atol=rounding)


@settings(max_examples=20, deadline=None)
@given(cases(), st.sampled_from([1, 2, 3]))
def test_neighbours_cuts_and_threads_change_no_bit(case, threads):
    calls, config, lengths, ways, options = case
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = run(calls, config, lengths, ways, **options)
        torch.set_num_threads(1)
        whole = run([lengths], config, lengths, ways, **options)
        for i, length in enumerate(lengths):
            alone = Sequences(config, lengths, ways, **options)
            alone.call([length if j == i else 0 for j in range(len(lengths))])
            assert torch.equal(together.result()[i], whole.result()[i])
            assert torch.equal(together.result()[i], torch.cat(alone.outs[i]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3])
def test_one_long_sequence_is_read_in_parts_to_the_same_bits(threads):
    config = config_of(14, 2, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(run([[3000]] + [[1]] * 3, config, [3003], [PLAIN]).result()[0])
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_a_short_request_beside_long_ones_keeps_every_bit():
    config = config_of()
    lengths = [60, 600, 500, 64]
    mixed = run(
        [[50, 300, 500, 64], [10, 300, 0, 0]], config, lengths, [PLAIN, CHUNKS, YARN, CHUNKS]
    )
    plain = run([[50, 300, 500, 64], [10, 300, 0, 0]], config, lengths, [PLAIN] * 4)
    kept = [torch.equal(a, b) for a, b in zip(mixed.result(), plain.result(), strict=True)]
    assert kept[0]
    assert not kept[1]
    assert not kept[2]


def test_what_does_not_suit_the_kernel_takes_the_plain_path():
    assert paged.has_kernel(Cache(config_of(), 1, 16))
    assert not paged.has_kernel(Cache(config_of(), 1, 8))
    assert not paged.has_kernel(Cache(config_of(width=8), 1, 16))
    assert not paged.has_kernel(Cache(config_of(), 1, 16, dtype=torch.float64))
    uneven = LongContext(dual_chunk=DualChunk(50, 20))
    ours, plain = (
        run([[100], [1]], config_of(), [101], [uneven], way=way) for way in ("compiled", "plain")
    )
    assert torch.equal(ours.result()[0], plain.result()[0])


def test_a_broken_number_shows_and_stays_in_its_sequence():
    config, lengths = config_of(), [40, 300]
    whole = run([lengths], config, lengths, [PLAIN] * 2).result()
    for part, seen in (
        (slice(0, 64), slice(20, 21)),
        (slice(96, 128), slice(20, None)),
    ):  # a query; a value
        for number in (float("nan"), float("inf")):
            sequences = Sequences(config, lengths, [PLAIN] * 2)
            sequences.parts[1][20, part] = number
            sequences.call(lengths)
            other, hurt = sequences.result()
            assert torch.equal(other, whole[0])
            assert not hurt[seen].isfinite().all(-1).any()


def test_nothing_is_read_or_written_outside_the_pages():
    sequences = Sequences(config_of(), [40], [PLAIN])
    good = sequences.tables
    for tables in (good[:, :2], torch.full_like(good, sequences.cache.pages), good - 10):
        sequences.tables = tables
        with pytest.raises(ValueError, match="too few for 40 tokens"):
            sequences.call([40])


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2", "-mno-fma")])
@pytest.mark.parametrize("format", ["float", "int8"])
def test_older_processors_get_the_same_to_rounding(flags, format, monkeypatch):
    folder = Path(kernels.__file__).parent / "native"
    sources = [folder / name for name in ("lanes.h", "pool.h", "pool.cpp", "attention.cpp")]
    if platform.machine() != "x86_64" or not (older := native.load("attention", sources, flags)):
        pytest.skip("builds for older processors are of x86-64")
    function = older.openqwen_paged_attention
    function.argtypes = paged._kernel().argtypes
    case = [[300, 40], [1, 7]], config_of(14, 2, 64), [301, 47], [CHUNKS, YARN]
    ours = run(*case, format=format)
    monkeypatch.setattr(paged, "_kernel", lambda: function)
    for a, b in zip(run(*case, format=format).result(), ours.result(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5 if format == "float" else 2e-2)


@pytest.mark.parametrize("format", ["float", "int8"])
def test_a_quantised_network_gives_the_same_bits_alone_and_in_company(format):
    config = ModelConfig(60, 128, 160, 2, 8, 2, rope_theta=1_000.0, initializer_range=0.2)
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(5))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=5.0)
    model, lengths = quantize(model, "int8"), [70, 300, 25]
    tokens = torch.randint(
        0, 60, (sum(lengths),), generator=torch.Generator().manual_seed(6)
    ).split(lengths)
    tables = torch.arange(60).view(3, 20)

    def feed(calls):
        cache, done, outs = Cache.of(model, 60, 16, format), [0] * 3, [[] for _ in range(3)]
        for new in calls:
            active = [i for i in range(3) if new[i]]
            counts, totals = [new[i] for i in active], [done[i] + new[i] for i in active]
            some = torch.cat([tokens[i][done[i] : done[i] + new[i]] for i in active])
            positions = torch.cat([torch.arange(t - n, t) for n, t in zip(counts, totals)])
            attention = Paged(
                cache, tables[active], totals, counts, [[PLAIN, CHUNKS, YARN][i] for i in active]
            )
            with torch.inference_mode():
                found = model.logits(model(some, positions, attention))
            for i, out in zip(active, found.split(counts)):
                outs[i].append(out)
                done[i] += new[i]
        return [torch.cat(out) for out in outs]

    together = feed([[50, 200, 0], [1, 60, 25], *[[1, 1, 0]] * 19, [0, 21, 0]])
    alone = feed([[70, 0, 0], [0, 300, 0], [0, 0, 25]])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
