"""Quantised weights on a GPU: 8 bits compute on a CPU as well, by plain PyTorch."""

import builtins

import pytest
import torch

from openqwen.engine import Engine, Sampling
from openqwen.model import ModelConfig, Packed, Qwen2, initialize
from openqwen.model.quantize_gpu import quantize_on_gpu
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer


def network():
    model = Qwen2(ModelConfig(384, 64, 128, 2, 4, 2))
    initialize(model, torch.Generator().manual_seed(0))
    return model.to(torch.bfloat16)


@torch.no_grad()
def test_eight_bits_stay_near_their_source_and_generate():
    model, tokens = network(), torch.arange(20)
    rows = Packed.from_lengths([20])
    exact = model(tokens, rows.positions, rows)
    quantized = quantize_on_gpu(model, "int8")
    found = quantized(tokens, rows.positions, rows)
    assert 0 < (found - exact).norm() < 0.03 * exact.norm()
    assert not any(p.requires_grad for p in quantized.parameters())
    weight = quantized.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.int8
    assert weight.shape == (128, 64)
    tokenizer = train_tokenizer(["What is one and one? Two. " * 9], TokenizerConfig(vocabulary=270))
    outputs = Engine(quantized, tokenizer).generate(
        ["one", "two and"], Sampling(max_tokens=8, ignore_eos=True)
    )
    assert [len(output.token_ids) for output in outputs] == [8, 8]


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def without(name, *rest):
        if name.startswith("torchao"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OpenQwenError, match="torchao") as error:
        quantize_on_gpu(network(), "int4")
    assert "openqwen[train]" in str(error.value.do)
