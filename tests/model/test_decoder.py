"""The network against transformers' Qwen2, and packed rows against single documents."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from openqwen.model import Cache, ModelConfig, Packed, Paged, Qwen2, Scorer, initialize

SHAPES = [  # hidden, heads, key/value heads, tied
    (64, 4, 4, True),
    (64, 4, 2, False),
    (96, 6, 1, True),
    (64, 2, 1, False),
]


def make(hidden, heads, kv_heads, tied, layers=3):
    config = ModelConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=2 * hidden + 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=10_000.0,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = Qwen2(config)
    generator = torch.Generator().manual_seed(hidden + heads)
    initialize(model, generator)
    with (
        torch.no_grad()
    ):  # biases and norms away from their start, or an unused one would go unseen
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def reference(model):
    config = transformers.Qwen2Config(**model.config.to_json())
    config._attn_implementation = "eager"
    theirs = transformers.Qwen2ForCausalLM(config)
    missing, extra = theirs.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    model = make(*shape)
    theirs = reference(model)
    tokens = torch.randint(0, 128, (41,), generator=torch.Generator().manual_seed(1))
    packed = Packed.from_lengths([41])
    logits = model.logits(model(tokens, packed.positions, packed))
    expected = theirs(tokens[None]).logits[0]
    scale = expected.abs().max()
    assert (logits - expected).abs().max() / scale < 1e-5

    torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    torch.nn.functional.cross_entropy(expected[:-1], tokens[1:]).backward()
    grads = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        error = (p.grad - grads[name].grad).abs().max() / grads[name].grad.abs().max()
        assert error < 1e-4, name


def test_packed_documents_are_blind_to_each_other():
    model = make(64, 4, 2, True)
    lengths = [5, 17, 1, 6, 5, 30, 2]
    tokens = torch.randint(0, 128, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    packed = Packed.from_lengths(lengths)
    together = model(tokens, packed.positions, packed)
    together.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = []
    for piece in tokens.split(lengths):
        one = Packed.from_lengths([len(piece)])
        alone.append(model(piece, one.positions, one))
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.cat(alone).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(
                grads[name], p.grad, rtol=1e-4, atol=1e-3 * p.grad.abs().max().item() + 1e-5
            )


def test_packed_buckets_waste_little_and_lose_no_token():
    packed = Packed.from_lengths([3, 50, 4, 49, 3, 5, 1])
    layout = packed._layout(())
    padded = sum(g.numel() for g in layout.gathers)
    assert padded <= 1.25 * packed.total
    assert sorted(layout.order.tolist()) == sorted(set(layout.order.tolist()))
    rows = torch.cat([g.flatten() for g in layout.gathers])
    assert torch.equal(rows[layout.order], torch.arange(packed.total))


def test_paged_equals_packed_however_the_tokens_are_fed():
    model = make(64, 4, 2, False)
    lengths = [9, 4, 13]
    tokens = torch.randint(0, 128, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    packed = Packed.from_lengths(lengths)
    expected = model(tokens, packed.positions, packed).split(lengths)
    pieces = tokens.split(lengths)
    cache = Cache(model.config, 16, 4)
    tables = torch.tensor([[3, 7, 1, 0], [2, 0, 0, 0], [15, 4, 9, 5]])
    fed = [0, 0, 0]
    got = [[], [], []]
    for new in ([4, 1, 5], [1, 3, 1], [4, 0, 7]):
        active = [i for i in range(3) if new[i]]
        call = torch.cat([pieces[i][fed[i] : fed[i] + new[i]] for i in active])
        positions = torch.cat([torch.arange(fed[i], fed[i] + new[i]) for i in active])
        totals = [fed[i] + new[i] for i in active]
        paged = Paged(cache, tables[active], totals, [new[i] for i in active])
        with torch.inference_mode():
            out = model(call, positions, paged)
        for i, part in zip(active, out.split([new[i] for i in active])):
            got[i].append(part)
            fed[i] += new[i]
    for mine, theirs in zip(got, expected):
        assert_close(torch.cat(mine), theirs, rtol=1e-4, atol=1e-5)


def test_scorer_equals_transformers_sequence_classification():
    model = make(64, 4, 2, True)
    scorer = Scorer(model.config, {"truthfulness": 1.0, "conciseness": 0.5, "relevance": 1.0})
    scorer.model.load_state_dict(model.model.state_dict())
    config = transformers.Qwen2Config(**scorer.config.to_json(), num_labels=3, pad_token_id=0)
    theirs = transformers.Qwen2ForSequenceClassification(config)
    theirs.load_state_dict(scorer.state_dict())
    tokens = torch.randint(1, 128, (12,), generator=torch.Generator().manual_seed(4))
    packed = Packed.from_lengths([12])
    mine = scorer(tokens, packed.positions, packed, torch.tensor([11]))
    expected = theirs.eval()(tokens[None]).logits
    assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert_close(
        scorer.reward(mine), expected @ torch.tensor([1.0, 0.5, 1.0]), rtol=1e-4, atol=1e-5
    )
