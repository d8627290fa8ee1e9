"""Which optimizer updates which parameters, Muon against PyTorch's, and states of earlier versions."""

import pytest
import torch
from torch import nn
from training import network

from openqwen.model import ModelConfig, Qwen2
from openqwen.support.generators import Generators
from openqwen.train.optimizer import Muon, OptimizerConfig, build_optimizers
from openqwen.train.parallel import ALONE
from openqwen.train.state import StateWriter, load_state


@pytest.fixture
def model():
    return network(tied=False)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(model, method):
    optimizers = build_optimizers(model, OptimizerConfig(method=method))
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


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


def test_a_state_with_moments_of_some_rows_resumes(model, tmp_path):
    """Earlier versions kept moments only for the rows of an embedding that were looked up."""
    (optimizer,) = build_optimizers(model, OptimizerConfig())
    table = model.model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rows = torch.tensor([7, 3, 60])
    table.grad = torch.zeros_like(table).index_fill_(0, rows, 2.0)
    optimizer.step()
    expected = {key: value.clone() for key, value in optimizer.state[table].items()}
    for key in ("exp_avg", "exp_avg_sq"):  # with room for one more row
        kept = optimizer.state[table][key][rows]
        optimizer.state[table][key] = torch.cat([kept, torch.zeros_like(kept[:1])])
    optimizer.state[table]["rows"] = rows
    generators = Generators(1)
    with StateWriter(tmp_path, 1, ALONE) as writer:
        writer.save(1, model, [optimizer], generators)
    (resumed,) = build_optimizers(model, OptimizerConfig())
    assert load_state(tmp_path, model, [resumed], generators, ALONE) == 1
    assert resumed.state[table].keys() == expected.keys()
    assert all(torch.equal(resumed.state[table][key], expected[key]) for key in expected)
