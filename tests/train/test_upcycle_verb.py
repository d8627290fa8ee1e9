"""`openqwen upcycle DENSE OUTPUT` on a tiny checkpoint."""

import json

import pytest
import torch

from openqwen import cli
from openqwen.model import ModelConfig, Packed, Qwen2, initialize, load_model, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    tokenizer = train_tokenizer(
        iter(["one two three four five"] * 20), TokenizerConfig(vocabulary=300)
    )
    model = Qwen2(
        ModelConfig(384, 32, 118, 2, 2, 1, max_position_embeddings=64, tie_word_embeddings=True)
    )
    initialize(model, torch.Generator().manual_seed(0))
    save_checkpoint(model, tokenizer, folder)
    return folder


def test_a_dense_checkpoint_becomes_a_mixture(dense, tmp_path, capsys):
    output = tmp_path / "mixture"
    command = [
        "upcycle",
        str(dense),
        str(output),
        "--experts",
        "8",
        "--experts-per-token",
        "2",
        "--seed",
        "4",
    ]
    assert cli.main([*command, "--shared-width", "118", "--vocabulary-rows", "352"]) == 0
    model = load_model(output)
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (
        8,
        2,
        16,
    )
    assert (config.shared_expert_intermediate_size, config.vocab_size) == (118, 352)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["seed"] == 4
    assert manifest["metrics"]["parameters"] == config.parameters()
    assert manifest["metrics"]["copies"] == 2
    assert manifest["metrics"]["discarded_channels"] == 2 * 118 - 8 * 16
    assert load_tokenizer(output).encode("two four") == load_tokenizer(dense).encode("two four")

    tokens = torch.tensor(load_tokenizer(dense).encode("one two three"))
    packed = Packed.from_lengths([len(tokens)])
    parent = load_model(dense)(tokens, packed.positions, packed)
    near = model(tokens, packed.positions, packed)
    assert (near - parent).abs().max() < 0.05 * parent.abs().max()


def test_too_few_rows_are_refused(dense, tmp_path, capsys):
    assert cli.main(["upcycle", str(dense), str(tmp_path / "x"), "--vocabulary-rows", "10"]) == 1
    assert "10 embedding rows are fewer than the tokenizer's" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_flags_name_the_folders_too(dense, tmp_path):
    output = tmp_path / "mixture"
    assert (
        cli.main(["upcycle", "--model", str(dense), "--output", str(output), "--no-keep-output"])
        == 0
    )
    assert load_model(output).config.num_experts == 64
