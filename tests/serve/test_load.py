"""The load client against a server, and against one that is killed under it."""

import importlib
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from openqwen.support.errors import OpenQwenError

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def load(server, tmp_path, seconds, connections=8):
    flags = {
        "--url": server.url,
        "--seconds": seconds,
        "--connections": connections,
        "--output": tmp_path / "load.json",
    }
    flags |= {"--prompts": 6, "--prompt-words": 40, "--tokens": 40}
    command = [sys.executable, SCRIPTS / "bench_serve.py"]
    command += [str(text) for pair in flags.items() for text in pair]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    return status, json.loads((tmp_path / "load.json").read_text())


def test_a_server_under_load(server, tmp_path):
    status, figures = load(server, tmp_path, 4)
    assert status == 0, figures
    assert figures["failed"] == figures["pages_held_at_end"] == 0
    assert all(
        figures[name] for name in ("completed", "cancelled", "malformed", "total_output_tokens")
    )
    assert figures["median_ttft_ms"] <= figures["p99_ttft_ms"]
    assert server.metric("process_resident_memory_bytes") > 0


def test_wrong_answers_are_noticed(server, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    serve = importlib.import_module("bench_serve")
    monkeypatch.setattr(serve._Answer, "differs", lambda self, other: True)
    with pytest.raises(OpenQwenError, match="failed under load"):
        serve.bench(server.url, seconds=2, connections=2, prompts=2, prompt_words=5, tokens=5)


def ask(server):
    """An answer to its end, asked for again where the server breaks off: (text, how often it was
    asked for).
    """
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 900,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    client, text, reason, times = server.client(), "", None, 0
    while reason is None:  # an answer that breaks off does not look like a whole one
        text, times = "", times + 1
        try:
            for chunk in client.completions.create(**body, stream=True):
                text, reason = text + chunk.choices[0].text, chunk.choices[0].finish_reason
        except (openai.APIConnectionError, httpx.TransportError):
            time.sleep(0.1)
    assert reason == "length"
    return text, times


def test_a_server_that_is_killed_and_comes_back(start, tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    server = start(tiny, "--port", port)
    took = time.monotonic() - begun
    right, _ = ask(server)
    again = []

    def strike():
        assert server.settles(
            "vllm:request_success_total", lambda seen: seen > 7
        )  # the load has begun
        clients = [threads.submit(ask, server) for _ in range(4)]
        assert server.settles("vllm:num_requests_running", lambda seen: seen > 4)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        again.append(start(tiny, "--port", port))
        return [client.result() for client in clients]

    with ThreadPoolExecutor() as threads:
        striking = threads.submit(strike)
        status, figures = load(server, tmp_path, 4 + 3 * took, connections=4)
        answers = striking.result()
    assert status == 0, figures
    assert figures["retried"] >= 4
    assert figures["completed"] > 0
    assert {text for text, _ in answers} == {right}
    assert all(times > 1 for _, times in answers)
    assert again[0].metric("vllm:generation_tokens_total") >= 4 * 900
