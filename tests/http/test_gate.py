"""What a request must pass: host, key, size, time; and the headers of every response."""

import asyncio
import json

import pytest
from fastapi import FastAPI, Request

from openqwen.http import errors
from openqwen.http.gate import Gate, made_key


def gate(keys=(), hosts=("localhost",), limit=100, idle=1.0):
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request):
        return (await request.body()).decode()

    @app.get("/open")
    async def opened():
        return "open"

    errors.install(app)
    return Gate(app, keys, hosts, frozenset({"/open"}), limit, idle)


def code(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


def test_keys(ask):
    app = gate(["one", "two"])
    for headers in ({"authorization": "Bearer two"}, {"x-api-key": "one"}):
        assert ask(app, "POST", "/echo", content="x", headers=headers).json() == "x"
    for headers in ({}, {"authorization": "Basic one"}, {"authorization": "Bearer on"}):
        response = ask(app, "POST", "/echo", content="x", headers=headers)
        assert code(response, 401) == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert ask(app, "GET", "/open").json() == "open"


def test_hosts(ask):
    for host in ("localhost", "LOCALHOST:80"):
        assert ask(gate(), "GET", "/open", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "evil.example:80", ""):
        assert code(ask(gate(), "GET", "/open", headers={"host": host}), 403) == "host_not_allowed"
    assert ask(gate(hosts=()), "GET", "/open", headers={"host": "any"}).status_code == 200


def test_the_size_of_a_body_counts_with_and_without_its_length(ask):
    assert ask(gate(), "POST", "/echo", content=b"x" * 100).status_code == 200
    assert code(ask(gate(), "POST", "/echo", content=b"x" * 101), 413) == "body_too_large"

    async def parts():
        for _ in range(3):
            yield b"x" * 50

    assert code(ask(gate(), "POST", "/echo", content=parts()), 413) == "body_too_large"


def test_a_compressed_body_is_refused(ask):
    response = ask(gate(), "POST", "/echo", content=b"x", headers={"content-encoding": "gzip"})
    assert response.json()["error"]["param"] == "Content-Encoding"


def test_a_body_that_does_not_come_is_a_408():
    sent = []

    async def never():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/echo",
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(gate(idle=0.01)(scope, never, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["type"] == "timeout_error"


def test_a_client_that_leaves_reaches_nothing():
    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/echo",
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(gate()(scope, gone, send))


def test_headers_of_every_response(ask):
    for path in ("/open", "/nothing"):
        headers = ask(gate(), "GET", path, headers={"x-request-id": "mine"}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["x-request-id"] == "mine"
    assert ask(gate(), "HEAD", "/open").status_code == 200
    first, second = (ask(gate(), "GET", "/open").headers["x-request-id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_key_is_made_only_beyond_loopback_and_where_there_is_none(host):
    assert made_key(host, []) is None
    assert made_key("0.0.0.0", ["given"]) is None
    first, second = made_key("0.0.0.0", []), made_key("", [])
    assert len(first) > 40
    assert first != second
