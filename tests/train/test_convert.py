"""`openqwen convert`: every way round, nothing replaced unasked, and every loss is told."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from openqwen import cli, load_model, load_tokenizer, save_checkpoint
from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import read_header
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.gguf import gguf_metadata
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def tokenizer():
    return Tokenizer([*BYTES_IN_ID_ORDER, b"th", b"the"], [(83, 71), (256, 68)], template=TEMPLATE)


def network(dtype=torch.float32):
    model = Qwen2(
        ModelConfig(288, 64, 96, 2, 4, 2, tie_word_embeddings=True, generation={"temperature": 0.7})
    )
    initialize(model, torch.Generator().manual_seed(0))
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(network(), tokenizer(), tmp_path / "source")
    return tmp_path / "source"


def run(capsys, *arguments):
    """The exit status, and all that was said."""
    status = cli.main(["convert", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out + out.err


def same(a, b):
    left, right = load_model(a).state_dict(), load_model(b).state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def test_a_folder_to_a_folder(capsys, folder, tmp_path):
    status, said = run(capsys, folder, tmp_path / "b")
    assert (status, "no weight changed" in said) == (0, True)
    for file in folder.iterdir():
        read = (
            (lambda path: json.loads(path.read_text()))
            if file.name == "config.json"
            else Path.read_bytes
        )
        assert read(tmp_path / "b" / file.name) == read(file), file.name
    status, said = run(capsys, folder, tmp_path / "half", "--dtype", "bfloat16")
    assert "rounded from float32 to bfloat16: 15 of 26 tensors, largest relative error" in said
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path / "half", dtype=None).model.norm.weight.dtype == torch.bfloat16
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")]
)
def test_to_gguf_keeps_the_precision_unless_told(capsys, tmp_path, dtype, kind):
    save_checkpoint(network(dtype), tokenizer(), tmp_path / "a")
    status, said = run(capsys, tmp_path / "a", tmp_path / "x.gguf")
    assert (status, "no weight changed" in said) == (0, True)
    assert "generation defaults are not stored in GGUF: temperature" in said
    header = read_header(tmp_path / "x.gguf")
    assert header.tensors["blk.0.attn_q.weight"].type == kind
    assert same(tmp_path / "a", tmp_path / "x.gguf")


def test_to_blocks_says_how_much_was_lost(capsys, folder, tmp_path):
    status, said = run(capsys, folder, tmp_path / "x.gguf", "--type", "q4_0")
    assert status == 0
    assert "rounded from float32 to Q4_0: 15 of 26 tensors, largest relative error" in said
    assert 0.05 < float(said.split("largest relative error ")[1].split(" ")[0]) < 0.1


def test_the_tokenizer_travels_in_the_file(folder, tmp_path, capsys):
    run(capsys, folder, tmp_path / "x.gguf")
    metadata = read_header(tmp_path / "x.gguf").metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[256:260] == ["th", "the", "<|endoftext|>", "<|im_start|>"]
    assert tokens[-1] == "[PAD287]"
    by_name = dict(zip(tokens, kinds.tolist()))
    kinds_of = [
        by_name[n] for n in ("the", "<|im_end|>", "<|fim_prefix|>", "<tool_call>", "[PAD287]")
    ]
    assert kinds_of == [1, 3, 3, 4, 5]
    assert metadata["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer().eos_id
    assert metadata["tokenizer.ggml.padding_token_id"] == tokenizer().endoftext_id


def test_from_gguf_to_a_folder_and_back_to_the_same_file(capsys, folder, tmp_path):
    run(capsys, folder, tmp_path / "x.gguf", "--type", "q8_0")
    status, said = run(capsys, tmp_path / "x.gguf", tmp_path / "b")
    assert (status, "no generation defaults" in said) == (0, True)
    assert same(tmp_path / "x.gguf", tmp_path / "b")
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer().eos_id, tokenizer().endoftext_id]
    text = "the <|im_end|> other"
    assert load_tokenizer(tmp_path / "b").encode(text, True) == tokenizer().encode(text, True)
    run(capsys, tmp_path / "b", tmp_path / "again" / "x.gguf", "--type", "q8_0")
    assert (tmp_path / "again" / "x.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


def test_stop_tokens_survive_a_gguf_file(capsys, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer().eos_id, 9]})
    )
    run(capsys, folder, tmp_path / "x.gguf")
    run(capsys, tmp_path / "x.gguf", tmp_path / "b")
    for source in (tmp_path / "x.gguf", tmp_path / "b"):
        assert {7, 9, tokenizer().eos_id} <= set(load_model(source).config.stops)


def test_a_hub_id_is_a_source(capsys, folder, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--Qwen--Tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("Qwen/Tiny").vocab_size == tokenizer().vocab_size
    assert run(capsys, "Qwen/Tiny", tmp_path / "b")[0] == 0
    assert same(folder, tmp_path / "b")


def test_nothing_is_replaced_unasked(capsys, folder, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "diary.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        status, said = run(capsys, folder, tmp_path / "b", *options)
        assert (status, (tmp_path / "b" / "diary.txt").read_text()) == (1, "mine")
        assert ("--overwrite" in said) is not bool(options)
    (tmp_path / "x.gguf").write_bytes(b"old")
    assert run(capsys, folder, tmp_path / "x.gguf")[0] == 1
    assert (tmp_path / "x.gguf").read_bytes() == b"old"
    assert run(capsys, folder, tmp_path / "x.gguf", "--overwrite")[0] == 0
    assert same(folder, tmp_path / "x.gguf")


def test_a_folder_may_be_replaced_by_itself(capsys, folder, tmp_path):
    exact = load_model(folder).state_dict()
    exact = {name: tensor.clone() for name, tensor in exact.items()}
    assert run(capsys, folder, folder, "--overwrite", "--dtype", "bfloat16")[0] == 0
    for name, tensor in load_model(folder, dtype=None).state_dict().items():
        assert torch.equal(tensor, exact[name].bfloat16())
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_flags_that_do_not_fit_are_refused(capsys, folder, tmp_path):
    assert (
        "--dtype does not go with"
        in run(capsys, folder, tmp_path / "x.gguf", "--dtype", "float16")[1]
    )
    assert "--type does not go with" in run(capsys, folder, tmp_path / "x", "--type", "f16")[1]
    assert "config.json is missing" in run(capsys, tmp_path, tmp_path / "x")[1]
    assert not (tmp_path / "x").exists()


def test_weights_that_a_dtype_cannot_hold_leave_no_target(capsys, tmp_path):
    model = network()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    save_checkpoint(model, tokenizer(), tmp_path / "a")
    status, said = run(capsys, tmp_path / "a", tmp_path / "b", "--dtype", "float16")
    assert (status, "'model.layers.1.mlp.up_proj.weight' has weights" in said) == (1, True)
    status, said = run(capsys, tmp_path / "a", tmp_path / "b.gguf", "--type", "f16")
    assert (status, "'blk.1.ffn_up.weight' has weights" in said) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_tokenizer_with_more_tokens_than_rows_is_refused():
    with pytest.raises(OpenQwenError, match="280 tokens, the network only 270"):
        gguf_metadata(tokenizer(), 270, 0)
