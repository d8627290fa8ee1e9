"""The recipe itself: what stands beside what, and what its stages read."""

import random

import pytest

from openqwen.corpus.documents import write_documents
from openqwen.corpus.vocabulary import run_tokenizer
from openqwen.engine import Output
from openqwen.evaluate import EvaluateConfig
from openqwen.evaluate import model as evaluation
from openqwen.recipe.graph import nodes_of, recipe_class
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_json
from openqwen.support.generators import Generators
from openqwen.support.stage import StageRun
from openqwen.tasks.checkable import generate_tasks
from openqwen.tokenizer import TokenizerConfig, load_tokenizer


def test_every_aligned_model_stands_beside_the_model_that_it_was_trained_from():
    inputs = {node.name: node.inputs for node in nodes_of(recipe_class()())}
    aligned = {name: roles for name, roles in inputs.items() if "start" in roles}
    assert set(aligned) == {"evaluate-dpo", "evaluate-online-dpo", "evaluate-grpo"}
    for roles in aligned.values():
        assert roles["start"] == f"evaluate-{inputs[roles['model']]['model']}"
    assert inputs["online-dpo"]["model"] == inputs["grpo"]["model"] == "sft"


class Scripted:
    """Right on the first so many of the test's tasks, by temperature."""

    def __init__(self, right: dict[float, int]):
        tasks = generate_tasks(Generators(0)["test"], 40, split="test")
        self.right, self.answers = right, [task.reference["answer"] for task in tasks]

    def generate(self, prompts, sampling, seeds=None, progress=None):
        assert seeds is None or list(seeds) == list(range(40))  # the same draws for every model
        count = self.right[sampling.temperature]
        texts = [answer if n < count else "?" for n, answer in enumerate(self.answers)]
        return [Output(text, [1], [0.0], "stop", [1]) for text in texts]


def test_gains_are_on_the_own_start_at_equal_temperature(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_win_rates", lambda *_: {})
    config = EvaluateConfig(test=40)
    models = {
        "evaluate-sft": {0.0: 20, 0.7: 16, 0.9: 13, 1.0: 10},
        "evaluate-dpo": {0.0: 18, 0.7: 16, 1.0: 14},
    }
    found = {}
    for name, right in models.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "scores.json", {"stage": name})
        start = (
            {}
            if name == "evaluate-sft"
            else {"start": tmp_path / "evaluate-sft", "reward": tmp_path}
        )
        work = StageRun(config, start, tmp_path / name, tmp_path, 1, name)
        found[name] = evaluation._test_scores(Scripted(right), config, work)
    sft, dpo = found.values()
    assert sft["test_cooler_gain"] == pytest.approx(3 / 40)  # at 0.9 on itself at 1.0
    assert "test_cooler_gain" not in dpo
    assert dpo["start"] == "sft"
    assert dpo["test_gain"] == pytest.approx(-2 / 40)
    assert dpo["test_at_0.7_gain"] == 0
    assert dpo["test_sampled_gain"] == pytest.approx(4 / 40)
    for name in ("test", "test_at_0.7", "test_sampled"):
        assert dpo[f"{name}_gain_low"] <= dpo[f"{name}_gain"] <= dpo[f"{name}_gain_high"]
        assert sft[f"{name}_accuracy_low"] < sft[f"{name}_accuracy"] < sft[f"{name}_accuracy_high"]


def test_the_vocabulary_sees_every_source_of_the_mixture(tmp_path):
    """In the order of paths the first bytes were all code: no task was seen."""
    draw = random.Random(0)
    words = [f"word{''.join(draw.choices('abcdefghij', k=6))}" for _ in range(2000)]
    documents = [
        {"id": f"code/{i:05}", "text": " ".join(draw.choices(words, k=40)), "source": "code"}
        for i in range(1000)
    ] + [
        {
            "id": f"tasks/{i:05}",
            "text": "Question: lighthouse? Answer: lighthouse",
            "source": "tasks",
        }
        for i in range(200)
    ]
    documents = [{**document, "language": "en", "meta": {}} for document in documents]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_documents(corpus / "train.parquet", documents)
    write_documents(corpus / "heldout.parquet", documents[:1])
    sizes = {
        "code": sum(len(d["text"]) for d in documents[:1000]),
        "tasks": sum(len(d["text"]) for d in documents[1000:]),
    }
    sources = {name: {"bytes": size, "weight": 0.5} for name, size in sizes.items()}
    write_json(corpus / "corpus.json", {"sources": sources})

    def train(name, **settings):
        (tmp_path / name).mkdir()
        config = TokenizerConfig(vocabulary=500, max_bytes=10_000, **settings)
        run_tokenizer(
            StageRun(config, {"corpus": corpus}, tmp_path / name, tmp_path, 1, "tokenizer")
        )
        return load_tokenizer(tmp_path / name)

    assert len(train("a").encode(" lighthouse")) == len(train("b").encode(" lighthouse")) == 1
    texts = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]
    assert len(train("without", weights={"tasks": 0}).encode(" lighthouse")) > 1
    with pytest.raises(OpenQwenError, match="no source 'taks'"):
        train("wrong", weights={"taks": 0})
