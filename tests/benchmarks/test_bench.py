"""The benchmark scripts run on tiny data, with or without a peer, and print what they measured."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
PEER = """
import json, os, sys
assert "PYTHONPATH" not in os.environ
job = json.load(open(sys.argv[1]))
print(json.dumps({"speed": 1.0 if "THP_MEM_ALLOC_ENABLE" in os.environ else 0.5, "memory": 2**40}))
"""


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_train")


@pytest.fixture
def peer(tmp_path, train, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(train, "_PEER", tmp_path / "peer.py")
    return sys.executable


def save_model(folder, positions):
    tokenizer = train_tokenizer(["What is one and one? Two. " * 9], TokenizerConfig(vocabulary=270))
    model = Qwen2(ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=positions))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder)


@pytest.mark.parametrize("name", ["bench_engine", "bench_serve", "bench_train"])
def test_help(name):
    command = [sys.executable, SCRIPTS / f"{name}.py", "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_the_engine_alone(tmp_path):
    save_model(tmp_path / "model", 2048)
    command = [sys.executable, SCRIPTS / "bench_engine.py", tmp_path / "model"]
    command += ["--kinds", "float32", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("float32 1 of 1", "prefill", "drafts", "warm", "tokens/s"):
        assert word in done.stdout


def test_fine_tuning(tmp_path, train, peer, capsys):
    save_model(tmp_path / "model", 256)
    rows = [{"question": f"What is one and {n}?", "answer": "Two."} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    train.bench("sft", data, model=tmp_path / "model", peer=peer, batch=2, steps=3)
    printed = capsys.readouterr().out
    for word in ("OpenQwen", "peer", "ratio", "of matrix peak", "GiB", "2.0 to 3.5×"):
        assert word in printed
    assert "0.5" in printed  # the peer did not get our huge pages
    with pytest.raises(OpenQwenError, match="No model is given"):
        train.bench("sft", data, steps=3)


def test_pretraining_alone(tmp_path, train, monkeypatch, capsys):
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    monkeypatch.setattr(train, "SMALL", train.SMALL | small)
    rows = [{"text": "a document of words " * n} for n in range(1, 9)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    train.bench("pretrain", data, batch=4, steps=2)
    printed = capsys.readouterr().out
    assert "OpenQwen" in printed
    assert "ratio" not in printed
    with pytest.raises(OpenQwenError, match="12 examples are needed; there are 8"):
        train.bench("pretrain", data, batch=4, steps=3)
