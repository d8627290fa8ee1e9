"""What stands around a request: bodies that are no JSON, types, compression, names of hosts, ids,
HEAD.
"""

import gzip
import json

import pytest
from test_errors import USER, told

CHAT = {"messages": USER, "max_tokens": 1}
ENDLESS = b'{"messages": %s}'
BAD = {
    "digits": ENDLESS % (b"1" * 5000),
    "brackets": ENDLESS % (b"[" * 5000 + b"]" * 5000),
    "deep": ENDLESS % (b"[" * 150 + b"]" * 150),
    "cut": b'{"messages": [',
    "empty": b"",
    "bytes": b"\xff\xfe{}",
    "infinite": b'{"messages": [], "temperature": Infinity}',
}
PATHS = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/score",
    "/v1/batches",
)


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_a_400_that_says_why(server, name):
    for path in PATHS:
        answer = server.http.post(
            path, content=BAD[name], headers={"content-type": "application/json"}
        )
        message = told(answer, 400)["message"]
        assert message.startswith("The body ")
        assert "codec" not in message


@pytest.mark.parametrize(
    "arguments", ["1" * 5000, "[" * 5000, "[" * 400 + "]" * 400, '{"a": ' * 300 + "1" + "}" * 300]
)
def test_arguments_of_calls_in_a_conversation_give_no_5xx(server, arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    answer = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert answer.status_code in (200, 400)


def test_halves_of_surrogate_pairs_and_large_integers_come_back(server):
    half = b'{"messages": [{"role": "user", "content": "a\\ud83d \\\\ud83d \\ud83d\\ude00"}]}'
    answer = server.http.post(
        "/apply-template", content=half, headers={"content-type": "application/json"}
    )
    assert "a\ufffd \\ud83d \U0001f600" in answer.json()["prompt"]
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "maximum": 10**30}}
    answer = server.http.post(
        "/v1/responses", json={"input": "x", "max_output_tokens": 1, "tools": [tool]}
    )
    assert answer.json()["tools"][0]["parameters"]["maximum"] == 10**30


def test_types_of_content(server):
    body, path = json.dumps(CHAT), "/v1/chat/completions"
    assert server.http.post(path, content=body).status_code == 200
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        assert (
            server.http.post(path, content=body, headers={"content-type": kind}).status_code == 200
        )
    error = told(server.http.post(path, content=body, headers={"content-type": "text/plain"}), 400)
    assert "text/plain" in error["message"]
    assert "application/json" in error["message"]
    # A page of another origin can send a body without a type unasked.
    assert (
        "missing"
        in told(server.http.post(path, content=body, headers={"origin": "http://evil"}), 400)[
            "message"
        ]
    )
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    error = told(server.http.post(path, content=gzip.compress(body.encode()), headers=packed), 400)
    assert "compressed (gzip)" in error["message"]
    plain = {"content-type": "application/json", "content-encoding": "identity"}
    assert server.http.post(path, content=body, headers=plain).status_code == 200


def test_head_answers_as_get_without_a_body(server):
    for path in (
        "/health",
        "/v1/models",
        "/v1/models/tiny",
        "/v1/files",
        "/metrics",
        "/tokenizer_info",
        "/",
    ):
        head, get = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert server.http.head("/v1/models/other").status_code == 404
    assert server.http.head("/v1/chat/completions").status_code == 405
    assert "HEAD" in server.http.post("/health").headers["allow"]


def test_hosts_in_any_case(server):
    for host in ("LOCALHOST", "LocalHost:8000", "[::1]:80"):
        assert server.http.get("/health", headers={"host": host}).status_code == 200
    told(server.http.get("/health", headers={"host": "EVIL.example"}), 403, "permission_error")


def test_request_ids(server, client):
    given = {"x-request-id": "mine-1"}
    assert server.http.get("/health", headers=given).headers["x-request-id"] == "mine-1"
    assert server.http.get("/nowhere", headers=given).headers["x-request-id"] == "mine-1"
    refused = server.http.get("/health", headers=given | {"host": "evil"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (403, "mine-1")
    made = [client.chat.completions.create(model="tiny", **CHAT)._request_id for _ in range(2)]
    assert made[0]
    assert made[0] != made[1]


def test_too_long_is_said_in_openais_words(server):
    long = "word " * 2000
    for path, body, field in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/responses", {"input": long}, "messages"),
        ("/v1/embeddings", {"input": long}, "input"),
    ):
        error = told(server.http.post(path, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        begun = (
            f"This model's maximum context length is 1024 tokens. However, your {field} resulted "
            "in "
        )
        assert error["message"].startswith(begun)
        assert error["code"] in error["message"]  # for clients that read the text alone


def test_tokenizer_info(server, tiny):
    info = server.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert info["tokenizer_class"] == "Qwen2Tokenizer"
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny)
    assert info["chat_template"] == theirs.chat_template
    assert info["eos_token"] == theirs.eos_token


def test_names_of_files_and_forms_within_forms(server, client):
    assert client.files.create(file=("é日.jsonl", b"{}"), purpose="batch").filename == "é日.jsonl"
    inner = b"--y\r\n\r\nx\r\n--y--\r\n"
    parts = [
        (
            b'--x\r\nContent-Disposition: form-data; name="%s"\r\nContent-Type: multipart/mixed; '
            b"boundary=y\r\n\r\n"
        )
        % n
        + inner
        for n in (b"file", b"purpose")
    ]
    headers = {"content-type": "multipart/form-data; boundary=x"}
    told(
        server.http.post(
            "/v1/files", content=b"\r\n".join([*parts, b"--x--\r\n"]), headers=headers
        ),
        400,
    )
    assert server.http.get("/v1/files").status_code == 200
