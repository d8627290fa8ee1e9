"""Whatever is wrong with a request is told in OpenAI's shape, with the right status, and never with
a 5xx.
"""

import json

import openai
import pytest

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def told(response, status, kind="invalid_request_error"):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert error["message"]
    return error


CHAT = [
    {},
    {"messages": None},
    {"messages": "string"},
    {"messages": []},
    {"messages": [123]},
    {"messages": [{}]},
    {"messages": [{"role": 123}]},
    {"messages": [{"role": "system", "content": 123}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user", "content": None}]},
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
            }
        ]
    },
    {"messages": USER, "max_tokens": 0},
    {"messages": USER, "max_tokens": "8"},
    {"messages": USER, "max_tokens": 1.5},
    {"messages": USER, "temperature": -1},
    {"messages": USER, "temperature": 2.1},
    {"messages": USER, "repetition_penalty": 5e-324},
    {"messages": USER, "top_p": 0},
    {"messages": USER, "top_p": True},
    {"messages": USER, "n": 0},
    {"messages": USER, "n": 129},
    {"messages": USER, "seed": 1 << 63},
    {"messages": USER, "stop": ""},
    {"messages": USER, "stop": ["x"] * 17},
    {"messages": USER, "logprobs": True, "top_logprobs": 21},
    {"messages": USER, "top_logprobs": 2},
    {"messages": USER, "logit_bias": {"x": 1}},
    {"messages": USER, "logit_bias": {"1": 101}},
    {"messages": USER, "logit_bias": {"999999": 1}},
    {"messages": USER, "stream_options": {"include_usage": True}},
    {"messages": USER, "response_format": {"type": "sound"}},
    {"messages": USER, "response_format": {"type": "json_schema"}},
    {"messages": USER, "response_format": {"type": "json_object", "schema": 123}},
    {"messages": USER, "response_format": {"type": "json_object", "schema": {"type": 123}}},
    {"messages": USER, "response_format": {"type": "json_object", "schema": {"type": "hiccup"}}},
    {"messages": USER, "structured_outputs": {"regex": "("}},
    {"messages": USER, "structured_outputs": {"grammar": "start: nothing"}},
    {"messages": USER, "tool_choice": "required"},
    {"messages": USER, "tools": [TOOL], "tool_choice": "sometimes"},
    {
        "messages": USER,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "g"}},
    },
    {"messages": USER, "tools": [{"type": "function", "function": {"name": "white space"}}]},
    {"messages": USER, "tools": [{"type": "function"}]},
]


@pytest.mark.parametrize("body", CHAT, ids=json.dumps)
def test_malformed_chats(server, body):
    told(server.http.post("/v1/chat/completions", json=body), 400)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": None},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [""]},
        {"prompt": [[]]},
        {"prompt": ["a", 1]},
        {"prompt": [-1]},
        {"prompt": [999_999]},
        {"prompt": {"a": 1}},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "logprobs": True},
        {"prompt": ["a"] * 300},
        {"prompt": "a", "stream": "yes"},
    ],
    ids=json.dumps,
)
def test_malformed_completions(server, body):
    told(server.http.post("/v1/completions", json=body), 400)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'"text"', b"[1]", b"42", b"null", b"\xff\xfe", b'{"messages": [' * 500]
)
def test_bodies_that_are_no_object(server, content):
    headers = {"content-type": "application/json"}
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/tokenize",
        "/score",
    ):
        told(server.http.post(path, content=content, headers=headers), 400)


def test_a_body_that_is_not_called_json_is_not_read(server):
    body = json.dumps({"messages": USER, "max_tokens": 1})
    told(
        server.http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "text/plain"}
        ),
        400,
    )


def test_other_faults(server, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "word " * 2000}]
        )
    assert caught.value.code == "context_length_exceeded"
    told(server.http.get("/v1/nothing"), 404, "not_found_error")
    told(server.http.get("/v1/models/nothing"), 404, "not_found_error")
    told(server.http.get("/v1/chat/completions"), 405)
    told(server.http.post("/v1/embeddings", json={"input": "x", "dimensions": 4096}), 400)
    told(server.http.post("/v1/embeddings", json={"input": "x", "encoding_format": "text"}), 400)
    told(server.http.post("/tokenize", json={}), 400)
    told(server.http.post("/score", json={"conversations": [[*USER, *USER]]}), 400)
    told(server.http.post("/update_weights", json={"version": 1}), 404, "not_found_error")
    told(server.http.post("/update_weights", json={"version": "../../etc"}), 400)
    error = told(
        server.http.post("/v1/chat/completions", json={"messages": USER, "temperature": 9}), 400
    )
    assert error["param"] == "temperature"


def test_unknown_fields_are_ignored_and_the_server_still_works(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=2,
        extra_body={"frobnicate": 1, "store": False, "metadata": {"a": "b"}},
    )
    assert answer.choices[0].message.content is not None


def test_next_to_nothing_is_no_fault(server):
    body = {"messages": USER, "max_tokens": 4}
    expected = server.http.post("/v1/chat/completions", json=body | {"temperature": 0}).json()[
        "choices"
    ]
    for option in ({"temperature": 5e-324}, {"top_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1}):
        assert (
            server.http.post("/v1/chat/completions", json=body | option).json()["choices"]
            == expected
        )
