"""Quantised weights: what the compiled kernels give is what plain PyTorch gives, and never depends
on the batch.
"""

import copy
from ctypes import c_int32

import pytest
import torch
import torch.nn.functional as F

from openqwen.model import (
    Cache,
    ModelConfig,
    Packed,
    Paged,
    Qwen2,
    initialize,
    kernels,
    load_model,
    save_checkpoint,
)
from openqwen.model.decoder import RMSNorm
from openqwen.model.experts import Routing
from openqwen.model.packed import FORMATS, choose, in_bytes, pack, rows_of, unpack
from openqwen.model.quantize import (
    QuantizedEmbedding,
    QuantizedLinear,
    bits_per_weight,
    quantize,
    refresh,
    swiglu,
)
from openqwen.support.errors import OpenQwenError

DENSE = ModelConfig(300, 96, 144, 2, 6, 2, tie_word_embeddings=True)
compiled = pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
kinds = pytest.mark.parametrize("kind", FORMATS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(*shape):
    """With outliers, as a language model's are."""
    return normal(*shape, seed=1) * normal(*shape, seed=2).exp()


def linear(kind, inputs=100, outputs=97, bias=True):
    made = QuantizedLinear(inputs, {"a": outputs - 40, "b": 40}, kind, bias)
    w, b = normal(outputs, inputs), normal(outputs, seed=3)
    made.fill([w[:-40], w[-40:]], [b[:-40], b[-40:]])
    return made


def network(config=DENSE):
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * normal(*parameter.shape, seed=len(name))
    return model


def plain(monkeypatch):
    monkeypatch.setattr(kernels, "function", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "linear", lambda: None)


def read(model, lengths=(5, 11)):
    attention = Packed.from_lengths(lengths)
    tokens = torch.arange(sum(lengths)) * 7 % model.config.vocab_size
    return model.logits(model(tokens, attention.positions, attention))


@kinds
def test_packing_keeps_every_number(kind):
    form = FORMATS[kind]
    stored, scale = choose(normal(70, 150), form)
    packed = pack(stored, scale, form)
    assert packed.shape == form.shape(70, 150)
    whole = (
        form.values()[stored.long()].unflatten(1, (-1, form.group)) * scale[..., None]
    ).flatten(1)[:, :150]
    assert torch.equal(unpack(packed, form, 70, 150), whole)
    rows = torch.tensor([3, 69, 31, 32, 3])
    assert torch.equal(rows_of(packed, form, rows, 150), whole[rows])


@compiled
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_quantising_is_plain_quantising(kind, dtype):
    made = QuantizedLinear(150, {"a": 70}, kind)
    weight = normal(70, 150).to(dtype)
    weight[:, 64:128] = 0.0
    weight[3, :32] = 6e-8  # a subnormal half
    made.fill([weight])
    expected = unpack(pack(*choose(weight, made.form), made.form), made.form, 70, 150)
    errors = [(w - weight).square().sum() for w in (made.weight, expected)]
    assert (made.packed == pack(*choose(weight, made.form), made.form)).float().mean() > 0.98
    assert errors[0] == pytest.approx(errors[1].item(), rel=1e-3)


@kinds
@pytest.mark.parametrize("path", [0, 1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(100, 97), (64, 41), (896, 320), (33, 45)])
@compiled
def test_a_product_is_what_whole_numbers_give_in_float64(kind, path, inputs, outputs):
    set_path = kernels.function("openqwen_set_path", c_int32, result=c_int32)
    made, x = linear(kind, inputs, outputs), activations(37, inputs)
    try:
        set_path(path)
        out = made(x)
    finally:
        best = set_path(2)
    expected = F.linear(in_bytes(x, made.form).double(), made.weight.double(), made.bias.double())
    assert (out - expected).norm() < 1e-6 * expected.norm()
    assert best >= 0
    assert torch.equal(made(x), out)  # every instruction set gives the same bits


@kinds
@compiled
def test_a_row_never_depends_on_its_batch_nor_on_the_threads(kind):
    made, x, threads = linear(kind, 128, 700), activations(600, 128), torch.get_num_threads()
    whole = made(x, norm_of(128), normal(600, 700))
    try:
        for width in (1, 2, 3):
            torch.set_num_threads(width)
            for rows in (1, 2, 5, 6, 7, 13, 599):
                assert torch.equal(
                    made(x[:rows], norm_of(128), normal(600, 700)[:rows]), whole[:rows]
                )
                assert torch.equal(
                    made(x[-rows:], norm_of(128), normal(600, 700)[-rows:]), whole[-rows:]
                )
    finally:
        torch.set_num_threads(threads)


def norm_of(width):
    norm = RMSNorm(ModelConfig(8, width, 8, 1, 1, 1))
    norm.weight.data = normal(width, seed=6)
    return norm.requires_grad_(False)


@kinds
@pytest.mark.parametrize("before", ["nothing", "norm", "swiglu"])
def test_norm_activation_and_residual_beside_a_product(kind, before, monkeypatch):
    made = linear(kind, 128, 97)
    function = {"nothing": None, "norm": norm_of(128), "swiglu": swiglu}[before]
    x = activations(9, 300)[
        :, : 256 if before == "swiglu" else 128
    ]  # rows that do not follow one another
    residual = normal(9, 120, seed=5)[:, :97]
    out = made(x, function, residual)
    plain(monkeypatch)
    expected = made(x, function, residual)
    # A rounding that falls the other way moves a product by a step of its activation; most do not.
    assert (out - expected).norm() < 2e-3 * expected.norm()
    exact = residual + F.linear(x if function is None else function(x), made.weight, made.bias)
    assert (expected - exact).norm() < 2e-2 * exact.norm()


def test_what_is_no_number_stays_none():
    made, x = linear("int8"), activations(3, 100)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    out = made(x)
    assert not out[:2].isfinite().any()
    assert out[2].isfinite().all()


@kinds
def test_a_gradient_reaches_the_input_through_the_weights(kind):
    made, x = linear(kind), activations(9, 100).requires_grad_()
    residual = normal(9, 97).requires_grad_()
    out = made(x, None, residual)
    out.backward(normal(9, 97, seed=7))
    assert torch.allclose(x.grad, normal(9, 97, seed=7) @ made.weight, atol=1e-4)
    assert torch.equal(residual.grad, normal(9, 97, seed=7))
    with torch.no_grad():
        assert torch.allclose(made(x, None, residual), out, atol=1e-5)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("int4", 0.25)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_network_is_close_to_its_source(kind, error, tied):
    source = network(ModelConfig(300, 96, 144, 2, 6, 2, tie_word_embeddings=tied))
    with torch.no_grad():
        expected = read(source)
        made = quantize(source, kind)
        assert (read(made) - expected).norm() < error * expected.norm()
    assert bits_per_weight(made) < (12 if kind == "int8" else 8)
    assert made.head_VD.shape == (300, 96)
    assert not any(p.requires_grad for p in made.parameters())


@kinds
def test_a_network_without_a_compiler_is_the_same(kind, monkeypatch):
    made = quantize(network(), kind)
    with torch.no_grad():
        out = read(made)
        plain(monkeypatch)
        expected = read(made)
    assert (out - expected).norm() < 1e-2 * expected.norm()


@kinds
def test_gradients_flow_through_a_network(kind):
    made = quantize(network(), kind)
    x, attention = normal(7, 96).requires_grad_(), Packed.from_lengths([7])
    layer = made.model.layers[0]
    layer(x, attention.rotation(torch.arange(7), DENSE), attention, None).sum().backward()
    source = network().model.layers[0]
    y = x.detach().clone().requires_grad_()
    source(y, attention.rotation(torch.arange(7), DENSE), attention, None).sum().backward()
    assert (x.grad - y.grad).norm() < (0.05 if kind == "int8" else 0.3) * y.grad.norm()


@kinds
def test_refreshing_is_quantising_anew_in_place(kind):
    source = network()
    made = quantize(source, kind)
    places = {
        name: tensor.data_ptr() for name, tensor in made.named_buffers() if name.endswith("packed")
    }
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.05 * normal(*parameter.shape, seed=9)
        refresh(made, source)
        assert torch.equal(read(made), read(quantize(source, kind)))
    assert {name: made.get_buffer(name).data_ptr() for name in places} == places


@kinds
def test_experts(kind):
    config = ModelConfig(
        300, 96, 144, 2, 6, 2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=96,
    )  # fmt: skip
    source = network(config)
    made, attention = quantize(source, kind), Packed.from_lengths([9])
    routing = Routing()
    with torch.no_grad():
        expected, found = read(source), read(made)
        made(torch.arange(9), torch.arange(9), attention, routing)
        x = normal(9, 96)
        sparse = made.model.layers[0].mlp
        assert torch.equal(torch.cat([sparse(row) for row in x.split(1)]), sparse(x))
    assert (found - expected).norm() < (0.05 if kind == "int8" else 0.3) * expected.norm()
    assert routing.counts_LE().sum(1).tolist() == [18, 18]


@compiled
def paged(model, counts=(5, 300, 1)):
    """Hidden states of sequences read over pages, the first part of the second one before."""
    cache = Cache.of(model, 64, 16)
    tables = torch.arange(3 * 20).view(3, 20)
    before = Paged(cache, tables[1:2], [37], [37])
    model(torch.arange(37) % 300, torch.arange(37), before)
    new = [counts[0], counts[1] - 37, counts[2]]
    attention = Paged(cache, tables, counts, new)
    positions = torch.cat(
        [torch.arange(counts[0]), torch.arange(37, counts[1]), torch.arange(counts[2])]
    )
    return model(torch.arange(len(positions)) * 7 % 300, positions, attention)


@compiled
@kinds
@torch.no_grad()
def test_all_layers_in_one_call_are_the_layers_one_by_one(kind, monkeypatch):
    model = quantize(network(ModelConfig(300, 128, 144, 3, 4, 2)), kind)
    calls = []
    found = kernels.function
    monkeypatch.setattr(
        kernels, "function", lambda name, *a, **k: calls.append(name) or found(name, *a, **k)
    )
    together = paged(model)
    assert "openqwen_layers" in calls
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    singly = paged(model)
    assert torch.equal(together, singly)
    hook.remove()
    model.model.layers[2].o_proj.packed = model.model.layers[
        2
    ].o_proj.packed.clone()  # memory moved
    assert torch.equal(paged(model), together)
    model.model.layers[2].o_proj.packed.zero_()
    assert not torch.equal(paged(model), together)


@compiled
@kinds
def test_rows_of_a_table_are_those_of_plain_pytorch(kind):
    table = QuantizedEmbedding(150, {"table": 70}, kind)
    table.fill([normal(70, 150)])
    rows = torch.tensor([0, 69, 33, 33, 31, 32])
    assert torch.equal(table(rows), table.weight[rows])
    assert table(rows[:0]).shape == (0, 150)
    for outside in (70, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([3, outside]))


@kinds
def test_a_copy_after_a_call_has_memory_of_its_own(kind):
    made, x = linear(kind, 128, 70), activations(3, 128)
    expected = made(x)
    copied = copy.deepcopy(made)
    made.packed.zero_()
    assert torch.equal(copied(x), expected)
    assert not torch.equal(made(x), expected)


@compiled
def test_torch_gets_its_threads_back():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with kernels.alone():
            kernels.follow_torch()
            assert (torch.get_num_threads(), kernels.pool().threads) == (1, 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_network_that_was_cast_is_refused():
    made = quantize(network(), "int8").to(torch.bfloat16)
    with torch.no_grad(), pytest.raises(OpenQwenError, match="was cast"):
        read(made)


def test_what_cannot_be_is_refused():
    with pytest.raises(OpenQwenError, match="int3"):
        quantize(network(), "int3")
    with torch.device("meta"):
        elsewhere = Qwen2(DENSE)
    with pytest.raises(OpenQwenError, match="meta"):
        quantize(elsewhere, "int8")


class NoTokenizer:
    """Stands for a tokenizer whose files do not matter here."""

    eos_id, endoftext_id = 61, 60

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@kinds
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_gives_the_same_bits(kind, tied, tmp_path):
    source = network(ModelConfig(300, 96, 144, 2, 6, 2, tie_word_embeddings=tied))
    save_checkpoint(source, NoTokenizer(), tmp_path / "source")
    made = load_model(tmp_path / "source", quantize=kind)
    save_checkpoint(made, NoTokenizer(), tmp_path / "packed")
    with torch.no_grad():
        expected = read(quantize(source, kind))
        assert torch.equal(read(made), expected)
        for asked in (None, kind):
            again = load_model(tmp_path / "packed", quantize=asked)
            assert torch.equal(read(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert (again.kind, again.device.type) == (kind, "cpu")


def test_a_saved_folder_that_is_not_what_was_asked_for(tmp_path):
    save_checkpoint(quantize(network(), "int8"), NoTokenizer(), tmp_path)
    with pytest.raises(OpenQwenError, match="asked for is int4"):
        load_model(tmp_path, quantize="int4")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 96', '"hidden_size": 48'))
    with pytest.raises(OpenQwenError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"version": 1', '"version": 0'))
    with pytest.raises(OpenQwenError, match="version 0"):
        load_model(tmp_path)
