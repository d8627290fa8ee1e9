"""Adapters: nothing at the start, merging changes nothing, and PEFT reads ours as we read
PEFT's.
"""

import peft
import pytest
import torch
import transformers

from openqwen.model import ModelConfig, Packed, Qwen2, initialize
from openqwen.model.lora import (
    LoraConfig,
    LoraLinear,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from openqwen.support.errors import OpenQwenError

TOKENS = torch.tensor([5, 9, 2, 7, 7, 1, 30])
PACKED = Packed.from_lengths([4, 3])


def network():
    model = Qwen2(ModelConfig(64, 32, 48, 2, 4, 2, tie_word_embeddings=True))
    initialize(model, torch.Generator().manual_seed(3))
    return model


def logits(model):
    return model.logits(model(TOKENS, PACKED.positions, PACKED))


def adapted(config, moved=True):
    model = network()
    add_adapters(model, config, torch.Generator().manual_seed(1))
    if moved:
        noise = torch.Generator().manual_seed(2)
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.data.normal_(0, 0.1, generator=noise)
                if module.magnitude is not None:
                    module.magnitude.data *= (
                        torch.rand(module.magnitude.shape, generator=noise) + 0.5
                    )
    return model


CONFIGS = [
    LoraConfig(rank=4, alpha=8),
    LoraConfig(rank=2, alpha=8, dora=True, targets=["q_proj", "down_proj"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "dora"])
def test_an_adapter_starts_as_nothing_and_only_it_learns(config):
    model = adapted(config, moved=False)
    torch.testing.assert_close(logits(model), logits(network()), rtol=1e-5, atol=1e-6)
    learning = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {"lora_A", "lora_B"} | ({"magnitude"} if config.dora else set())


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "dora"])
def test_merging_changes_nothing_and_leaves_a_plain_network(config):
    model = adapted(config)
    before = logits(model)
    assert (before - logits(network())).abs().max() > 1e-3
    merge_adapters(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == network().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def theirs():
    model = network()
    config = transformers.Qwen2Config(**model.config.to_json())
    other = transformers.Qwen2ForCausalLM(config)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def their_logits(other):
    rows = [TOKENS[:4][None], TOKENS[4:][None]]
    return torch.cat([other(row).logits[0] for row in rows])


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "dora"])
def test_peft_loads_ours_with_the_same_logits_and_gradients(config, tmp_path):
    model = adapted(config)
    save_adapter(model, config, tmp_path, base="base")
    other = peft.PeftModel.from_pretrained(theirs(), tmp_path, is_trainable=True)
    ours, expected = logits(model), their_logits(other)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    found = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            stem = f"base_model.model.{name}"
            torch.testing.assert_close(
                module.lora_A.grad, found[f"{stem}.lora_A.default.weight"], rtol=1e-3, atol=1e-5
            )
            torch.testing.assert_close(
                module.lora_B.grad, found[f"{stem}.lora_B.default.weight"], rtol=1e-3, atol=1e-5
            )
            if module.magnitude is not None:
                gradient = found[f"{stem}.lora_magnitude_vector.default.weight"]
                torch.testing.assert_close(module.magnitude.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_we_load_what_peft_saved(dora, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=dora)
    other = peft.get_peft_model(theirs(), config)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    other.save_pretrained(tmp_path)
    model = network()
    assert load_adapter(model, tmp_path).dora is dora
    torch.testing.assert_close(logits(model), their_logits(other), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_network_is_refused(tmp_path):
    config = LoraConfig(rank=4)
    save_adapter(adapted(config), config, tmp_path, base="base")
    other = Qwen2(ModelConfig(64, 64, 48, 2, 4, 2, tie_word_embeddings=True))
    with pytest.raises(OpenQwenError, match=r"\[32, 4\].*\[64, 4\]"):
        load_adapter(other, tmp_path)
    shallow = Qwen2(ModelConfig(64, 32, 48, 1, 4, 2, tie_word_embeddings=True))
    with pytest.raises(OpenQwenError, match=r"no linear layer 'model\.layers\.1"):
        load_adapter(shallow, tmp_path)
    with pytest.raises(OpenQwenError, match="Did you mean 'q_proj'"):
        add_adapters(network(), LoraConfig(targets=["q_prj"]), torch.Generator())
