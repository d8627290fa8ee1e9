"""Long context through the whole network: sequences read differently in one batch, the cache
against packed rows.
"""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from openqwen.model import (
    Cache,
    DualChunk,
    LongContext,
    ModelConfig,
    Packed,
    Paged,
    Qwen2,
    Yarn,
    dual_chunk,
    initialize,
)
from openqwen.model.long_context import context_tokens, describe, stages, trained_window
from openqwen.support.errors import OpenQwenError

PLAIN = LongContext()
YARN = LongContext(Yarn(4.0, 16))
CHUNKS = LongContext(dual_chunk=DualChunk(14, 5))
BOTH = LongContext(Yarn(2.0, 16), DualChunk(14, 5))
SCALED = LongContext(dual_chunk=DualChunk(14, 5, original_max_position_embeddings=12))
WAYS = {"plain": PLAIN, "yarn": YARN, "chunks": CHUNKS, "both": BOTH, "scaled": SCALED}


def make(long_context=PLAIN):
    config = ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1_000.0,
        max_position_embeddings=256,
        initializer_range=0.2,
        yarn=long_context.yarn,
        dual_chunk=long_context.dual_chunk,
    )
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(7))
    return model


def tokens_of(count, seed=1):
    return torch.randint(0, 128, (count,), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, lengths, long_context=None):
    packed = Packed.from_lengths(lengths, long_context)
    out = model(tokens, packed.positions, packed)
    model.zero_grad()
    weights = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    (out * weights[tokens]).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.model.layers.parameters()]


def assert_same_bits(one, two):
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


@pytest.mark.parametrize("lengths", [[9], [9, 9, 9], [5, 9, 2, 9, 7], [1]])
@pytest.mark.parametrize("theirs", [CHUNKS, LongContext(Yarn(1.0, 4), DualChunk(14, 5, 9))])
def test_sequences_within_a_chunk_keep_every_bit(lengths, theirs):
    tokens = tokens_of(sum(lengths))
    plain = run(make(), tokens, lengths)
    assert_same_bits(plain, run(make(), tokens, lengths, PLAIN))
    assert_same_bits(plain, run(make(), tokens, lengths, theirs))
    assert_same_bits(plain, run(make(theirs), tokens, lengths))
    assert_same_bits(plain, run(make(theirs), tokens, lengths, PLAIN))


def test_one_token_more_than_a_chunk_is_no_longer_plain():
    tokens = tokens_of(10)
    (plain, _), (chunks, _) = run(make(), tokens, [10]), run(make(CHUNKS), tokens, [10])
    assert not torch.equal(plain[-1], chunks[-1])
    assert_close(plain[:9], chunks[:9], rtol=1e-4, atol=1e-5)


def test_what_the_checkpoint_says_is_what_an_argument_can_say():
    for long_context in WAYS.values():
        tokens = tokens_of(50)
        assert_same_bits(
            run(make(), tokens, [30, 20], long_context), run(make(long_context), tokens, [30, 20])
        )


@pytest.mark.parametrize("own", ["plain", "both"])
def test_sequences_read_differently_share_a_batch(own):
    model = make(WAYS[own])
    lengths = [40, 9, 23, 40, 31, 12, 40, 9]
    ways = [CHUNKS, PLAIN, YARN, BOTH, SCALED, SCALED, None, CHUNKS]
    tokens = tokens_of(sum(lengths))
    out, grads = run(model, tokens, lengths, ways)
    alone = [
        run(model, piece, [len(piece)], way) for piece, way in zip(tokens.split(lengths), ways)
    ]
    assert_close(out, torch.cat([o for o, _ in alone]), rtol=1e-4, atol=1e-5)
    for found, *expected in zip(grads, *(g for _, g in alone)):
        total = sum(expected)
        assert_close(found, total, rtol=1e-4, atol=1e-4 * float(total.abs().max()) + 1e-5)
    kept = [run(model, piece, [len(piece)], PLAIN)[0] for piece in tokens.split(lengths)]
    different = [not torch.allclose(a, b, atol=1e-3) for (a, _), b in zip(alone, kept)]
    assert different == [True, False, True, True, True, False, own == "both", False]


def test_length_scaling_starts_beyond_the_original_length():
    dual = DualChunk(14, 5, original_max_position_embeddings=20)
    tokens = tokens_of(21)
    unscaled = make(LongContext(dual_chunk=DualChunk(14, 5)))
    assert_same_bits(
        run(make(LongContext(dual_chunk=dual)), tokens[:20], [20]), run(unscaled, tokens[:20], [20])
    )
    (scaled, _), (plain, _) = (
        run(make(LongContext(dual_chunk=dual)), tokens, [21]),
        run(unscaled, tokens, [21]),
    )
    assert not torch.equal(scaled, plain)


def test_rows_that_were_scored_can_be_learned():
    model, tokens = make(CHUNKS), tokens_of(60)
    packed = Packed.from_lengths([20, 7, 30, 3])
    with torch.inference_mode():
        scored = model(tokens, packed.positions, packed)
    learned = model(tokens, packed.positions, packed)
    learned[:, 0].sum().backward()
    assert torch.equal(scored, learned)


def test_a_context_for_each_sequence_or_an_error():
    with pytest.raises(ValueError, match="2 long contexts for 3 sequences"):
        Packed.from_lengths([1, 2, 3], [None, PLAIN])


def feed(model, tokens, lengths, calls, ways, page_size=4):
    """Hidden states of the sequences, fed as the calls say (new tokens of each)."""
    pages = 4 * len(lengths) * (max(lengths) // 4 + 1)
    cache = Cache(model.config, pages, page_size)
    width = max(lengths) // 4 + 1
    tables = torch.randperm(pages, generator=torch.Generator().manual_seed(0))[
        : width * len(lengths)
    ].view(-1, width)
    pieces = tokens.split(lengths)
    fed, got = [0] * len(lengths), [[] for _ in lengths]
    for new in calls:
        active = [i for i, n in enumerate(new) if n]
        counts = [new[i] for i in active]
        call = torch.cat([pieces[i][fed[i] : fed[i] + new[i]] for i in active])
        positions = torch.cat([torch.arange(fed[i], fed[i] + new[i]) for i in active])
        paged = Paged(
            cache,
            tables[active],
            [fed[i] + new[i] for i in active],
            counts,
            [ways[i] for i in active],
        )
        with torch.inference_mode():
            out = model(call, positions, paged)
        for i, part in zip(active, out.split(counts)):
            got[i].append(part)
            fed[i] += new[i]
    assert fed == lengths
    return [torch.cat(g) for g in got]


@pytest.mark.parametrize("path", [dual_chunk.fused, dual_chunk.plain])
@pytest.mark.parametrize("own", ["plain", "both"])
def test_paged_equals_packed_across_chunk_borders(own, path, monkeypatch):
    monkeypatch.setattr(dual_chunk, "fused", path)
    model = make(WAYS[own])
    lengths = [41, 9, 30, 28, 10]
    ways = [CHUNKS, CHUNKS, YARN, BOTH, None]
    tokens = tokens_of(sum(lengths))
    packed = Packed.from_lengths(lengths, ways)
    expected = model(tokens, packed.positions, packed).split(lengths)
    calls = (
        [[20, 4, 8, 0, 0], [1, 1, 1, 9, 5], [0, 4, 20, 1, 5]]
        + [[1, 0, 0, 1, 0]] * 18
        + [[2, 0, 1, 0, 0]]
    )
    for found, wanted in zip(feed(model, tokens, lengths, calls, ways), expected):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_whole_prompt_in_one_call_is_scaled_by_its_length():
    model = make(SCALED)
    tokens = tokens_of(40)
    packed = Packed.from_lengths([40])
    (found,) = feed(model, tokens, [40], [[40]], [None])
    assert_close(found, model(tokens, packed.positions, packed), rtol=1e-4, atol=1e-5)


def profile(config, tokens, most=None):
    return next(stage.way for stage in stages(config, most) if tokens <= stage.until)


SMALL = ModelConfig(128, 64, 136, 1, 4, 2, max_position_embeddings=1_024)


def test_a_request_gets_the_smallest_factor_that_covers_it():
    assert [profile(SMALL, n, 4_096) for n in (1, 1_024)] == [LongContext()] * 2
    assert (
        profile(SMALL, 1_025, 4_096)
        == profile(SMALL, 2_048, 4_096)
        == LongContext(Yarn(2.0, 1_024))
    )
    assert profile(SMALL, 2_049, 4_096) == LongContext(Yarn(4.0, 1_024))
    assert [s.until for s in stages(SMALL, 4_096)] == [1_024, 2_048, 4_096]
    assert [s.until for s in stages(SMALL, 3_000)] == [1_024, 2_048, 3_000]
    assert [s.until for s in stages(SMALL)] == [1_024]


def test_beyond_yarn_a_request_is_read_in_chunks():
    dual = DualChunk(1_024, 32, 1_024)
    assert profile(SMALL, 1_024, 100_000) == LongContext()
    assert profile(SMALL, 1_025, 100_000) == LongContext(None, dual, 2_048)
    assert profile(SMALL, 10_000, 100_000) == LongContext(None, dual, 16_384)


def test_a_checkpoint_that_states_its_long_context():
    million = ModelConfig.named("qwen2.5-7b-instruct-1m")
    assert trained_window(million) == 262_144
    assert profile(million, 5) == LongContext(None, million.dual_chunk, 262_144)
    assert profile(million, 1_000_000) == LongContext(None, million.dual_chunk, 1_048_576)
    static = replace(SMALL, yarn=Yarn(4.0, 1_024))
    assert profile(static, 1_000) == LongContext()
    assert profile(static, 4_096) == LongContext(Yarn(4.0, 1_024))
    base = ModelConfig.named("qwen2.5-7b")
    assert (base.max_position_embeddings, trained_window(base)) == (131_072, 32_768)
    assert profile(base, 100_000) == LongContext(Yarn(4.0, 32_768))


def test_a_maximum_says_what_it_means():
    config = ModelConfig.named("qwen2.5-7b-instruct")
    assert describe(config) == "context 32,768: requests of up to 32,768 tokens are read as trained"
    assert "longer ones by YARN × 2 or 4, chosen for each request" in describe(
        config, context_tokens("128k")
    )
    assert describe(config, 40_000).endswith("YARN × 2, chosen for each request")
    assert "Dual Chunk Attention in chunks of 31,744" in describe(config, context_tokens("1m"))
    assert [context_tokens(t) for t in ("128k", "1M", "40000")] == [131_072, 1_048_576, 40_000]
    for wrong in ("", "k", "-1", "0", "1.5m", "128kb", "³k"):
        with pytest.raises(OpenQwenError, match="not a context length"):
            context_tokens(wrong)


def test_a_profile_reads_the_same_however_the_tokens_are_fed():
    model, tokens = make(), tokens_of(60)
    way = LongContext(dual_chunk=DualChunk(24, 8, 16), tokens=64)
    packed = Packed.from_lengths([60], way)
    expected = model(tokens, packed.positions, packed)
    (found,) = feed(model, tokens, [60], [[30]] + [[1]] * 5 + [[25]], [way])
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    scaled = LongContext(
        dual_chunk=DualChunk(24, 8, 16)
    )  # by its own length at each call, as in vLLM
    (other,) = feed(model, tokens, [60], [[30]] + [[1]] * 5 + [[25]], [scaled])
    assert not torch.allclose(other[35:], expected[35:], atol=1e-3)
    unscaled = LongContext(dual_chunk=DualChunk(24, 8))
    assert not torch.allclose(feed(model, tokens, [60], [[60]], [unscaled])[0], expected, atol=1e-3)


@pytest.mark.parametrize("page_size", [4, 16])
def test_factor_one_and_one_chunk_change_no_bit_of_paged_reading(page_size):
    model, tokens = make(), tokens_of(30)
    calls = [[16], [1], [13]]
    (plain,) = feed(model, tokens, [30], calls, [None], page_size)
    for way in (
        LongContext(Yarn(1.0, 8)),
        LongContext(dual_chunk=DualChunk(40, 8, 64)),
        profile(SMALL, 30, 100_000),
    ):
        assert torch.equal(feed(model, tokens, [30], calls, [way], page_size)[0], plain)
