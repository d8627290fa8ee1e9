"""benchmarks/synthesis_throughput.py: what it asks, what it counts, and how it reports."""

import importlib
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from hostile import Hostile
from openqwen.engine import Endpoint, Sampling
from openqwen.support.errors import OpenQwenError

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("synthesis_throughput")


def test_the_prompts_are_those_of_rejection_sampling(script, tmp_path):
    lines = [json.dumps({"question": f"How many are {n}?", "answer": "2"}) for n in range(3)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    prompts = script.load_prompts(tmp_path / "tasks.jsonl", 2)
    assert "How many are 1?" in prompts[1][-1]["content"]
    with pytest.raises(OpenQwenError, match="There are 3 problems; 4 are needed"):
        script.load_prompts(tmp_path / "tasks.jsonl", 4)


def test_answers_tokens_and_requests_at_once_are_counted(script):
    server = Hostile()

    def respond(handler, body):
        assert body["max_tokens"] == 9
        assert body["temperature"] == 0
        content = [{"token": "a", "logprob": -1.0}] * 5
        choice = {"message": {"content": "aaaaa"}, "finish_reason": "length"}
        handler.say(200, {"choices": [choice | {"logprobs": {"content": content}}]})

    server.respond = respond
    prompts = [[{"role": "user", "content": str(n)}] for n in range(30)]
    endpoint = Endpoint(server.url, "model", concurrency=32)
    found = script.pace(endpoint, prompts, Sampling(max_tokens=9), 4)
    server.shutdown()
    server.server_close()
    assert (found.answers, found.tokens, found.cut) == (30, 150, 30)
    assert len(server.seen) == 30
    assert server.most_active <= 4
    assert found.per_minute == pytest.approx(60 * 30 / found.seconds)


def test_the_table_has_medians_and_the_ratio(script):
    ours = [script.Pace(10, 100, 1, seconds) for seconds in (10.0, 20.0, 60.0)]
    theirs = [script.Pace(10, 200, 0, seconds) for seconds in (40.0, 60.0, 5.0)]
    console = Console(record=True, width=120)
    console.print(script.table({"ours": ours, "theirs": theirs}))
    text = console.export_text()
    assert [word in text for word in ("30.0", "15.0", "2.00×", "10%")] == [True] * 4


def test_a_peer_that_does_not_start_is_named(script, tmp_path):
    with pytest.raises(OpenQwenError, match="The peer does not serve"), ExitStack() as stack:
        stack.enter_context(script.served(Path("/bin/false"), tmp_path / "model.gguf", 2, 1))
