"""The engine on the real checkpoint: drafts, pages and other requests change no bit."""

import json
import os
from pathlib import Path

import pytest

from openqwen.engine import Engine, EngineConfig, Sampling, Structure
from openqwen.model import load_model
from openqwen.model.quantize import quantize
from openqwen.tokenizer import load_tokenizer

PATH = Path(
    os.environ.get(
        "OPENQWEN_REAL_CHECKPOINT",
        Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PATH.is_file(), reason=f"the real checkpoint is not here: {PATH}"),
]
CODE = "def area(width, height):\n    total = width * height\n    return total\n"
CHATS = [
    [{"role": "user", "content": f"Repeat this code exactly, twice, nothing else:\n{CODE}"}],
    [{"role": "user", "content": "What is the capital of France? One word."}],
    [{"role": "user", "content": "Write a Python function that reverses a list."}],
]


@pytest.fixture(scope="module")
def real():
    return quantize(load_model(PATH), "int8"), load_tokenizer(PATH)


def test_answers_are_the_same_bits_alone_together_guessed_and_warm(real):
    for sampling in (
        Sampling(max_tokens=60),
        Sampling(max_tokens=60, temperature=0.7, top_p=0.8, top_k=20),
    ):
        # By default a prompt's seed depends on its place in the call.
        seeds = [7, 8, 9]
        alone = [
            Engine(*real).generate([chat], sampling, seeds=[seed])[0]
            for chat, seed in zip(CHATS, seeds)
        ]
        engine = Engine(*real, EngineConfig(speculate=8, token_budget=40))
        for _ in ("cold", "warm"):
            together = engine.generate(CHATS, sampling, seeds=seeds)
            assert [(o.text, o.logprobs) for o in together] == [(o.text, o.logprobs) for o in alone]
        assert engine.stats().accepted > 0
        assert engine.stats().cache_hits > 0
    assert "Paris" in Engine(*real).generate(CHATS[1:2], Sampling(max_tokens=8))[0].text


def test_json_is_sensible_and_compact(real):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    sampling = Sampling(max_tokens=40, structure=Structure("json_schema", json.dumps(schema)))
    (output,) = Engine(*real).generate(
        [[{"role": "user", "content": "Alice is 31. Give name and age as JSON."}]], sampling
    )
    assert output.text == '{"name":"Alice","age":31}'
    assert output.finish_reason == "stop"
