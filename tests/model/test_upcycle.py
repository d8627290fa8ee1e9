"""Upcycling: what the cut keeps of the dense network, what it draws anew, and the published
geometry.
"""

import pytest
import torch
from torch.testing import assert_close

from openqwen.model import ModelConfig, Packed, Qwen2, initialize
from openqwen.model.feed_forward import FeedForward
from openqwen.model.upcycle import (
    Upcycling,
    default_shared_width,
    default_width,
    redraw,
    strip,
    upcycle,
    upcycled_config,
)
from openqwen.support.errors import OpenQwenError


def dense_model(width=40, **changes):
    values = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    config = ModelConfig(128, 32, width, max_position_embeddings=64, **(values | changes))
    model = Qwen2(config).double()
    initialize(model, torch.Generator().manual_seed(0))
    return model


def expert(mlp, e, x_TD):
    """Expert number e alone, weight 1."""
    ones = torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
    return mlp.experts(x_TD, torch.full((len(x_TD), 1), e), ones)


@pytest.mark.parametrize(
    ("experts", "width", "copies"), [(4, 10, 1), (5, 8, 1), (5, 16, 2), (15, 8, 3), (25, 24, 15)]
)
def test_all_experts_of_whole_copies_sum_to_copies_times_the_dense_network(experts, width, copies):
    """No matter whether an expert straddles two copies (widths that do not divide 40)."""
    dense = dense_model()
    plan = Upcycling(experts, 2, width, shared_width=8, reinit=0.0)
    model = upcycle(dense, plan, seed=3)
    x = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, parent in zip(model.model.layers, dense.model.layers):
        total = sum(expert(mine.mlp, e, x) for e in range(experts))
        assert_close(total, copies * parent.mlp(x))


def test_the_strip_is_shuffled_copies_end_to_end_and_the_rest_is_discarded():
    places = strip(18_944, 64 * 2_560, torch.Generator().manual_seed(0))
    assert len(places) == 163_840
    copies = places[: 8 * 18_944].view(8, 18_944)
    assert torch.equal(copies.sort(1).values, torch.arange(18_944).expand(8, -1))
    assert len({tuple(c[:20].tolist()) for c in copies}) == 8
    rest = places[8 * 18_944 :]
    assert len(rest) == 18_944 - 6_656
    assert len(rest.unique()) == len(rest)


def test_experts_differ_and_are_slices_of_the_dense_network():
    dense = dense_model()
    model = upcycle(dense, Upcycling(6, 2, 16, shared_width=8, reinit=0.0), seed=3)
    parent, mlp = dense.model.layers[1].mlp, model.model.layers[1].mlp
    seen = set()
    for gate_up, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj):
        gate, up = gate_up.chunk(2)
        places = [int((parent.gate_proj.weight == row).all(1).nonzero()) for row in gate]
        assert torch.equal(up, parent.up_proj.weight[places])
        assert torch.equal(down, parent.down_proj.weight[:, places])
        seen.add(tuple(sorted(places)))
    assert len(seen) == 6


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_each_experts_channels_is_drawn_anew_with_its_mean_and_deviation(share):
    dense = dense_model(width=64)
    kept = upcycle(dense, Upcycling(8, 2, 32, shared_width=8, reinit=0.0), seed=5)
    drawn = upcycle(dense, Upcycling(8, 2, 32, shared_width=8, reinit=share), seed=5)
    for before, after in zip(kept.model.layers, drawn.model.layers):
        a, b = before.mlp.experts, after.mlp.experts
        gate_same, up_same = (a.gate_up_proj == b.gate_up_proj).all(2).chunk(2, dim=1)
        down_same = (a.down_proj == b.down_proj).all(1)
        assert torch.equal(gate_same, up_same)  # whole channels
        assert torch.equal(gate_same, down_same)
        assert gate_same.sum(1).tolist() == [round(32 * (1 - share))] * 8


def test_what_is_drawn_anew_follows_the_experts_own_distribution():
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(2, 400, 50, generator=generator) * s + m for s, m in ((0.1, 0.3), (2.0, -1.0))
    ]
    parts[0][1] *= 3
    wanted = [[(float(e.mean()), float(e.std())) for e in part] for part in parts]
    redraw(parts, 1.0, generator)
    for part, per_expert in zip(parts, wanted):
        for e, (mean, deviation) in zip(part, per_expert):
            assert float(e.mean()) == pytest.approx(mean, abs=0.05 * deviation)
            assert float(e.std()) == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("shared_width", [40, 56, 88])
def test_the_shared_expert_alone_gives_the_parents_output(shared_width):
    dense = dense_model()
    model = upcycle(dense, Upcycling(4, 2, 10, shared_width), seed=7)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    tokens = torch.randint(0, 128, (11,), generator=torch.Generator().manual_seed(2))
    packed = Packed.from_lengths([11])
    assert_close(model(tokens, packed.positions, packed), dense(tokens, packed.positions, packed))


def test_without_keep_output_the_shared_expert_is_a_plain_slice():
    dense = dense_model()
    model = upcycle(dense, Upcycling(4, 2, 10, 40, keep_output=False), seed=7)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, parent in zip(model.model.layers, dense.model.layers):
        assert_close(mine.mlp.shared_expert(x), parent.mlp(x))


@pytest.mark.parametrize("tied", [True, False])
def test_everything_else_is_taken_over_and_the_parent_left_alone(tied):
    dense = dense_model(tie_word_embeddings=tied)
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    model = upcycle(dense, Upcycling(4, 2, vocabulary_rows=100), seed=1)
    for name, tensor in model.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(tensor, before[name][: len(tensor)]), name
    assert len(model.model.embed_tokens.weight) == len(model.head_VD) == 100
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())


def test_the_same_seed_gives_the_same_network():
    dense = dense_model()
    first, again, other = (upcycle(dense, Upcycling(4, 2), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not torch.equal(
        first["model.layers.0.mlp.gate.weight"], other["model.layers.0.mlp.gate.weight"]
    )
    assert not torch.equal(
        first["model.layers.0.mlp.gate.weight"], first["model.layers.1.mlp.gate.weight"]
    )


def test_half_precision_stays_half_precision():
    model = upcycle(dense_model().bfloat16(), Upcycling(4, 2), seed=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_7b_becomes_the_57b_a14b():
    dense = ModelConfig.named("qwen2-7b")
    published = ModelConfig.named("qwen2-57b-a14b")
    config = upcycled_config(
        dense, Upcycling(vocabulary_rows=151_936)
    )  # the defaults are its proportions
    assert config == published
    assert config.parameters() == 57_408_658_944
    assert upcycled_config(dense, Upcycling()).vocab_size == 152_064
    with torch.device("meta"):
        network = Qwen2(config)
        dense_mlp = FeedForward(dense.hidden_size, dense.intermediate_size)
    mlp = network.model.layers[0].mlp
    assert mlp.experts.gate_up_proj.shape == (64, 2 * 2_560, 3_584)
    assert mlp.shared_expert.down_proj.weight.shape == (3_584, 20_480)
    assert dense_mlp.down_proj.weight.shape == (3_584, 18_944)
    assert sum(p.numel() for p in network.parameters()) == published.parameters()


@pytest.mark.parametrize(
    ("dense", "width", "shared"),
    [
        (18_944, 2_560, 20_480),
        (704, 96, 768),
        (512, 64, 512),
        (530, 64, 530),
        (4_864, 656, 5_248),
        (8, 16, 128),
    ],
)
def test_default_widths(dense, width, shared):
    assert (default_width(dense), default_shared_width(dense)) == (width, shared)


def test_what_cannot_be_upcycled_is_refused():
    dense = ModelConfig.named("qwen2-7b")
    with pytest.raises(OpenQwenError, match="experts already"):
        upcycled_config(ModelConfig.named("qwen2-57b-a14b"), Upcycling())
    with pytest.raises(OpenQwenError, match="152064 embedding rows, not 160000"):
        upcycled_config(dense, Upcycling(vocabulary_rows=160_000))
    with pytest.raises(OpenQwenError, match="not from 0 to 1"):
        upcycled_config(dense, Upcycling(reinit=1.5))
    with pytest.raises(OpenQwenError, match="9 of 8 experts"):
        upcycled_config(dense, Upcycling(experts=8, experts_per_token=9))
