"""Checkpoints of mixtures: folders and GGUF files with the experts as transformers and llama.cpp
name them.
"""

import json

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from openqwen.model import Packed, load_model, save_checkpoint
from openqwen.model.gguf import save_gguf
from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import read_header

pytest.importorskip("openqwen.model.experts")


class NoTokenizer:
    """Stands for a tokenizer whose files do not matter here."""

    eos_id, endoftext_id = 61, 60

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def reference(folder, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "bos_token_id": 60,
        "eos_token_id": 61,
    }
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes | changes)).to(dtype)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [{}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_a_mixture_of_transformers_is_saved_as_it_was(tmp_path, dtype, layers):
    model = reference(tmp_path / "a", dtype, **layers)
    ours = load_model(tmp_path / "a", dtype=None)
    save_checkpoint(ours, NoTokenizer(), tmp_path / "b")
    before, after = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "ab")
    assert after == before
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab")
    assert {key: new.get(key) for key in old} == old
    tokens = torch.arange(20)
    logits = ours.logits(ours(tokens, tokens, Packed.from_lengths([20])))
    expected = model(tokens[None]).logits[0]
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(logits, expected, **tight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixture_survives_gguf(tmp_path, tied):
    reference(tmp_path / "a", tie_word_embeddings=tied)
    model = load_model(tmp_path / "a")
    assert save_gguf(model, tmp_path / "x.gguf", "F32", "tiny", {}) == []
    again = load_model(tmp_path / "x.gguf")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    fields = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    )
    assert [getattr(again.config, f) for f in fields] == [getattr(model.config, f) for f in fields]

    rounded = save_gguf(model, tmp_path / "y.gguf", "Q8_0", "tiny", {})
    types = {name: tensor.type for name, tensor in read_header(tmp_path / "y.gguf").tensors.items()}
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.2.ffn_down_shexp.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.ffn_gate_inp_shexp.weight"] == "F32"
    assert max(tensor.error for tensor in rounded) < 0.01


def test_names_are_those_of_the_reference(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = reference(tmp_path / "a")
    save_gguf(load_model(tmp_path / "a"), tmp_path / "x.gguf", "F32", "tiny", {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, 3)
    published = [
        name.replace("_proj", "_proj.weight") if ".experts." in name else name
        for name in model.state_dict()
    ]
    published = [name.replace("experts.gate_up_proj", "experts.gate_proj") for name in published]
    published += [
        name.replace("gate_proj", "up_proj") for name in published if "experts.gate_proj" in name
    ]
    expected = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in published}
    assert set(read_header(tmp_path / "x.gguf").tensors) == expected


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"mlp_only_layers": [0]}])
def test_a_mixture_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, changes):
    reference(tmp_path / "a", **changes)
    with pytest.raises(OpenQwenError, match=r"llama\.cpp's Qwen2-MoE"):
        save_gguf(load_model(tmp_path / "a"), tmp_path / "x.gguf", "F32", "tiny", {})
