"""Linear layers under autocast on a CPU: PyTorch's numbers, without its copies of the weights."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from openqwen.model import linear as module
from openqwen.model.linear import Linear, product

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def layers(bias):
    """PyTorch's layer and ours, with the same numbers."""
    torch.manual_seed(0)
    theirs, ours = nn.Linear(96, 160, bias=bias), Linear(96, 160, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(layer, x_TD, slope_TO):
    """Output and gradients in bfloat16, all as float64."""
    x_TD = x_TD.clone().requires_grad_()
    with torch.autocast(**AUTOCAST):
        out = layer(x_TD)
    assert out.dtype == torch.bfloat16
    out.backward(slope_TO.to(out.dtype))
    grads = [x_TD.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert all(grad.dtype == torch.float32 for grad in grads)
    return [tensor.detach().double() for tensor in (out, *grads)]


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_autocasts(monkeypatch, bias, frozen, instructions):
    monkeypatch.setattr(module, "_has_bfloat16", lambda: instructions)
    theirs, ours = (layer.requires_grad_(not frozen) for layer in layers(bias))
    x_TD, slope_TO = torch.randn(40, 96), torch.randn(40, 160)
    low = {name: p.detach().bfloat16().double() for name, p in ours.named_parameters()}
    x, slope = x_TD.bfloat16().double(), slope_TO.bfloat16().double()
    exact = [x @ low["weight"].T + low.get("bias", 0), slope @ low["weight"]]
    if not frozen:
        exact += [slope.T @ x, slope.sum(0)][: 1 + bias]
    found = results(ours, x_TD, slope_TO)
    for got, peer, wanted in zip(found, results(theirs, x_TD, slope_TO), exact, strict=True):
        # Half a unit in the last of eight bits, and the order of the additions.
        bound = 2**-8 * wanted.abs() + 1e-5 * wanted.abs().max()
        assert ((got - wanted).abs() <= bound).all()
        assert ((got - peer).abs() <= 2 * bound).all()


def kept(layer, x_TD):
    """What a forward call keeps for the backward pass."""
    found = []

    def keep(tensor):
        found.append(tensor)
        return tensor

    with torch.autocast(**AUTOCAST), saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x_TD)
    return found


def test_no_rounded_weight_is_kept():
    theirs, ours = layers(bias=True)
    x_TD = torch.randn(40, 96, requires_grad=True)
    size, address = ours.weight.numel(), ours.weight.data_ptr()
    assert [t.dtype for t in kept(theirs, x_TD) if t.numel() == size] == [torch.bfloat16]
    assert [t.data_ptr() for t in kept(ours, x_TD) if t.numel() == size] == [address]


def test_a_frozen_layer_keeps_no_inputs():
    _, ours = layers(bias=False)
    x_TD = torch.randn(40, 96, requires_grad=True)
    assert {t.numel() for t in kept(ours.requires_grad_(False), x_TD)} == {ours.weight.numel()}


def test_without_autocast_it_is_pytorchs_layer():
    theirs, ours = layers(bias=True)
    x_TD = torch.randn(5, 96)
    assert torch.equal(ours(x_TD), theirs(x_TD))
    half = ours.bfloat16()
    with torch.autocast(**AUTOCAST):
        assert half(x_TD).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_without_instructions_for_it_is_the_exact_one_rounded(monkeypatch, bias):
    monkeypatch.setattr(module, "_has_bfloat16", lambda: False)
    a, b = torch.randn(30, 700).bfloat16(), torch.randn(700, 20).bfloat16()
    add = torch.randn(20).bfloat16() if bias else None
    exact = a.double() @ b.double() + (0 if add is None else add.double())
    out = product(a, b, add)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
