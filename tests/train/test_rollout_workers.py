"""Rollouts by engines in worker processes: GRPO learns what it learns from one engine."""

import json

import pytest
from test_grpo import run, settings, start  # noqa: F401

from openqwen.engine.workers import EngineWorkers
from openqwen.model import load_model
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import load_tokenizer
from openqwen.train import rollouts
from openqwen.train.rollouts import SamplerConfig, policy_generator


def test_workers_sample_what_one_engine_samples(start, tmp_path, kind, monkeypatch):  # noqa: F811
    closed = []
    close = EngineWorkers.close
    monkeypatch.setattr(EngineWorkers, "close", lambda self: closed.append(close(self)))
    monkeypatch.chdir(__file__.rpartition("/")[0])  # where toy_rewards.py is
    fields = {"episodes": 2, "order": "variance", "beta": 0.1}
    alone = run(start, tmp_path / "alone", settings(**fields))
    sampler = {"engine": kind, "workers": {"count": 2, "cpus": 1}}
    config = settings(sampler=sampler, **fields)
    assert config.model_dump(mode="json") == settings(**fields).model_dump(mode="json")
    shared = run(start, tmp_path / kind, config)
    timed = ("seconds", "tokens_per_second", "peak_memory")
    for one, other in zip(alone[1], shared[1], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(timed):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    samples = [
        (tmp_path / name / "out" / "samples.jsonl").read_text().splitlines()
        for name in ("alone", kind)
    ]
    assert samples[0] == samples[1]
    for sample in map(json.loads, samples[1]):
        assert set(sample["versions"]) <= {sample["step"]}
    folder = tmp_path / kind / "scratch" / "weights"
    assert [path.name for path in folder.iterdir()] == ["1"]  # the older one is removed
    assert len(closed) == 1


def test_weights_are_saved_once_a_step_and_older_ones_removed(start, tmp_path, monkeypatch):  # noqa: F811
    saved = []
    save = rollouts.save_weights
    monkeypatch.setattr(rollouts, "save_weights", lambda *a: saved.append(a[-1]) or save(*a))
    model = load_model(start[0] / "model")
    tokenizer = load_tokenizer(start[0] / "model")
    config = SamplerConfig(engine="processes", quantize="int8")
    workers, refresh = policy_generator(model, tokenizer, config, tmp_path)
    assert isinstance(workers, EngineWorkers)
    for step in (0, 0, 3, 3):
        refresh(step)
        assert (workers.source.path, workers.source.version) == (
            tmp_path / "weights" / str(step),
            step,
        )
        assert (workers.source.path / "config.json").is_file()
    assert saved == [0, 3]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["3"]
    assert workers.source.quantize == "int8"
    own = SamplerConfig(engine="ray", weights=tmp_path / "shared")
    assert policy_generator(model, tokenizer, own, tmp_path)[0].source.path.parent == own.weights


def test_workers_or_a_server(start, tmp_path):  # noqa: F811
    config = SamplerConfig(engine="ray", url="http://127.0.0.1:1/v1")
    tokenizer = load_tokenizer(start[0] / "model")
    with pytest.raises(OpenQwenError, match="Either workers sample, or a server"):
        policy_generator(load_model(start[0] / "model"), tokenizer, config, tmp_path)
