"""Small checkpoints in folders, ours and those that transformers writes."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from openqwen.model import (
    ModelConfig,
    Qwen2,
    initialize,
)
from openqwen.model.weights import save_weights

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}


class NoTokenizer:
    """Stands for a tokenizer whose files do not matter here."""

    eos_id, endoftext_id = 61, 60

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def make_folder(path):
    """A small tied network in a folder; returns the folder."""
    model = Qwen2(ModelConfig(64, 32, 48, 2, 2, 1, tie_word_embeddings=True))
    initialize(model, torch.Generator().manual_seed(0))
    (path / "config.json").write_text(json.dumps(model.config.to_json()))
    save_weights(model, path)
    return path


def reference_folder(path, tied, dtype, **saving):
    """A folder that transformers wrote."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(**SIZES, tie_word_embeddings=tied, eos_token_id=60, bos_token_id=60)
    ).to(dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=[61, 60], pad_token_id=60, do_sample=True, temperature=0.7
    )
    model.save_pretrained(path, **saving)
    return model


def weight_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def file_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors.new")
    (folder / "model.safetensors.new").rename(folder / "model.safetensors")
