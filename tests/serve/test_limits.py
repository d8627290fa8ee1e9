"""Keys, limits, clients that leave, and the end: what a server is for when things go wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from test_errors import USER, told

LONG = {"messages": USER, "max_tokens": 900, "ignore_eos": True}


def test_keys(start, tiny):
    server = start(tiny, "--api-key", "secret", OPENQWEN_API_KEY="other,third")
    body = {"messages": USER, "max_tokens": 1}
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"X-Api-Key": "secre"},
    ):
        for path in ("/v1/chat/completions", "/pause", "/update_weights"):
            told(server.http.post(path, json=body, headers=header), 401, "authentication_error")
        told(server.http.get("/metrics", headers=header), 401, "authentication_error")
    for header in (
        {"Authorization": "Bearer secret"},
        {"Authorization": "bearer third"},
        {"X-Api-Key": "other"},
    ):
        assert (
            server.http.post("/v1/chat/completions", json=body, headers=header).status_code == 200
        )
    assert server.http.get("/health").status_code == 200
    assert server.client("secret").models.list().data
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()


def test_beyond_loopback_a_key_is_made(start, tiny):
    server = start(tiny, "--host", "0.0.0.0")
    key = server.log.split("A new one was made: ")[1].split()[0]
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert (
        httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    )


def test_other_origins_and_hosts_are_shut_out(server, start, tiny):
    for host in ("evil.example", "evil.example:80", "localhost.evil.example"):
        told(server.http.get("/v1/models", headers={"Host": host}), 403, "permission_error")
    assert server.http.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=asked).headers
    assert server.http.options("/v1/models", headers=asked).status_code == 405
    opened = start(tiny, "--origin", "https://page.example")
    answer = opened.http.options("/v1/chat/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"


def test_large_and_slow_bodies(start, tiny):
    server = start(tiny, "--max-body", 10_000, "--idle", 1)
    told(server.http.post("/tokenize", json={"prompt": "x" * 20_000}), 413)
    told(server.http.post("/tokenize", content=(b"x" * 1000 for _ in range(20))), 413)
    host, port = server.url.removeprefix("http://").split(":")
    begun = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nContent-Type: "
        b"application/json\r\n"
    )
    for sent, answer in ((b"", b""), (begun, b""), (begun + b"\r\n{", b"HTTP/1.1 408")):
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(sent)
            assert slow.recv(12) == answer
    assert server.http.get("/health").status_code == 200


def test_a_full_queue_says_when_to_come_back(start, tiny):
    server = start(tiny, "--queue", 2)
    server.http.post("/pause")
    short = LONG | {"max_tokens": 2}
    waiting = [
        threading.Thread(target=lambda: server.http.post("/v1/chat/completions", json=short))
        for _ in range(2)
    ]
    for thread in waiting:
        thread.start()
    assert server.settles("vllm:num_requests_waiting", 2)
    answer = server.http.post("/v1/chat/completions", json=LONG)
    assert told(answer, 429, "rate_limit_error")["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1
    never = server.http.post("/v1/completions", json={"prompt": "x", "n": 3})
    assert told(never, 400, "invalid_request_error")["code"] == "too_many_answers"
    server.http.post("/resume")
    for thread in waiting:
        thread.join()
    assert server.http.post("/v1/chat/completions", json=short).status_code == 200


def test_an_answer_that_takes_too_long(start, tiny):
    server = start(tiny, "--timeout", 0.5)
    server.http.post("/pause")
    late = server.http.post("/v1/chat/completions", json=LONG)
    told(late, 408, "timeout_error")
    assert late.headers["x-should-retry"] == "false"
    asked = server.metric("vllm:request_success_total")
    with pytest.raises(openai.APIStatusError) as caught:  # a client that would try again twice
        server.client().with_options(max_retries=2).chat.completions.create(
            model="tiny", messages=USER
        )
    assert caught.value.status_code == 408
    assert server.settles("vllm:request_success_total", asked + 1)
    streamed = server.http.post("/v1/chat/completions", json=LONG | {"stream": True}).text
    assert '"code":"timeout"' in streamed
    server.http.post("/resume")
    assert server.settles("vllm:num_requests_waiting", 0)
    assert server.metric("openqwen:pages_held") == 0


def leave(server, path, body, there):
    """Send a request, wait until `there` says that it is where it should be, and hang up."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        assert there()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["waiting", "running"])
def test_who_leaves_is_not_worked_for(server, where, stream):
    ended = server.metric("vllm:request_success_total")
    made = server.metric("vllm:generation_tokens_total")
    if where == "waiting":
        server.http.post("/pause")
    body = LONG | {"n": 8, "stream": stream}
    gauge = f"vllm:num_requests_{where}"
    leave(server, "/v1/chat/completions", body, lambda: server.settles(gauge, 8))
    assert server.settles(gauge, 0)
    if where == "waiting":
        server.http.post("/resume")
    assert server.settles("openqwen:pages_held", 0)
    assert server.metric("vllm:request_success_total") == ended + 8
    assert server.metric("vllm:generation_tokens_total") < made + 8 * 900


def test_who_leaves_during_prefill_is_not_worked_for(server):
    prompts = [[1 + (7 * i + k) % 500 for k in range(1000)] for i in range(24)]
    made = server.metric("vllm:generation_tokens_total")
    body = {"prompt": prompts, "max_tokens": 900, "ignore_eos": True}
    leave(server, "/v1/completions", body, lambda: server.settles("openqwen:pages_held", bool))
    assert server.metric("vllm:generation_tokens_total") < made + 24 * 900
    assert server.settles("vllm:num_requests_running", 0)
    assert server.settles("vllm:num_requests_waiting", 0)
    assert server.metric("openqwen:pages_held") == 0


def test_sigterm_lets_answers_end_and_takes_no_more(start, tiny):
    server = start(tiny, "--drain", 60, forked=False)
    got = []
    body = {
        "prompt": "x",
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }

    def read():
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=60
        ) as response:
            got.extend(response.iter_lines())

    reading = threading.Thread(target=read)
    reading.start()
    while len(got) < 5:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    reading.join()
    assert got[-2] == "data: [DONE]"
    assert sum(line.count('"finish_reason":"length"') for line in got) == 1
    assert server.process.wait(60) == 0


def test_after_the_time_to_drain_the_rest_is_dropped(start, tiny):
    server = start(tiny, "--drain", 1)
    server.http.post("/pause")
    reading = threading.Thread(
        target=lambda: httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=60)
    )
    reading.start()
    assert server.settles("vllm:num_requests_waiting", 1)
    assert server.stop() == 0
    reading.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_can_step_down(start, tiny):
    try:
        subprocess.run([sys.executable, "-c", ""], user="nobody", check=True)
    except PermissionError:
        pytest.skip("this Python lies where nobody else may read it")
    server = start(tiny, "--user", "nobody")
    with open(f"/proc/{server.process.pid}/status", encoding="utf-8") as file:
        ids = dict(line.split(":", 1) for line in file if line.startswith(("Uid", "Gid")))
    assert "0" not in ids["Uid"].split() + ids["Gid"].split()
    assert server.client().files.create(file=b"{}\n", purpose="batch").bytes == 3


def test_a_port_that_is_taken(start, tiny, server, capsys):
    from openqwen.cli import main

    assert main(["serve", str(tiny), "--port", server.url.rpartition(":")[2]]) == 1
    assert "Cannot listen here" in capsys.readouterr().err


def test_nothing_is_read_from_the_disk(server):
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page/index.html",
        "/page/../x",
    ):
        assert server.http.get(path).status_code == 404
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "file-..", "x" * 500):
        assert server.http.get(f"/v1/files/{name}/content").status_code == 404
        assert server.http.get(f"/v1/batches/{name}").status_code == 404
