"""Qwen2 in GGUF: names as llama.cpp's, numbers back as they were, the types of its own files, odd
files named.
"""

import dataclasses

import numpy as np
import pytest
import torch

from openqwen.model import ModelConfig, Qwen2, initialize, load_model
from openqwen.model.gguf import KINDS, not_stored, read_gguf, save_gguf
from openqwen.model.gguf_blocks import dequantize
from openqwen.model.long_context import DualChunk, Yarn
from openqwen.model.stored import Reader
from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import NewTensor, read_header, write_gguf

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    max_position_embeddings=512,
)
VOCABULARY = {"tokenizer.ggml.eos_token_id": 61, "tokenizer.ggml.bos_token_id": 60}


def network(**changes):
    model = Qwen2(dataclasses.replace(CONFIG, **changes))
    initialize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def written(path, model, kind):
    rounded = save_gguf(model, path, kind, "tiny", VOCABULARY)
    return rounded, read_header(path)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_comes_back_as_it_was(tmp_path, tied):
    model = network(tie_word_embeddings=tied)
    rounded, header = written(tmp_path / "x.gguf", model, "F32")
    assert rounded == []
    assert ("output.weight" in header.tensors) is not tied
    again = load_model(tmp_path / "x.gguf")
    assert again.config == dataclasses.replace(model.config, bos_token_id=60, eos_token_id=61)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_answers_end_where_llama_cpp_ends_them(tmp_path):
    """At the ids that the file states, and at Qwen2's two by their names."""
    tokens = [f"t{i}" for i in range(62)] + ["<|endoftext|>", "<|im_end|>"]
    stated = {"eos": 7, "eot": 9, "eom": 4_000_000_000}
    words = {f"tokenizer.ggml.{name}_token_id": i for name, i in stated.items()}
    save_gguf(
        network(), tmp_path / "x.gguf", "F32", "tiny", words | {"tokenizer.ggml.tokens": tokens}
    )
    config = load_model(tmp_path / "x.gguf").config
    assert (config.eos_token_id, config.stops) == (7, (7, 9, 63, 62))
    save_gguf(network(), tmp_path / "y.gguf", "F32", "tiny", {})
    assert load_model(tmp_path / "y.gguf").config.stops == ()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_other_types_come_back_rounded_once(tmp_path, kind):
    model = network()
    rounded, header = written(tmp_path / "x.gguf", model, kind)
    assert {tensor.name for tensor in rounded} == {
        n for n, t in header.tensors.items() if len(t.shape) == 2
    }
    assert all(0 < tensor.error < (0.1 if kind == "Q4_0" else 0.01) for tensor in rounded)
    again = load_model(tmp_path / "x.gguf", dtype=None)
    assert next(again.parameters()).dtype == torch.float32
    assert written(tmp_path / "y.gguf", again, kind)[0] == []
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_any_dtype_is_the_cast_of_float32(tmp_path, dtype):
    written(tmp_path / "x.gguf", network(), "Q8_0")
    exact = load_model(tmp_path / "x.gguf").state_dict()
    for name, tensor in load_model(tmp_path / "x.gguf", dtype=dtype).state_dict().items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("tied", "name", "expected"),
    [
        (True, "token_embd.weight", "Q8_0"),
        (False, "token_embd.weight", "Q4_0"),
        (False, "output.weight", "Q8_0"),
        (False, "output_norm.weight", "F32"),
        (False, "blk.0.attn_q.bias", "F32"),
        (False, "blk.1.ffn_down.weight", "Q4_0"),
    ],
)
def test_a_q4_file_is_mixed_as_in_llama_cpp(tmp_path, tied, name, expected):
    _, header = written(tmp_path / "x.gguf", network(tie_word_embeddings=tied), "Q4_0")
    assert header.tensors[name].type == expected
    assert header.metadata["general.file_type"] == 2


def test_rows_that_no_block_divides_are_float16(tmp_path):
    _, header = written(tmp_path / "x.gguf", network(intermediate_size=72), "Q8_0")
    assert header.tensors["blk.0.ffn_down.weight"].type == "F16"
    assert header.tensors["blk.0.ffn_up.weight"].type == "Q8_0"


def test_large_tensors_are_packed_piece_by_piece(tmp_path):
    model = network(vocab_size=5000)
    written(tmp_path / "x.gguf", model, "Q8_0")
    again = load_model(tmp_path / "x.gguf")
    assert (again.lm_head.weight - model.lm_head.weight).abs().max() < 1e-3


def test_weights_that_a_type_cannot_hold_are_an_error(tmp_path):
    model = network()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    with pytest.raises(OpenQwenError, match=r"'blk\.1\.ffn_up\.weight' .* F16"):
        written(tmp_path / "x.gguf", model, "F16")
    assert not (tmp_path / "x.gguf").exists()


def test_yarn_is_kept_and_what_has_no_place_is_told(tmp_path):
    yarn = Yarn(4.0, 128, beta_fast=16.0)
    model = network(
        yarn=yarn, dual_chunk=DualChunk(64, 8), generation={"temperature": 0.7, "eos_token_id": 61}
    )
    _, header = written(tmp_path / "x.gguf", model, "F32")
    assert header.metadata["qwen2.rope.scaling.type"] == "yarn"
    config, _ = read_gguf(tmp_path / "x.gguf")
    assert (config.yarn, config.dual_chunk) == (yarn, None)
    assert [text.partition(" ")[0] for text in not_stored(model.config)] == ["dual", "generation"]
    assert "temperature" in not_stored(model.config)[1]
    assert "eos" not in not_stored(model.config)[1]


def test_names_are_those_of_the_reference(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = network()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    expected = {
        names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()
    }
    _, header = written(tmp_path / "x.gguf", model, "F32")
    assert set(header.tensors) == expected
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field(gguf.Keys.LLM.BLOCK_COUNT.format(arch="qwen2")).contents() == 2
    assert reader.get_field(gguf.Keys.Attention.HEAD_COUNT_KV.format(arch="qwen2")).contents() == 2
    assert reader.get_field(gguf.Keys.Rope.FREQ_BASE.format(arch="qwen2")).contents() == 10_000.0


MOE = {
    "general.architecture": "qwen2moe",
    "qwen2moe.block_count": 1,
    "qwen2moe.context_length": 512,
    "qwen2moe.embedding_length": 64,
    "qwen2moe.feed_forward_length": 96,
    "qwen2moe.attention.head_count": 4,
    "qwen2moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2moe.expert_count": 3,
    "qwen2moe.expert_used_count": 2,
}


def moe_file(path, metadata=MOE):
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (64, 64),
        "blk.0.ffn_gate_inp.weight": (3, 64),
        "blk.0.ffn_gate_inp_shexp.weight": (64,),
        "blk.0.ffn_gate_exps.weight": (3, 32, 64),
        "blk.0.ffn_up_exps.weight": (3, 32, 64),
        "blk.0.ffn_down_exps.weight": (3, 64, 32),
        "blk.0.ffn_up_shexp.weight": (96, 64),
        "blk.0.ffn_gate_shexp.weight": (96, 64),
        "blk.0.ffn_down_shexp.weight": (64, 96),
    }
    values = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = [NewTensor(n, v.shape, "F32", lambda v=v: [v.tobytes()]) for n, v in values.items()]
    write_gguf(path, metadata, tensors)
    return values


def test_a_mixture_is_read_expert_by_expert(tmp_path):
    values = moe_file(tmp_path / "x.gguf")
    config, stored = read_gguf(tmp_path / "x.gguf")
    assert (config.num_experts, config.num_experts_per_tok, config.num_key_value_heads) == (3, 2, 4)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (32, 96)
    assert (config.rope_theta, config.tie_word_embeddings) == (10_000.0, True)
    block = "model.layers.0.mlp"
    with Reader() as reader:
        for own, half in (("gate", "gate"), ("up", "up"), ("down", "down")):
            for expert in range(3):
                tensor = reader.mapped(stored[f"{block}.experts.{expert}.{half}_proj.weight"])
                assert np.array_equal(tensor, values[f"blk.0.ffn_{own}_exps.weight"][expert])
        assert stored[f"{block}.shared_expert_gate.weight"].shape == (1, 64)
        assert np.array_equal(
            reader.mapped(stored[f"{block}.gate.weight"]), values["blk.0.ffn_gate_inp.weight"]
        )
    assert f"{block}.shared_expert.down_proj.weight" in stored


def test_a_part_of_packed_experts_is_a_part_of_the_bytes(tmp_path):
    data = np.random.default_rng(0).integers(0, 100, (3, 4, 34), dtype=np.uint8)
    tensor = NewTensor("blk.0.ffn_up_exps.weight", (3, 4, 32), "Q8_0", lambda: [data.tobytes()])
    embedding = NewTensor("token_embd.weight", (64, 64), "F32", lambda: [bytes(64 * 64 * 4)])
    write_gguf(
        tmp_path / "x.gguf",
        MOE | {"qwen2moe.expert_shared_feed_forward_length": 96},
        [embedding, tensor],
    )
    _, stored = read_gguf(tmp_path / "x.gguf")
    target = torch.empty(4, 32)
    with Reader() as reader:
        reader.copy(stored["model.layers.0.mlp.experts.1.up_proj.weight"], target)
    assert np.array_equal(target.reshape(-1), dequantize(data[1].tobytes(), "Q8_0"))


def test_a_model_in_several_files_is_read_from_the_first(tmp_path):
    model = network()
    written(tmp_path / "x.gguf", model, "F32")
    header = read_header(tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    tensors = [
        NewTensor(name, t.shape, t.type, lambda t=t: [data[t.offset : t.offset + t.size]])
        for name, t in header.tensors.items()
    ]
    first, second = (tmp_path / f"x-0000{number}-of-00002.gguf" for number in (1, 2))
    write_gguf(first, {**header.metadata, "split.count": 2}, tensors[:9])
    write_gguf(second, {"split.count": 2}, tensors[9:])
    for name, tensor in load_model(first).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    with pytest.raises(OpenQwenError, match="one of 2 files"):
        load_model(second)
    second.unlink()
    with pytest.raises(OpenQwenError, match="no such file"):
        load_model(first)


def test_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(OpenQwenError, match="no such file"):
        load_model(path)
    embedding = NewTensor("token_embd.weight", (64, 64), "F32", lambda: [bytes(64 * 64 * 4)])
    write_gguf(path, {"general.architecture": "llama"}, [embedding])
    with pytest.raises(OpenQwenError, match="'llama'"):
        load_model(path)
    write_gguf(path, {"general.architecture": "qwen2"}, [embedding])
    with pytest.raises(OpenQwenError, match="lacks hidden_size"):
        load_model(path)
    _, header = written(path, network(), "F32")
    write_gguf(path, header.metadata, [embedding])
    with pytest.raises(OpenQwenError, match="2 layers"):
        load_model(path)
    extra = [NewTensor(f"blk.0.odd{i}.weight", (1,), "F32", lambda: [bytes(4)]) for i in range(2)]
    write_gguf(path, header.metadata, [embedding, *extra])
    with pytest.raises(
        OpenQwenError, match=r"25 missing tensors: .*2 extra tensors: 'blk\.0\.odd0\.weight'"
    ):
        load_model(path)


def test_every_kind_is_a_type_of_the_reference():
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    for kind, number in KINDS.items():
        names = {
            "F32": "ALL_F32",
            "F16": "MOSTLY_F16",
            "BF16": "MOSTLY_BF16",
            "Q8_0": "MOSTLY_Q8_0",
            "Q4_0": "MOSTLY_Q4_0",
        }
        assert gguf.LlamaFileType[names[kind]] == number
