"""Adapters as PEFT writes them: each form answers as in PEFT, or is refused by its name."""

import json

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
from openqwen.model.quantize import quantize
from openqwen.support.errors import OpenQwenError
from openqwen.train.log_probs import cross_entropy, log_probs

TOKENS = torch.tensor([5, 9, 2, 7, 7, 1, 30])
PACKED = Packed.from_lengths([4, 3])


def network(tied=False):
    model = Qwen2(ModelConfig(64, 32, 48, 2, 4, 2, tie_word_embeddings=tied))
    initialize(model, torch.Generator().manual_seed(3))
    return model


def hidden(model):
    return model(TOKENS, PACKED.positions, PACKED)


def logits(model):
    return model.logits(hidden(model))


def theirs(tied=False):
    model = network(tied)
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**model.config.to_json()))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def their_logits(other):
    return torch.cat([other(row[None]).logits[0] for row in (TOKENS[:4], TOKENS[4:])])


def moved(other):
    """The same network of PEFT with every trained tensor away from its start."""
    torch.manual_seed(0)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return other


def saved(folder, tied=False, **options):
    """An adapter that PEFT saved, and its logits."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]} | options
    other = moved(peft.get_peft_model(theirs(tied), peft.LoraConfig(**options)))
    other.save_pretrained(folder)
    return their_logits(other)


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


FULL = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
PATTERNS = {
    "target_modules": ["q_proj", "up_proj", "down_proj"],
    "rank_pattern": {"up_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 6},
    "alpha_pattern": {"layers.0.mlp.up_proj": 3, "down_proj": 5},
}
FORMS = {
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.1\.(self_attn|mlp)\.(q|up)_proj"},
    "full names": {"target_modules": FULL},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "one layer": {"layers_to_transform": 1},
    "layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora with patterns": {**PATTERNS, "use_rslora": True},
    "dora with patterns": {**PATTERNS, "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "dropout": {"lora_dropout": 0.0, "inference_mode": False},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head with dora": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_every_form_answers_as_in_peft_and_is_written_again(options, tmp_path):
    expected = saved(tmp_path / "theirs", **options)
    assert (expected - logits(network())).abs().max() > 1e-3
    model = network()
    config = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    save_adapter(model, config, tmp_path / "ours", "base")
    again = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours")
    torch.testing.assert_close(their_logits(again), expected, rtol=1e-4, atol=1e-5)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_rank_and_alpha_are_pefts_defaults_where_a_file_is_silent(tmp_path):
    expected = saved(tmp_path, r=8, lora_alpha=8)
    edited(tmp_path, r="gone", lora_alpha="gone", target_modules="gone", bias="gone")
    model = network()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_fan_in_fan_out_means_nothing_for_linear_layers(tmp_path):
    expected = saved(tmp_path)
    edited(tmp_path, fan_in_fan_out=True)
    other = peft.PeftModel.from_pretrained(theirs(), tmp_path)
    torch.testing.assert_close(their_logits(other), expected)
    model = network()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


REFUSED = {
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "init_lora_weights: pissa": {"init_lora_weights": "pissa"},
    "init_lora_weights: pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights: olora": {"init_lora_weights": "olora"},
    "kasa_config": {"kasa_config": peft.LoraConfig.__init__.__globals__["KasaConfig"]()},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize(("name", "options"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_supported_is_named(name, options, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"]} | options
    peft.get_peft_model(theirs(), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(OpenQwenError, match=name):
        load_adapter(network(), tmp_path)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "PiSSA", "unheard-of"])
def test_a_start_that_may_have_changed_the_weights_is_named(start, tmp_path):
    saved(tmp_path)
    edited(tmp_path, init_lora_weights=start)
    with pytest.raises(OpenQwenError, match=f"init_lora_weights.*{start}"):
        load_adapter(network(), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_for_its_base_loads(start, tmp_path):
    config = peft.LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj"])
    other = peft.get_peft_model(theirs(), config)
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "start")
    other.peft_config["default"].init_lora_weights = start
    before = {"path_initial_model_for_weight_conversion": tmp_path / "start"}
    moved(other).save_pretrained(tmp_path / "end", **before)
    model = network()
    load_adapter(model, tmp_path / "end")
    torch.testing.assert_close(logits(model), their_logits(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "loss",
    [cross_entropy, lambda *x: log_probs(*x).sum()],
    ids=["cross_entropy", "log_probs"],
)
def test_losses_over_an_adapted_head_have_pefts_gradients(loss, dora, tmp_path):
    saved(tmp_path, target_modules=["v_proj", "lm_head"], use_dora=dora)
    other = peft.PeftModel.from_pretrained(theirs(), tmp_path, is_trainable=True)
    model = network()
    load_adapter(model, tmp_path)
    ours = loss(hidden(model), model.head_VD, TOKENS)
    scores = torch.log_softmax(their_logits(other), -1).gather(1, TOKENS[:, None]).sum()
    expected = -scores if loss is cross_entropy else scores
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    ours.backward()
    expected.backward()
    found = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert "lm_head" in adapted
    for name, module in adapted.items():
        stem = f"base_model.model.{name}"
        pairs = [(module.lora_A, "lora_A.default.weight"), (module.lora_B, "lora_B.default.weight")]
        if dora:
            pairs.append((module.magnitude, "lora_magnitude_vector.default.weight"))
        for parameter, own in pairs:
            torch.testing.assert_close(parameter.grad, found[f"{stem}.{own}"], rtol=1e-3, atol=1e-5)


def test_a_head_over_packed_weights_learns(tmp_path):
    model = network()
    config = LoraConfig(rank=2, targets=["lm_head"], base="int8")
    add_adapters(model, config, torch.Generator().manual_seed(0))
    cross_entropy(hidden(model), model.head_VD, TOKENS).backward()
    assert model.lm_head.lora_B.grad.abs().sum() > 0
    torch.testing.assert_close(logits(model), hidden(model) @ model.head_VD.T, rtol=0.05, atol=0.05)


def test_a_head_that_has_no_matrix_of_its_own_is_named(tmp_path):
    saved(tmp_path, tied=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(OpenQwenError, match="no linear layer 'lm_head'"):
        load_adapter(network(tied=True), tmp_path)
    with pytest.raises(OpenQwenError, match="no linear layer called 'lm_head'"):
        add_adapters(network(tied=True), LoraConfig(targets=["lm_head"]), torch.Generator())


def test_packed_networks_take_no_adapter_in_place(tmp_path):
    saved(tmp_path)
    packed = quantize(network(), "int8")
    with pytest.raises(OpenQwenError, match="int8 already"):
        load_adapter(packed, tmp_path)
    with pytest.raises(OpenQwenError, match="int8 already"):
        add_adapters(packed, LoraConfig(), torch.Generator())


def test_an_adapted_network_is_packed_with_its_adapter(tmp_path):
    saved(tmp_path, target_modules=["q_proj", "up_proj", "lm_head"])
    adapted, merged = network(), network()
    load_adapter(adapted, tmp_path)
    load_adapter(merged, tmp_path)
    merge_adapters(merged)
    torch.testing.assert_close(logits(quantize(adapted, "int8")), logits(quantize(merged, "int8")))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 5}, r"holds \[4, 32\] for .*needs \[5, 32\]"),
        ({"r": 0}, "'r' of 'model.layers.0.self_attn.q_proj' is 0"),
        ({"lora_alpha": "16"}, "'lora_alpha' of .* is '16'"),
        ({"use_dora": True}, "holds nothing for .*lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"rank_pattern": {"(": 3}}, "'rank_pattern' does not map"),
        ({"alpha_pattern": [3]}, "'alpha_pattern' does not map"),
        ({"rank_pattern": {"q_proj": "x"}}, "'r' of .* is 'x'"),
    ],
)
def test_files_at_odds_are_named(changes, told, tmp_path):
    saved(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(OpenQwenError, match=told):
        load_adapter(network(), tmp_path)


def test_pickled_and_missing_weights_are_named(tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(OpenQwenError, match="pickle"):
        load_adapter(network(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(OpenQwenError, match="cannot be read"):
        load_adapter(network(), tmp_path)
