"""Light clients of benchmarks/clients, with a tiny model; the heavier are run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parents[2] / "benchmarks" / "clients"
# What does not rest on a model that can speak.
CHECKS = ["chat", "stream", "tool required", "structured", "embeddings", "responses"]
CHECKS += ["too long", "busy (429)", "late (408)"]
MODULES = {"openai_python": "openai", "langchain": "langchain_openai", "pydantic_ai": "pydantic_ai"}


@pytest.fixture(scope="module")
def addresses(tiny):
    from serving import Server

    flags = ("--name", "local")
    running = [Server(tiny, *flags), Server(tiny, *flags, "--queue", "1", "--timeout", "1")]
    yield [server.url for server in running]
    for server in running:
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log, server.log


@pytest.mark.parametrize("client", MODULES)
def test_a_light_client(addresses, client):
    pytest.importorskip(MODULES[client])
    command = [sys.executable, CLIENTS / f"try_{client}.py", *addresses, *CHECKS]
    variables = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=200)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["what"] for row in rows] == CHECKS, done.stderr
    assert all(row["outcome"] == "passed" for row in rows), done.stdout + done.stderr
