"""The real checkpoint, where it is: what it says of itself, and transformers' own reading of the
same file.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from openqwen.model import Packed, load_model
from openqwen.model.gguf import read_gguf
from openqwen.support.gguf import read_header

PATH = Path(
    os.environ.get(
        "OPENQWEN_REAL_CHECKPOINT",
        Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )
)
pytestmark = pytest.mark.skipif(
    not PATH.is_file(), reason=f"the real checkpoint is not here: {PATH}"
)


def test_its_hyper_parameters_are_those_of_the_published_model():
    config, stored = read_gguf(PATH)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        896,
        24,
        14,
    )
    assert (config.num_key_value_heads, config.intermediate_size, config.vocab_size) == (
        2,
        4864,
        151_936,
    )
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (
        1e-6,
        1e6,
        32_768,
    )
    assert (config.bos_token_id, config.eos_token_id) == (151_643, 151_645)
    assert {tensor.type for tensor in stored.values()} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert len(read_header(PATH).metadata["tokenizer.ggml.tokens"]) == config.vocab_size


@pytest.mark.slow
def test_logits_are_those_of_transformers():
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"transformers needs the package {package} to read the same file")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.float32
    )
    ours = load_model(PATH)
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens = torch.arange(1_000, 1_100)
    with torch.inference_mode():
        logits = ours.logits(ours(tokens, torch.arange(100), Packed.from_lengths([100])))
        reference = theirs(tokens[None]).logits[0]
    assert (logits - reference).norm() / reference.norm() < 1e-4
    assert torch.equal(logits.argmax(-1), reference.argmax(-1))
