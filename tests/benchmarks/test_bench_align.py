"""benchmarks/bench_align.py: what both sides read, and our side on a random model."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_align")


@pytest.fixture
def data(tmp_path):
    lines = [
        {"question": f"What is {n} + 1?", "answer": f"It is one more.\n#### {n + 1}"}
        for n in range(9)
    ]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_are_a_solution_and_the_next_problems(script, data, tmp_path):
    script._write_rows(data, tmp_path, 8)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[0]["prompt"][-1]["content"].startswith("What is 0 + 1?")
    assert rows[0]["chosen"][0]["content"].endswith("#### 1")
    assert rows[0]["rejected"] == rows[1]["chosen"]
    with pytest.raises(OpenQwenError, match="10 problems are needed"):
        script._write_rows(data, tmp_path, 9)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_our_side_measures_a_random_model(script, data, tmp_path, kind, monkeypatch):
    tokenizer = train_tokenizer(["What is 1 + 1? It is one more. " * 9], TokenizerConfig())
    model = Qwen2(ModelConfig(1024, 32, 48, 1, 2, 1, tie_word_embeddings=True))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, tmp_path / "model", chat=True)
    script._write_rows(data, tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        script.dpo_stage, "reference_log_probs", script.dpo_stage.reference_log_probs
    )
    job = {"kind": kind, "model": str(tmp_path / "model"), "folder": str(tmp_path), "steps": 2}
    job |= {
        "batch": 2,
        "rate": 1e-6,
        "samples": 3,
        "answer": 5,
        "precision": "float32",
        "sampler": "none",
    }
    found = script.ours(job)
    assert found["seconds"] > 0
    assert found["memory"] > 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    asked = [len(tokenizer.encode_chat(row["prompt"])[0]) for row in rows]
    answers = 2 if kind == "dpo" else 3
    assert found["tokens"] > 2 * answers * min(asked)
    assert found["tokens"] < 2 * answers * (max(asked) + 60)
    table = script._table(kind, {"OpenQwen": found, "TRL, float32": found}, job)
    assert "1.00×" in list(table.columns[2].cells)
