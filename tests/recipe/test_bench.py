"""`openqwen bench`: each comparison runs on tiny data, with or without a peer, and says what was
measured.
"""

import json
import sys

import pytest
import torch

from openqwen.cli import main
from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.recipe.bench import train
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

PEER = """
import json, os, sys
assert "PYTHONPATH" not in os.environ
job = json.load(open(sys.argv[1]))
print(json.dumps({"speed": 1.0 if "THP_MEM_ALLOC_ENABLE" in os.environ else 0.5, "memory": 2**40}))
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(train, "_PEER", tmp_path / "peer.py")
    return sys.executable


def save_model(folder, positions):
    tokenizer = train_tokenizer(["What is one and one? Two. " * 9], TokenizerConfig(vocabulary=270))
    model = Qwen2(ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=positions))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder)


def test_the_engine_alone(tmp_path, capsys):
    save_model(tmp_path / "model", 2048)
    arguments = [
        "bench",
        "engine",
        "--model",
        str(tmp_path / "model"),
        "--kinds",
        "float32",
        "--rounds",
        "1",
    ]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("float32 1 of 1", "prefill", "drafts", "warm", "tokens/s"))


def test_fine_tuning(tmp_path, peer, capsys):
    save_model(tmp_path / "model", 256)
    rows = [{"question": f"What is one and {n}?", "answer": "Two."} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "bench",
        "train",
        "--kind",
        "sft",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--steps",
        "3",
    ]
    assert (
        main([*arguments, "--batch", "2", "--model", str(tmp_path / "model"), "--peer", peer]) == 0
    )
    told = capsys.readouterr().out
    assert all(
        word in told
        for word in ("OpenQwen", "peer", "ratio", "of matrix peak", "GiB", "2.0 to 3.5×")
    )
    assert "0.5" in told  # the peer did not get our huge pages
    assert main(arguments) == 1
    assert "Which model" in capsys.readouterr().err


def test_pretraining_alone(tmp_path, monkeypatch, capsys):
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    monkeypatch.setattr(train, "_SMALL", train._SMALL | small)
    rows = [{"text": "a document of words " * n} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "bench",
        "train",
        "--kind",
        "pretrain",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--batch",
        "4",
    ]
    assert main([*arguments, "--steps", "2"]) == 0
    told = capsys.readouterr().out
    assert "OpenQwen" in told
    assert "ratio" not in told
    assert main([*arguments, "--steps", "3"]) == 1
    assert "12 examples are needed; there are 8" in capsys.readouterr().err
    assert main(["bench"]) == 1
