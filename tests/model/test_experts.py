"""Experts against the plain loop, against transformers' Qwen2-MoE, and against the published
sizes.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from openqwen.model import (
    Cache,
    ModelConfig,
    Packed,
    Paged,
    Qwen2,
    Routing,
    experts,
    initialize,
    published,
)
from openqwen.model.experts import Experts


def mixture(**changes):
    values = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    }
    return ModelConfig(**(values | changes))


def make(seed=0, **changes):
    model = Qwen2(mixture(**changes))
    generator = torch.Generator().manual_seed(seed)
    initialize(model, generator)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def plain_loop(x_TD, chosen_Tk, weights_Tk, gate_up_EJD, down_EDI):
    """One token after the other, one expert after the other."""
    rows = []
    for x_D, chosen_k, weights_k in zip(x_TD, chosen_Tk, weights_Tk):
        row_D = torch.zeros_like(x_D)
        for e, w in zip(chosen_k.tolist(), weights_k):
            gate_I, up_I = (gate_up_EJD[e] @ x_D).chunk(2)
            row_D = row_D + w * (down_EDI[e] @ (F.silu(gate_I) * up_I))
        rows.append(row_D)
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 30),
    count=st.integers(1, 12),
    active=st.integers(1, 4),
    hidden=st.sampled_from([4, 9, 16]),
    width=st.sampled_from([1, 6, 16]),
    used=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_sorted_experts_equal_the_plain_loop(
    tokens, count, active, hidden, width, used, dtype, seed
):
    active, used = min(active, count), min(used, count)
    generator = torch.Generator().manual_seed(seed)
    layer = Experts(count, hidden, width).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=generator)
    # Tokens go to the first experts only: the others get none.
    used = max(used, active)
    chosen = torch.stack(
        [torch.randperm(used, generator=generator)[:active] for _ in range(tokens)]
    )
    x = torch.randn(tokens, hidden, generator=generator, dtype=dtype, requires_grad=True)
    weights = torch.rand(tokens, active, generator=generator, dtype=dtype, requires_grad=True)
    slope = torch.randn(tokens, hidden, generator=generator, dtype=dtype)
    inputs = (x, weights, layer.gate_up_proj, layer.down_proj)

    got = layer(x, chosen, weights)
    want = plain_loop(x, chosen, weights, layer.gate_up_proj, layer.down_proj)
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    )
    assert_close(got, want, **tolerance)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, slope), torch.autograd.grad(want, inputs, slope)
    ):
        assert_close(mine, theirs, **tolerance)


def test_the_written_gradient_passes_gradcheck():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    chosen = torch.tensor([[0, 2], [2, 3], [3, 0], [2, 0], [0, 3]])  # expert 1 gets no token
    inputs = (draw(5, 3), draw(5, 2), draw(4, 4, 3), draw(4, 3, 2))
    assert torch.autograd.gradcheck(lambda *all: experts._Mixture.apply(*all, chosen), inputs)


def test_frozen_experts_pass_the_gradient_on_and_take_none():
    layer = Experts(4, 8, 6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=generator)
    chosen = torch.tensor([[0, 2], [2, 3], [3, 1]])
    x = torch.randn(3, 8, generator=generator, requires_grad=True)
    weights = torch.rand(3, 2, generator=generator)
    (want,) = torch.autograd.grad(layer(x, chosen, weights).sum(), x)
    layer.requires_grad_(False)
    layer(x, chosen, weights).sum().backward()
    assert_close(x.grad, want)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped matmul")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_grouped_call_equals_one_matmul_an_expert(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(1)
    layer = Experts(7, 32, 16)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.3, generator=generator)
    layer.to(dtype)
    chosen = torch.randint(0, 5, (40, 1), generator=generator)
    chosen = torch.cat([chosen, (chosen + 1) % 5], 1)
    x = torch.randn(40, 32, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(40, 2, generator=generator).to(dtype).requires_grad_()
    inputs = (x, weights, *layer.parameters())
    results = []
    for one_call in (True, False):
        monkeypatch.setattr(experts, "one_call", lambda a, b, answer=one_call: answer)
        out = layer(x, chosen, weights)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for grouped, looped in zip(*results):
        assert_close(grouped, looped, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_grouped_matmul_is_tried_before_it_is_trusted(monkeypatch):
    right = experts.grouped_matmul_is_right.__wrapped__
    cpu = torch.device("cpu")
    if hasattr(F, "grouped_mm"):
        assert right(cpu, torch.float32)
        assert right(cpu, torch.bfloat16)
    assert not right(cpu, torch.float64)  # torch refuses it
    monkeypatch.setattr(
        F, "grouped_mm", lambda a, b, offs: torch.full((len(a), b.shape[-1]), 1.0), raising=False
    )
    assert not right(cpu, torch.float32)
    monkeypatch.delattr(F, "grouped_mm")
    assert not right(cpu, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_the_cpu_gives():
    layer = Experts(7, 32, 16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.3, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(40)])
    inputs = torch.randn(40, 32, generator=generator), torch.rand(40, 2, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        moved = layer.to(device, torch.bfloat16)
        x, weights = (t.to(device, torch.bfloat16).requires_grad_() for t in inputs)
        out = moved(x, chosen.to(device), weights)
        grads = torch.autograd.grad(out.float().square().sum(), (x, weights, *moved.parameters()))
        results.append([t.float().cpu() for t in (out, *grads)])
    for cpu, cuda in zip(*results):
        assert_close(cuda, cpu, rtol=3e-2, atol=3e-2 * float(cpu.abs().max()))


SHAPES = [
    {},
    {"norm_topk_prob": True},
    {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    {"mlp_only_layers": (0, 2), "num_experts": 5, "num_experts_per_tok": 1},
    {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 8,
        "num_key_value_heads": 4,
    },
    {
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
    },
]


def reference(model):
    config = transformers.Qwen2MoeConfig(**model.config.to_json())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    theirs = transformers.Qwen2MoeForCausalLM(config)
    missing, extra = theirs.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    model = make(**shape)
    theirs = reference(model)
    tokens = torch.randint(0, 128, (41,), generator=torch.Generator().manual_seed(1))
    packed = Packed.from_lengths([41])
    logits = model.logits(model(tokens, packed.positions, packed))
    expected = theirs(tokens[None]).logits[0]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5

    F.cross_entropy(logits[:-1], tokens[1:]).backward()
    F.cross_entropy(expected[:-1], tokens[1:]).backward()
    grads = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        error = (p.grad - grads[name].grad).abs().max() / grads[name].grad.abs().max()
        assert error < 1e-4, name


def test_routing_is_kept_only_when_asked_for():
    model = make(mlp_only_layers=(1,))
    packed = Packed.from_lengths([9, 4])
    tokens = torch.randint(0, 128, (13,), generator=torch.Generator().manual_seed(2))
    routing = Routing()
    hidden = model(tokens, packed.positions, packed, routing)
    assert torch.equal(hidden, model(tokens, packed.positions, packed))
    assert [p.shape for p in routing.probabilities] == [(13, 10)] * 2
    assert [c.shape for c in routing.chosen] == [(13, 3)] * 2
    for p, chosen in zip(routing.probabilities, routing.chosen):
        assert_close(p.sum(-1), torch.ones(13))
        assert torch.equal(p.topk(3).indices, chosen)
    assert routing.counts_LE().sum(1).tolist() == [39, 39]


def test_experts_generate_from_a_cache_as_they_read_whole():
    model = make()
    lengths = [9, 4]
    tokens = torch.randint(0, 128, (13,), generator=torch.Generator().manual_seed(3))
    packed = Packed.from_lengths(lengths)
    with torch.inference_mode():
        expected = model(tokens, packed.positions, packed).split(lengths)
        cache = Cache(model.config, 16, 4)
        tables = torch.tensor([[3, 7, 1], [2, 0, 5]])
        first = torch.cat([p[:3] for p in tokens.split(lengths)])
        model(first, torch.tensor([0, 1, 2] * 2), Paged(cache, tables, [3, 3], [3, 3]))
        rest = torch.cat([p[3:] for p in tokens.split(lengths)])
        out = model(
            rest, torch.tensor([3, 4, 5, 6, 7, 8, 3]), Paged(cache, tables, lengths, [6, 1])
        )
    assert_close(out, torch.cat([e[3:] for e in expected]), rtol=1e-4, atol=1e-5)


def test_half_precision_chooses_as_float32_does():
    model = make().bfloat16()
    packed = Packed.from_lengths([13])
    tokens = torch.randint(0, 128, (13,), generator=torch.Generator().manual_seed(2))
    routing = Routing()
    assert model(tokens, packed.positions, packed, routing).dtype == torch.bfloat16
    assert {p.dtype for p in routing.probabilities} == {torch.float32}


def test_initialize_fills_the_fused_tensors():
    model = Qwen2(mixture(hidden_size=128, num_experts=16, initializer_range=0.02))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    initialize(model, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("name", published.NAMES)
def test_every_published_network_has_its_published_size(name):
    config = ModelConfig.named(name)
    with torch.device("meta"):
        model = Qwen2(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()
