"""Checkpoints: what is wrong with one is named, with the shape that was expected."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from openqwen.model import ModelConfig, Qwen2, initialize, load_model, save_weights
from openqwen.support.errors import OpenQwenError


@pytest.fixture
def folder(tmp_path):
    model = Qwen2(ModelConfig(64, 32, 48, 2, 2, 1, tie_word_embeddings=True))
    initialize(model, torch.Generator().manual_seed(0))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_json()))
    save_weights(model, tmp_path / "model.safetensors")
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saving_what_was_loaded_gives_the_same_bytes(folder, tmp_path):
    save_weights(load_model(folder), folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_shards_are_read(folder):
    expected = load_model(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, own in parts.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing, first 'model.norm.weight' \[32\]"),
        (lambda t: t.update(extra=torch.zeros(2)), "no place for"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"'model.norm.weight' has the shape \[7\], not \[32\]",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, edit, told):
    change(folder, edit)
    with pytest.raises(OpenQwenError, match=told):
        load_model(folder)


def test_a_truncated_file_and_a_missing_one_are_named(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OpenQwenError, match="cannot be read"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(OpenQwenError, match="cannot be read"):
        load_model(folder)
    with pytest.raises(OpenQwenError, match=r"config\.json is missing"):
        load_model(folder / "nowhere")
