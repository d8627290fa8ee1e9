"""Synthesis by engines in worker processes: the bytes of one engine, whoever dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripted import Guess, records, run

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.engine.workers import EngineSource, EngineWorkers
from openqwen.instruct.synthesize.config import SynthesisConfig, open_generators
from openqwen.instruct.synthesize.method import assistant
from openqwen.model import ModelConfig, Qwen2, initialize, load_model, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.support.workers import WorkersConfig
from openqwen.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = train_tokenizer(["number 1 2 3 step by step"] * 9, TokenizerConfig(vocabulary=300))
    config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, max_position_embeddings=2048)
    network = Qwen2(config)
    initialize(network, torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(network, tokenizer, folder)
    return folder


class Talk(Guess):
    """Takes whatever the model says, and asks about it."""

    def steps(self, item, work):
        asked = work.messages("solve", question=f"number {item.data}")
        outputs = yield from work.ask([asked] * 3, Sampling(max_tokens=12, temperature=1.0))
        for output in outputs:
            again = work.messages("judge", question="?", solution=output.text)
            (look,) = yield from work.ask([again], Sampling(max_tokens=5))
            work.demonstration([*asked, assistant(output.text)], look=look.text)


def limits(**values):
    return SynthesisConfig(limits=values)


def test_workers_give_the_bytes_of_one_engine_whoever_dies(tmp_path, checkpoint, kind):
    config = limits(concurrency=8)
    engine = Engine(load_model(checkpoint), load_tokenizer(checkpoint))
    alone = run(tmp_path / "alone", engine, config, Talk(config, 20))
    assert len(records(alone[1], "demonstrations")) == 3 * 19
    source = EngineSource(checkpoint, config=EngineConfig(max_running=8))
    with EngineWorkers(source, kind, WorkersConfig(count=2, cpus=1), 8) as workers:

        class Killing(Talk):
            def steps(self, item, work):
                yield from super().steps(item, work)
                if item.data in (6, 12):
                    worker = workers.workers._all[item.data // 6 - 1]
                    if kind == "ray":
                        worker._ray.kill(worker._actor)
                    else:
                        os.kill(*worker._pool._processes, 9)

        assert run(tmp_path / "killed", workers, config, Killing(config, 20)) == alone
        one = limits(concurrency=1)
        assert run(tmp_path / "one", workers, one, Talk(one, 20)) == alone
        with pytest.raises(OpenQwenError, match="limit of 40 requests"):
            run(tmp_path / "cut", workers, limits(requests=40), Talk(config, 20))
    assert run(tmp_path / "cut", engine, limits(concurrency=2), Talk(config, 20)) == alone


@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_the_flag_of_the_command_line(tmp_path, checkpoint, kind):
    if kind == "ray":
        pytest.importorskip("ray")
    tasks = [{"question": f"What is {n} times one?", "answer": "2"} for n in range(4)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    words = ["synthesize", "rejection", "--tasks", "tasks.jsonl", "--model", str(checkpoint)]
    words += ["--samples", "3", "--max-tokens", "8", "--seed", "3"]
    found = []
    for name, more in (("alone", []), (kind, ["--engine", kind, "--workers.count", "2"])):
        line = [sys.executable, "-m", "openqwen.cli", *words, "--output", name, *more]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr + done.stdout
        folder = tmp_path / name
        found.append({p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".jsonl"})
        config = json.loads((folder / "manifest.json").read_text())["config"]
        assert "engine" not in config
        assert "workers" not in config
    assert found[0] == found[1]
    assert found[0]["quarantine.jsonl"] or found[0]["demonstrations.jsonl"]


def test_workers_are_not_for_servers():
    endpoint = {"url": "http://127.0.0.1:1/v1", "name": "m"}
    config = SynthesisConfig(endpoint=endpoint, engine="processes")
    with pytest.raises(OpenQwenError, match="a model that they can load"):
        open_generators(config, {})
    made = open_generators(SynthesisConfig(model=Path(__file__).parent, engine="ray"), {})
    assert isinstance(made["model"][0], EngineWorkers)
    assert made["judge"] is made["model"]
