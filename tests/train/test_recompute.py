"""Recomputation changes memory and nothing else."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.train.compute import computing
from openqwen.train.losses import next_token
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.recompute import recompute


def gradient_and_memory(model, precision="float32"):
    """Gradients, and bytes of distinct tensors that the forward pass keeps for the backward pass,
    weights apart.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = PackedBatch.of(
        [(list(range(1, 60)), [1] * 59), (list(range(3, 40)), [0] * 20 + [1] * 17)]
    )
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, computing(precision, torch.device("cpu")):
        loss = next_token(model, rows).sum
    size = sum(kept.values())
    loss.backward()
    return [p.grad for p in model.parameters()], size


@pytest.fixture(scope="module")
def plain():
    model = Qwen2(ModelConfig(64, 64, 256, 4, 4, 2))
    initialize(model, torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["cheap", "layers"])
def test_gradients_are_the_same_bits_and_names_stay(plain, what, precision):
    expected, _ = gradient_and_memory(copy.deepcopy(plain), precision)
    model = copy.deepcopy(plain)
    recompute(model, what)
    found, _ = gradient_and_memory(model, precision)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_less_is_kept(plain):
    _, everything = gradient_and_memory(copy.deepcopy(plain))
    model = copy.deepcopy(plain)
    recompute(model, "layers")
    _, inputs = gradient_and_memory(model)
    assert inputs < 0.3 * everything


def test_a_copy_computes_with_its_own_weights(plain):
    model = copy.deepcopy(plain)
    recompute(model, "layers")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    first, _ = gradient_and_memory(model)
    assert any(g.abs().max() > 0 for g in first)
    gradient_and_memory(other)
    assert all(g is None or g.abs().max() < 1e3 for g in (p.grad for p in other.parameters()))
    assert torch.equal(first[0], gradient_and_memory(copy.deepcopy(plain))[0][0])


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket] += 1
        return operation(*args, **(kwargs or {}))


def test_the_cheap_way_repeats_no_matrix_product(plain):
    counts = {}
    for what in ("nothing", "cheap", "layers"):
        model = copy.deepcopy(plain)
        recompute(model, what)
        with Calls() as calls:
            gradient_and_memory(model)
        products = sum(
            calls.counts[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        )
        counts[what] = (products, calls.counts[torch.ops.aten.silu])
    assert counts["cheap"][0] == counts["nothing"][0] < counts["layers"][0]
    assert counts["cheap"][1] == counts["layers"][1] == 2 * counts["nothing"][1]
