"""Two processes give one process's gradient, and `verify` says so; another model's is found out."""

import json

import numpy as np
import pytest
import torch

from openqwen.cli import main
from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.recipe import verify
from openqwen.tokenizer import TokenizerConfig, train_tokenizer


def network(seed):
    model = Qwen2(
        ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=256, tie_word_embeddings=True)
    )
    initialize(model, torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    save_checkpoint(
        network(1),
        train_tokenizer(["one two"] * 9, TokenizerConfig(vocabulary=300)),
        folder / "model",
    )
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "one two"}]
        for q in ("one", "two", "a")
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    return folder


def test_verify_proves_it_over_two_processes(place, capsys):
    assert main(["verify", "--model", str(place / "model"), "--data", str(place / "d.jsonl")]) == 0
    assert "✓  two processes" in capsys.readouterr().out


def test_where_memory_is_short_it_says_so(place, capsys, monkeypatch):
    monkeypatch.setattr(verify, "missing_memory", lambda config: 3 * 2**30)
    assert main(["verify", "--model", str(place / "model"), "--data", str(place / "d.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "two processes" not in told.split("3.0 GiB")[0]
    assert "3.0 GiB" in told


def test_the_gradient_of_another_model_is_found_out(place):
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 384, n).tolist(), [1] * n) for n in (5, 9, 7)]
    assert verify.ranks_do_not_matter(network(1), place / "model", samples).holds
    assert not verify.ranks_do_not_matter(network(2), place / "model", samples).holds
