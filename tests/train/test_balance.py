"""The balancing losses against transformers, however the batch is cut; what is logged of a router;
a small training.
"""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from openqwen.model import ModelConfig, Qwen2, Routing, initialize
from openqwen.support.batching import cut_to_budget
from openqwen.train.balance import (
    Load,
    PretrainBatch,
    global_balance,
    load_record,
    measure_load,
    micro_balance,
    with_balance,
    with_loads,
)
from openqwen.train.compute import computing
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.pretrain import PretrainConfig, pretrain
from openqwen.train.trainer import Place, SaveConfig


def tiny(seed=0, **changes):
    values = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16} | changes
    config = ModelConfig(
        96, 32, 48, 3, 4, 2, shared_expert_intermediate_size=24, initializer_range=0.3, **values
    )
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(seed))
    return model


def samples(count, seed):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 96, n).tolist(), [1] * n) for n in rng.integers(3, 20, count).tolist()]


def parts(data, budget):
    return [
        PackedBatch.of(data[cut]) for cut in cut_to_budget([len(ids) for ids, _ in data], budget)
    ]


def route(layers, tokens, experts, active, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [
        torch.randn(tokens, experts, generator=generator, requires_grad=True) for _ in range(layers)
    ]
    routing = Routing([x.softmax(-1) for x in logits], [x.topk(active).indices for x in logits])
    return logits, routing


@pytest.mark.parametrize(
    ("layers", "tokens", "experts", "active"), [(1, 7, 4, 1), (3, 50, 8, 2), (2, 33, 60, 4)]
)
def test_micro_balance_equals_transformers(layers, tokens, experts, active):
    logits, routing = route(layers, tokens, experts, active, seed=tokens)
    mine = micro_balance(routing)
    theirs = load_balancing_loss_func(tuple(logits), experts, active)
    assert mine.count == tokens
    assert_close(mine.sum / mine.count, theirs)
    for got, want in zip(
        torch.autograd.grad(mine.sum / tokens, logits), torch.autograd.grad(theirs, logits)
    ):
        assert_close(got, want)


def test_one_layer_read_at_once_has_one_balance():
    _, routing = route(1, 40, 8, 2, seed=1)
    assert_close(global_balance(routing, Load.of(routing)).sum, micro_balance(routing).sum)


def test_an_even_load_costs_k():
    chosen = torch.arange(24).view(12, 2) % 8
    routing = Routing([torch.full((12, 8), 1 / 8)] * 3, [chosen] * 3)
    for loss in (micro_balance(routing), global_balance(routing, Load.of(routing))):
        assert float(loss.sum / loss.count) == pytest.approx(2.0)
    statistics = Load.of(routing).statistics()
    assert statistics == pytest.approx(
        {"dead_experts": 0.0, "largest_load": 1.0, "load_entropy": 1.0}
    )


def test_statistics_of_a_collapsed_router():
    load = Load(torch.tensor([[10, 10, 0, 0], [5, 5, 5, 5]]), 10)
    assert load.statistics() == pytest.approx(
        {"dead_experts": 0.25, "largest_load": 2.0, "load_entropy": 0.75}
    )


@pytest.mark.parametrize("budget", [1, 25, 60])
def test_the_global_balance_does_not_depend_on_how_the_batch_is_cut(budget):
    model = tiny()
    data = samples(15, seed=3)

    def step(cut):
        model.zero_grad()
        total, count, balance = 0.0, 0, 0.0
        for micro in with_loads(model, parts(data, cut), "global"):
            loss = with_balance(
                lambda rows, routing: next_token(model, rows, routing), micro, "global", 0.5
            )
            loss.sum.backward()
            total, count = total + loss.sum.item(), count + loss.count
            balance += loss.extras["balance"]
        return (total / count, balance / count), {
            n: p.grad / count for n, p in model.named_parameters()
        }

    whole, grads = step(10**6)
    cut, cut_grads = step(budget)
    assert cut == pytest.approx(whole, rel=1e-5)
    for name, g in grads.items():
        assert_close(cut_grads[name], g, rtol=1e-3, atol=1e-5 * g.abs().max().item() + 1e-7)


def test_loads_of_ranks_add_up():
    model = tiny()
    pieces = parts(samples(9, seed=4), 30)
    together = measure_load(model, pieces)
    halves = measure_load(model, pieces[:2]) + measure_load(model, pieces[2:])
    assert torch.equal(together.counts_LE, halves.counts_LE)
    assert together.tokens == halves.tokens == sum(len(rows.tokens) for rows in pieces)
    assert together.counts_LE.sum(1).tolist() == [2 * together.tokens] * 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_load_is_that_of_the_step_s_own_numbers(precision):
    model, pieces = tiny(num_experts=32), parts(samples(60, seed=4), 300)
    counts = []
    for rows in pieces:
        routing = Routing()
        with computing(precision, torch.device("cpu")):
            next_token(model, rows, routing)
        counts.append(routing.counts_LE())
    found = [micro.load for micro in with_loads(model, pieces, "global", precision)]
    assert all(torch.equal(load.counts_LE, sum(counts)) for load in found)


def test_balance_off_leaves_the_loss_alone():
    model = tiny()
    rows = PackedBatch.of(samples(4, seed=5))
    loss = with_balance(
        lambda r, routing: next_token(model, r, routing), PretrainBatch(rows), "off", 0.5
    )
    assert_close(loss.sum, next_token(model, rows).sum)
    assert loss.extras["next_token_loss"] == pytest.approx(loss.sum.item())
    assert loss.extras["balance"] / loss.count > 1.5


@pytest.mark.parametrize("balance", ["global", "micro"])
def test_balancing_evens_a_collapsed_router_out(balance):
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:  # every token likes the first experts
            layer.post_attention_layernorm.weight.fill_(1.0)
            layer.mlp.gate.weight.copy_(
                torch.linspace(1, 0, 8)[:, None] * model.model.embed_tokens.weight.mean(0)
            )
    optimizer = torch.optim.Adam([layer.mlp.gate.weight for layer in model.model.layers], lr=6e-3)
    pieces = parts(samples(15, seed=6), 60)
    before = measure_load(model, pieces).statistics()
    for _ in range(30):
        for micro in with_loads(model, pieces, balance):
            loss = with_balance(
                lambda rows, routing: next_token(model, rows, routing), micro, balance, 1.0
            )
            loss.sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measure_load(model, pieces).statistics()
    assert after["load_entropy"] > max(0.95, before["load_entropy"])
    assert after["dead_experts"] == 0


class Tokenizer:
    """Stands for the tokenizer of a checkpoint."""

    eos_id, endoftext_id = 1, 0

    def save(self, folder):
        pass


class Source:
    """Documents of one source: runs of a pattern that a network can learn."""

    lengths = np.full(40, 33)

    def document(self, number):
        return (np.arange(33) * (1 + number % 3) + number) % 90


@pytest.mark.parametrize("micro_tokens", [64, 4_096])
def test_pretraining_a_mixture_of_experts(tmp_path, micro_tokens):
    config = PretrainConfig(
        network={
            "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 1,
            "experts": 6, "experts_per_token": 2, "expert_width": 16, "shared_width": 32, "balance_weight": 0.01,
        },
        data={"tokens": 6_000, "context": 32, "batch_tokens": 128, "micro_tokens": micro_tokens},
        train=OptimizerConfig(learning_rate=1e-2),
        save=SaveConfig(),
    )  # fmt: skip
    output = tmp_path / "model"
    metrics = pretrain(
        config,
        {"a": Source()},
        Tokenizer(),
        90,
        None,
        Place(output, tmp_path / "scratch", 3, "test"),
    )
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["next_token_loss"] < 0.7 * log[0]["next_token_loss"]
    for entry in log:
        assert entry["loss"] == pytest.approx(
            entry["next_token_loss"] + 0.01 * entry["balance"], rel=1e-4
        )
        assert 0 < entry["chosen_weight"] <= 1
        assert 0 <= entry["load_entropy"] <= 1 + 1e-9
    assert metrics["parameters"] == sum(p.numel() for p in Qwen2(ModelConfig.from_json(
        json.loads((output / "config.json").read_text())
    )).parameters())  # fmt: skip
    record = json.loads((output / "experts.json").read_text())
    assert record["layers"] == [0, 1]
    assert np.array(record["load"]).shape == (2, 6)
    assert np.array(record["load"]).mean(1) == pytest.approx([1, 1], abs=1e-3)


def test_the_load_record_names_the_sparse_layers():
    model = tiny(mlp_only_layers=(1,))
    record = load_record(model, measure_load(model, parts(samples(5, seed=8), 99)))
    assert record["layers"] == [0, 2]
    assert len(record["load"]) == 2
