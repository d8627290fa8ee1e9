"""Synthesis by real generators: our engine, and servers that misbehave."""

import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from scripted import Guess, records, run, said

from hostile import Hostile, drop, endless, raw, status
from openqwen.engine import Endpoint, Engine, EngineConfig, Sampling, endpoint
from openqwen.engine.lanes import open_lane
from openqwen.instruct.synthesize.config import SynthesisConfig, open_generators
from openqwen.instruct.synthesize.method import assistant
from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support import retry
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

TESTS = Path(__file__).parent


def speak(handler, body):
    """Answer as `said` does, after a moment that differs from request to request."""
    text = "\n".join(m["content"] for m in body["messages"])
    time.sleep(random.random() * 0.02)
    message = {"role": "assistant", "content": said(text, body.get("seed", 0))}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    handler.say(200, {"choices": [choice]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Hostile()
    server.respond = speak
    yield server
    server.shutdown()
    server.server_close()


def limits(**values):
    return SynthesisConfig(limits=values)


def test_a_server_gives_the_same_bytes_at_any_concurrency(tmp_path, server):
    one = run(tmp_path / "1", Endpoint(server.url, "m"), limits(concurrency=1))
    assert server.most_active == 1
    asked = len(server.seen)
    many = run(tmp_path / "8", Endpoint(server.url, "m"), limits(concurrency=8))
    assert one == many
    assert 1 < server.most_active <= 8
    assert len(server.seen) == 2 * asked == 2 * one[0]["requests"]


def test_a_server_that_fails_half_the_time(tmp_path, server):
    expected = run(tmp_path / "good", Endpoint(server.url, "m"))
    faults = [status(500), status(429), drop, raw(b"{"), raw(b'{"choices": []}'), status(503)]
    draw = random.Random(1)

    def half(handler, body):
        with server.lock:
            fault = draw.choice(faults) if draw.random() < 0.5 else speak
        fault(handler, body)

    server.respond = half
    assert run(tmp_path / "half", Endpoint(server.url, "m", retries=30)) == expected


@pytest.mark.parametrize("fault", [status(400), status(401), raw(b"null"), endless])
def test_a_server_that_always_fails_ends_the_run_soon(tmp_path, server, fault, monkeypatch):
    monkeypatch.setattr(endpoint, "_LARGEST", 10_000)
    server.respond = fault
    with pytest.raises(OpenQwenError, match="4 errors"):
        run(tmp_path, Endpoint(server.url, "m", retries=1), limits(errors=3, concurrency=2))
    assert len(server.seen) < 20
    server.respond = speak
    assert run(tmp_path, Endpoint(server.url, "m")) == run(
        tmp_path / "good", Endpoint(server.url, "m")
    )


def test_answers_without_text_are_no_error(tmp_path, server):
    server.respond = lambda handler, _: handler.say(
        200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    )
    counts, _ = run(tmp_path, Endpoint(server.url, "m"))
    assert (counts["failures"], counts["items"]) == (0, 40)


def test_ctrl_c_while_a_server_is_asked(tmp_path, server):
    """The program ends at once, though the server never answers, and what came is kept."""

    def stuck(handler, body):
        if len(server.seen) > 30:
            time.sleep(30)
        speak(handler, body)

    server.respond = stuck
    # A suite that a shell runs in the background inherits SIGINT as ignored.
    code = f"""
        import signal
        import sys
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(TESTS)!r})
        from scripted import run
        from openqwen.engine import Endpoint
        run(Path({str(tmp_path)!r}), Endpoint({server.url!r}, "m"))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=-1, text=True)
    calls = tmp_path / "scratch" / "calls.jsonl"
    while not calls.exists() or calls.read_bytes().count(b"\n") < 20:
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    server.respond = speak
    assert run(tmp_path, Endpoint(server.url, "m")) == run(
        tmp_path / "good", Endpoint(server.url, "m")
    )


@pytest.fixture(scope="module")
def tiny():
    tokenizer = train_tokenizer(["number 1 2 3 step by step"] * 9, TokenizerConfig(vocabulary=300))
    config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, max_position_embeddings=512)
    network = Qwen2(config)
    initialize(network, torch.Generator().manual_seed(0))
    return network.eval(), tokenizer


class Speak(Guess):
    """Takes whatever the model says."""

    def steps(self, item, work):
        asked = work.messages("solve", question=f"number {item.data}")
        outputs = yield from work.ask([asked] * 3, Sampling(max_tokens=12, temperature=1.0))
        for output in outputs:
            work.demonstration([*asked, assistant(output.text)], ids=output.token_ids)


def test_our_engine_gives_the_same_bytes_at_any_concurrency_and_after_a_stop(tmp_path, tiny):
    def speak(place, **values):
        config = limits(**values)
        engine = Engine(*tiny, EngineConfig(max_running=values.get("concurrency", 16)))
        result = run(tmp_path / place, engine, config, Speak(config, 12))
        assert not engine.busy
        return result

    one = speak("1", concurrency=1)
    assert len(records(one[1], "demonstrations")) == 3 * 11
    assert speak("8", concurrency=8) == one
    with pytest.raises(OpenQwenError, match="limit of 17 requests"):
        speak("cut", requests=17)
    assert speak("cut") == one


def test_a_prompt_that_the_engine_refuses_ends_its_item_alone(tmp_path, tiny):
    class Long(Speak):
        def steps(self, item, work):
            asked = work.messages("solve", question="9 " * (2000 if item.data == 2 else 1))
            yield from work.ask([asked], Sampling(max_tokens=2))

    counts, found = run(tmp_path, Engine(*tiny), method=Long(SynthesisConfig(), 4))
    assert (counts["items"], counts["failures"]) == (4, 1)
    (entry,) = records(found, "quarantine")
    assert entry["item"] == "n/2"


def test_a_lane_that_is_closed_leaves_the_engine_idle(tiny):
    engine = Engine(*tiny)
    with open_lane(engine) as lane:
        for n in range(4):
            lane.submit(n, [1, 2, 3], Sampling(max_tokens=100), n)
        lane.wait()
        assert engine.busy
    assert not engine.busy
    engine.check_integrity()
    assert engine.generate([[1, 2]], Sampling(max_tokens=2))[0].finish_reason


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "Name a model or a server"),
        ({"model": "a", "endpoint": {"url": "http://127.0.0.1:1/v1", "name": "m"}}, "A model and"),
        ({"endpoint": {"url": "http://127.0.0.1:1/v1"}}, "model cannot be ''"),
        ({"endpoint": {"url": "nonsense", "name": "m"}}, "not the base URL"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_generators_that_cannot_be_opened(settings, what):
    with pytest.raises(OpenQwenError, match=what):
        open_generators(SynthesisConfig(**settings), {})
