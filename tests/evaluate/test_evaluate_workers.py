"""`openqwen evaluate` by one engine, by several processes, and by Ray: the same scores."""

import json

import pytest
from published_forms import write_all
from tiny_chat import model, tokenizer

import openqwen.cli
from openqwen.model import save_checkpoint

TASKS = "gsm8k,mmlu-base,hellaswag"  # answers; choices of one token; choices of several


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_all(folder / "data")
    save_checkpoint(model(0), tokenizer(), folder / "model", chat=True)
    return folder


def run(place, name, *flags):
    """(scores, rows) of a run with a cache of its own."""
    output = place / name
    words = ["evaluate", str(place / "model"), "--data", str(place / "data"), "--tasks", TASKS]
    words += ["--max-tokens", "8", "--output", str(output), "--cache", str(output / "cache")]
    assert openqwen.cli.main([*words, *flags]) == 0
    scores = json.loads((output / "results.json").read_text())["scores"]
    for one in scores.values():
        del one["seconds"]
    rows = {path.name: path.read_text() for path in (output / "answers").iterdir()}
    return scores, {name: list(map(json.loads, text.splitlines())) for name, text in rows.items()}


def test_workers_give_the_scores_of_one_engine(place, kind):
    alone = run(place, "alone")
    flags = ["--engine", kind, "--workers.count", "2", "--workers.cpus", "1"]
    scores, rows = run(place, kind, *flags)
    assert scores == alone[0]
    assert rows.keys() == alone[1].keys() == {f"{name}.jsonl" for name in TASKS.split(",")}
    for name, lines in rows.items():
        for line, other in zip(lines, alone[1][name], strict=True):
            given, wanted = line.pop("logprobs", []), other.pop("logprobs", [])
            assert given == pytest.approx(wanted, abs=1e-4)
            assert line == other


def test_workers_are_not_for_servers(place, capsys):
    words = ["evaluate", "m", "--tasks", "gsm8k", "--data", str(place / "data")]
    words += ["--generator", "http://127.0.0.1:1/v1", "--engine", "processes"]
    assert openqwen.cli.main([*words, "--output", str(place / "server")]) == 1
    assert "a model that they can load" in capsys.readouterr().err
