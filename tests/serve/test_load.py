"""The load client against a server, and against one that is killed under it."""

import json
import signal
import socket
import threading
import time

import pytest

from openqwen.cli import main
from openqwen.support.errors import OpenQwenError


def load(server, tmp_path, seconds, connections=8):
    flags = {
        "--url": server.url,
        "--seconds": seconds,
        "--connections": connections,
        "--output": tmp_path / "load.json",
    }
    flags |= {"--prompts": 6, "--prompt-words": 40, "--tokens": 40}
    status = main(["bench", "serve", *(str(text) for pair in flags.items() for text in pair)])
    return status, json.loads((tmp_path / "load.json").read_text())


def test_a_server_under_load(server, tmp_path):
    status, figures = load(server, tmp_path, 6)
    assert status == 0, figures
    assert figures["failed"] == figures["pages_held_at_end"] == 0
    assert all(figures[name] for name in ("completed", "cancelled", "malformed", "total_output_tokens"))
    assert figures["median_ttft_ms"] <= figures["p99_ttft_ms"]
    assert server.metric("process_resident_memory_bytes") > 0


def test_wrong_answers_are_noticed(server, monkeypatch):
    from openqwen.recipe.bench import serve

    monkeypatch.setattr(serve._Answer, "differs", lambda self, other: True)
    with pytest.raises(OpenQwenError, match="did not stand"):
        serve.bench(server.url, seconds=2, connections=2, prompts=2, prompt_words=5, tokens=5)


def test_a_server_that_is_killed_and_comes_back(start, tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(tiny, "--port", port)
    again = []

    def strike():
        time.sleep(4)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        again.append(start(tiny, "--port", port))

    striking = threading.Thread(target=strike)
    striking.start()
    status, figures = load(server, tmp_path, 25)
    striking.join()
    assert status == 0, figures
    assert figures["retried"] >= 8
    assert figures["completed"] > 0
    assert again[0].metric("vllm:generation_tokens_total") > 0
