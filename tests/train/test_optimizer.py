"""AdamW on tables of which few rows are looked up: the bits of the dense one, and the memory of
those rows.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training import Stop, network, trainer

from openqwen.model import ModelConfig, Qwen2
from openqwen.train.optimizer import Muon, OptimizerConfig, TableAdamW, build_optimizers
from openqwen.train.packed_batch import PackedBatch

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_sparse_and_dense_adamw_give_the_same_bits(decay):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(50, 24, generator=generator)
    sparse, dense = (
        nn.Embedding.from_pretrained(start.clone(), freeze=False, sparse=s) for s in (True, False)
    )
    settings = SETTINGS | {"weight_decay": decay}
    mine, theirs = (
        TableAdamW([sparse.weight], settings),
        torch.optim.AdamW([dense.weight], **settings, fused=True),
    )
    for step in range(12):
        ids = torch.randperm(10 + 3 * step, generator=generator)[
            :9
        ]  # sums of one row's gradients may round otherwise
        out = torch.randn(9, 24, generator=generator)
        for table, optimizer in ((sparse, mine), (dense, theirs)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            for part in (ids[:5], ids[5:]):  # two micro-batches
                (table(part) * out[: len(part)]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(sparse.weight, dense.weight), step
    state = mine.state[sparse.weight]
    seen = int((theirs.state[dense.weight]["exp_avg_sq"].sum(1) > 0).sum())
    assert len(state["rows"]) == len(state["rows"].unique()) == seen < 50


@pytest.fixture
def model():
    return network(tied=False)


def few(generators, step):
    """Micro-batches that look up few rows at first."""
    ids = generators["data"].integers(0, 5 + 2 * step, 9).tolist()
    return [PackedBatch.of([(ids, [1] * 9)]), PackedBatch.of([(ids[::-1], [1] * 9)])]


def start(model, folder, stop_at=None):
    return trainer(folder, model, stop_at, steps=6, micros=few, clip=0.1)


def alike(one, other):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters()):
        if (
            "k_proj.bias" not in name
        ):  # softmax is blind to it: its gradient is rounding, which AdamW makes large
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def dense_everywhere(monkeypatch):
    monkeypatch.setattr("openqwen.train.optimizer._is_table", lambda embedding, model: False)


def test_who_keeps_moments_of_what(model):
    assert [type(m) for m in build_optimizers(model, OptimizerConfig())] == [
        torch.optim.AdamW,
        TableAdamW,
    ]
    tied = Qwen2(ModelConfig(64, 32, 48, 2, 2, 1, tie_word_embeddings=True))
    assert [type(m) for m in build_optimizers(tied, OptimizerConfig())] == [torch.optim.AdamW]
    held = {
        id(p)
        for m in build_optimizers(model, OptimizerConfig(method="muon"))
        for g in m.param_groups
        for p in g["params"]
    }
    assert held == {id(p) for p in model.parameters()}


def test_muon_moves_no_router_and_no_gate():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    model = Qwen2(ModelConfig(64, 32, 48, 2, 2, 1, shared_expert_intermediate_size=20, **experts))
    (muon,) = (
        m
        for m in build_optimizers(model, OptimizerConfig(method="muon"))
        if isinstance(m, torch.optim.Muon)
    )
    moved = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name.split(".", 3)[3] for name, p in model.named_parameters() if id(p) in moved}
    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    assert names == attention | {
        f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")
    }


def test_muon_moves_what_pytorch_moves(model):
    ours = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for step in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_training_is_that_of_dense_moments_and_states_resume_either_way(
    model, tmp_path, monkeypatch
):
    copies = [copy.deepcopy(model) for _ in range(4)]
    start(copies[0], tmp_path / "sparse").run()
    for stopped in (copies[1], copies[2]):
        folder = tmp_path / f"cut {id(stopped)}"
        with pytest.raises(Stop):
            start(copy.deepcopy(model), folder, stop_at=4).run()
        if stopped is copies[1]:
            (saved,) = (folder / "state-00000004").glob("*.safetensors")
            assert load_file(saved)["rows.model.embed_tokens.weight"].dtype == torch.int64
            start(stopped, folder).run()
    assert all(torch.equal(a, b) for a, b in zip(copies[0].parameters(), copies[1].parameters()))
    dense_everywhere(monkeypatch)
    start(copies[2], folder).run()  # the state holds moments of some rows
    start(copies[3], tmp_path / "dense").run()
    for other in copies[2:]:
        alike(copies[0], other)


def test_a_state_with_all_moments_resumes_as_one_with_some(model, tmp_path, monkeypatch):
    whole = copy.deepcopy(model)
    start(whole, tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        dense_everywhere(patch)
        with pytest.raises(Stop):
            start(copy.deepcopy(model), tmp_path / "cut", stop_at=4).run()
    start(model, tmp_path / "cut").run()
    alike(whole, model)
