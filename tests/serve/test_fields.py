"""Every field of OpenAI's request types is honoured, harmless for a reason given here, or refused
with a 400.
"""

import typing

import pytest
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from test_chat import WEATHER as TOOL
from test_errors import USER, told

from openqwen.serve import protocol as p
from openqwen.serve.responses import ResponsesRequest

BILLING = "whom the answer is billed to or filed under"
HINT = "a hint for speed, by which no answer changes"
HARMLESS = {
    "metadata": BILLING,
    "user": BILLING,
    "safety_identifier": BILLING,
    "service_tier": HINT,
    "prediction": HINT,
    "prompt_cache_key": HINT,
    "prompt_cache_options": HINT,
    "prompt_cache_retention": HINT,
    "store": "a chat that is not kept is missed at once, by a 404",
    "reasoning_effort": "this model does not reason, at any effort",
    "reasoning": "this model does not reason, at any effort",
    "access_programs": "what an account may use",
    "background_options": "of background, which is refused",
    "image": "of images, which are refused",
    "max_tool_calls": "of tools that the server runs, which are refused",
    "stream_options": "padding against eavesdroppers (of /v1/responses)",
    "truncation": "what is too long is refused in any case",
    "output_expires_after": "files stay until they are deleted",
}
# What is refused, with a value that asks for it.
REFUSED = {
    "audio": {"format": "mp3", "voice": "alloy"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "moderation": {"model": "m"},
    "web_search_options": {},
    "background": True,
    "conversation": "conv_1",
    "prompt": {"id": "pmpt_1"},
    "context_management": [{"type": "compaction"}],
}
# Honoured in one value alone.
PARTLY = {"best_of": 3, "modalities": ["text", "audio"], "verbosity": "low"}
ROUTES = {
    "/v1/chat/completions": (
        chat_params.CompletionCreateParamsBase,
        p.ChatRequest,
        {"messages": USER},
    ),
    "/v1/completions": (
        completion_create_params.CompletionCreateParamsBase,
        p.CompletionRequest,
        {"prompt": "x"},
    ),
    "/v1/responses": (
        response_create_params.ResponseCreateParamsBase,
        ResponsesRequest,
        {"input": "x"},
    ),
    "/v1/embeddings": (
        embedding_create_params.EmbeddingCreateParams,
        p.EmbeddingRequest,
        {"input": "x"},
    ),
    "/v1/batches": (batch_create_params.BatchCreateParams, p.BatchRequest, {}),
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_has_its_place(server, path):
    typed, kind, body = ROUTES[path]
    for name in typing.get_type_hints(typed):
        if name in kind.model_fields:
            wrong = PARTLY.get(name)
        elif name in kind.refused:
            wrong = REFUSED[name]
        else:
            assert name in HARMLESS, name
            continue
        if wrong is not None:
            error = told(server.http.post(path, json=body | {name: wrong}), 400)
            assert error["message"].startswith(name)
            assert error["param"].startswith(name)
        if wrong is not None and path != "/v1/batches":
            few = {"max_output_tokens" if kind is ResponsesRequest else "max_tokens": 1}
            assert server.http.post(path, json=body | few | {name: None}).status_code == 200


def test_harmless_fields_change_nothing(client):
    def ask(**more):
        options = {
            "model": "tiny",
            "messages": USER,
            "max_tokens": 4,
            "temperature": 0,
            "extra_body": more,
        }
        return client.chat.completions.create(**options).choices

    fields = {
        "modalities": ["text"],
        "verbosity": "medium",
        "best_of": 1,
        "functions": [],
        "function_call": None,
    }
    assert (
        ask(user="u", store=True, reasoning_effort="low", prediction={"type": "content"}, **fields)
        == ask()
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"min_tokens": 3}, "ignore_eos"),
        ({"guided_json": {"type": "object"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "exclude each other"),
        (
            {"structured_outputs": {"regex": "b"}, "response_format": {"type": "json_object"}},
            "excludes",
        ),
        (
            {"structured_outputs": {"regex": "b"}, "tools": [TOOL], "tool_choice": "required"},
            "excludes",
        ),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
    ids=str,
)
def test_what_vllm_does_and_this_does_not(server, body, words):
    error = told(server.http.post("/v1/chat/completions", json={"messages": USER} | body), 400)
    assert words in error["message"]


def words(server, path, body):
    error = told(server.http.post(path, json=body), 400)
    return error["message"], error["param"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TEXT = {"type": "text", "text": "a"}
CASES = [
    (
        {"messages": [{"role": "user", "content": [TEXT, IMAGE]}]},
        "messages[0].content[1]",
        "text, not image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
        "input_audio",
    ),
    (
        {"messages": [*USER, {"role": "assistant", "refusal": "no"}]},
        "messages[1]",
        "text, not refusal",
    ),
    (
        {"messages": [*USER, {"role": "assistant", "audio": {"id": "a"}}]},
        "messages[1]",
        "text, not audio",
    ),
    (
        {"messages": [*USER, {"role": "assistant", "function_call": {"name": "f"}}]},
        "messages[1]",
        "tool_calls",
    ),
    (
        {"messages": [*USER, {"role": "function", "name": "f", "content": "x"}]},
        "messages[1]",
        "tool_calls",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "required",
    ),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "'role' cannot be 'robot'"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "'role' is missing"),
    ({"messages": USER, "stop": 5}, "stop", "a valid string or a valid list"),
    (
        {"messages": USER, "tools": [{"type": "custom", "custom": {}}]},
        "tools[0].type",
        "'function'",
    ),
    (
        {"messages": USER, "tool_choice": {"type": "allowed_tools"}},
        "tool_choice.type",
        "'function'",
    ),
    (
        {"messages": USER, "response_format": {"type": "sound"}},
        "response_format",
        "'type' cannot be 'sound'",
    ),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
]


@pytest.mark.parametrize(("body", "param", "said"), CASES, ids=[str(case[1:]) for case in CASES])
def test_an_error_names_the_item_and_the_reason(server, body, param, said):
    message, where = words(server, "/v1/chat/completions", body)
    assert where == param
    assert said in message
    for private in (
        "Value error",
        "PromptMessage",
        "AssistantMessage",
        "TextPart",
        "list[",
        "dictionary",
        "union",
    ):
        assert private not in message


def test_errors_of_responses_and_completions_name_it_too(server):
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "x"}]
    message, param = words(server, "/v1/responses", {"input": [{"role": "user", "content": parts}]})
    assert (param, message) == (
        "input[0].content[1]",
        f"{param}: this model reads text, not input_image",
    )
    message, param = words(
        server, "/v1/responses", {"input": [{"type": "web_search_call", "id": "1"}]}
    )
    assert param == "input[0]"
    assert "web_search_call" in message
    message, param = words(
        server, "/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}
    )
    assert param == "tools[0].type"
    message, param = words(server, "/v1/responses", {"input": [{"type": "reasoning"}]})
    assert param == "input"
    assert message.startswith("input: ")
    message, param = words(server, "/v1/responses", {"input": "hello " * 4000})
    assert param == "input"
    assert "maximum context length" in message
    bad = {"type": "object", "properties": {"p": {"type": "string", "format": "path"}}}
    tool = {"type": "function", "name": "f", "parameters": bad, "strict": True}
    asked = {"input": "x", "tools": [tool], "tool_choice": "required"}
    assert words(server, "/v1/responses", asked)[1] == "tools[0].parameters"
    form = {"type": "json_schema", "name": "s", "schema": bad, "strict": True}
    message, param = words(server, "/v1/responses", {"input": "x", "text": {"format": form}})
    assert param == "text.format"
    assert message.startswith('text.format ("s") is strict')
    message, param = words(server, "/v1/completions", {"prompt": ["a", 1]})
    assert param.startswith("prompt[")
