"""Grammars of tool calls: they end, hold as many calls as are wanted, and fit strict schemas."""

import os
from pathlib import Path
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field, create_model

from openqwen.engine.constrain import Structures
from openqwen.serve.protocol import ChatRequest
from openqwen.serve.tools import Call, ToolCalls

TALK = [{"role": "user", "content": "What is the weather?"}]
REAL = Path(
    os.environ.get(
        "OPENQWEN_REAL_CHECKPOINT",
        Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )
)


def tool(name, strict=None, properties=None, **more):
    parameters = {"type": "object", "properties": properties, "required": list(properties or {})}
    function = {"name": name, "strict": strict} | (
        {} if properties is None else {"parameters": parameters | more}
    )
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", properties={"city": {"type": "string"}})
CLOCK = tool("clock")
NAMED = {"type": "function", "function": {"name": "get_weather"}}
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
NOW = '{"name": "clock", "arguments": {}}'


def tagged(body):
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.fixture(scope="module")
def fits(tokenizer):
    """Whether a text is a whole answer to a request."""
    structures = Structures(tokenizer, [tokenizer.eos_id])

    def answers(text, **options):
        matcher = structures.matcher(ChatRequest(messages=TALK, **options).structure())
        ids = tokenizer.encode(text, allow_control=True)
        if len(matcher.fitting(ids)) < len(ids):
            return False
        for token in ids:
            if matcher.complete:
                return False
            matcher.accept(token)
        return matcher.complete or bool(
            matcher.masks([], tokenizer.vocab_size)[0][tokenizer.eos_id]
        )

    return answers


@pytest.mark.parametrize(
    ("choice", "parallel", "answers", "refused"),
    [
        ("required", None, [PARIS], ["", "Hello", tagged('{"name": "other", "arguments": {}}')]),
        (
            "required",
            True,
            [tagged(PARIS), tagged(PARIS) + "\n"],
            [tagged(PARIS) + "\n\n", tagged(PARIS) + " so"],
        ),
        (
            "required",
            None,
            [tagged(PARIS) + "\n" + tagged(NOW), f"{tagged(NOW)}\n{PARIS}\n"],
            [tagged(PARIS) * 2],
        ),
        ("required", False, [tagged(PARIS)], [tagged(PARIS) + "\n" + tagged(NOW)]),
        (NAMED, None, [tagged(PARIS)], [tagged(NOW), tagged(PARIS) + "\n" + tagged(PARIS)]),
        # closed without a word of strict; a function without parameters takes none
        (NAMED, None, [], [tagged(PARIS.replace("}}", ', "x": 1}}'))]),
        ("required", None, [tagged(NOW)], [tagged(NOW.replace("{}", '{"x": 1}'))]),
    ],
)
def test_forced_calls(fits, choice, parallel, answers, refused):
    options = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "parallel_tool_calls": parallel}
    for text in answers:
        assert fits(text if text.startswith("<") else tagged(text), **options), text
    for text in refused:
        assert not fits(text, **options), text


def test_calls_of_strict_tools_fit_where_the_model_may_choose(fits):
    strict = tool("get_weather", True, {"city": {"type": "string"}})
    options = {"tools": [strict, CLOCK], "tool_choice": "auto"}
    invented = PARIS.replace("}}", ', "x": 1}}')
    fence = '```json\n{\n  "name": "get_weather",\n  "arguments": %s\n}\n```'
    for text in (
        "Hello",
        "It is <tool",
        "{}",
        '{"name": "Paris"}',
        "```python\nx\n```",
        tagged(PARIS),
        "So:\n" + tagged(PARIS),
    ):
        assert fits(text, **options), text
    for text in (
        tagged(PARIS) + "\n",
        tagged(NOW.replace("{}", '{"x": [1]}')),
        PARIS,
        fence % '{"city": "Rome"}',
    ):
        assert fits(text, **options), text
    for text in (
        tagged(invented),
        "So: " + tagged(invented),
        invented,
        fence % "{}",
        f"<tools>\n{invented}\n</tools>",
    ):
        assert not fits(text, **options), text
    one = options | {"parallel_tool_calls": False}
    assert fits(tagged(PARIS), **one)
    assert not fits(tagged(PARIS) + "\n" + tagged(NOW), **one)
    assert ChatRequest(messages=TALK, tools=[WEATHER]).structure() is None
    assert ChatRequest(messages=TALK, tools=[strict], tool_choice="none").structure() is None


def test_a_format_leaves_calls_possible(fits):
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = {"tools": [WEATHER], "response_format": form}
    assert fits('{"name":"get_weather"}', **options)
    assert fits(tagged(PARIS), **options)
    assert not fits("Hello", **options)
    assert not fits('{"name":"x","more":1}', **options)
    assert ChatRequest(messages=TALK, **options).untagged == []  # this JSON is the answer
    assert ChatRequest(messages=TALK, **options, tool_choice="required").untagged == ["get_weather"]


PATH = {
    "path": {"type": "string", "format": "path"},
    "tags": {"type": "array", "uniqueItems": True},
}


@pytest.mark.parametrize(
    ("options", "words", "param"),
    [
        (
            {"tools": [CLOCK, tool("save", True, PATH)]},
            [
                'tools[1] ("save") is strict',
                "properties.path: Unknown format: path",
                "properties.tags",
                "strict: false",
            ],
            "tools[1].function.parameters",
        ),
        (
            {"tools": [tool("save", None, {"a": {"type": "hiccup"}})], "tool_choice": "required"},
            [
                (
                    'The schema of tools[0] ("save") cannot be enforced: properties.a: Invalid '
                    "type: hiccup."
                )
            ],
            "tools[0].function.parameters",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "Saved",
                        "strict": True,
                        "schema": {"properties": PATH},
                    },
                }
            },
            ['response_format ("Saved") is strict', "properties.path: Unknown format: path"],
            "response_format",
        ),
    ],
)
def test_what_cannot_be_enforced_is_named(client, options, words, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=TALK, max_tokens=4, **options)
    for word in words:
        assert word in caught.value.body["message"]
    assert "%json" not in caught.value.body["message"]
    assert caught.value.body["param"] == param


def test_annotations_are_passed_over_without_strict(client):
    for choice in ("auto", "required"):
        options = {"tools": [tool("save", None, PATH)], "tool_choice": choice}
        assert client.chat.completions.create(model="tiny", messages=TALK, max_tokens=4, **options)


class Part(BaseModel):
    kind: Literal["part"]
    size: Annotated[int, Field(ge=0, le=9)]


class Other(BaseModel):
    kind: Literal["other"]
    flags: tuple[bool, bool]


Ordered = create_model(
    "Ordered",
    count=(Annotated[int, Field(ge=1, le=5)], ...),
    part=(Part | None, ...),
    either=(Annotated[Part | Other, Field(discriminator="kind")], ...),
    parts=(Annotated[list[Part], Field(min_length=1, max_length=2)], ...),
    code=(Annotated[str, Field(pattern="^[ab]{2}$")], ...),
)


def test_the_clients_own_helpers_for_models(client):
    asked = {"model": "tiny", "messages": TALK, "max_tokens": 400, "temperature": 1, "seed": 1}
    answer = client.chat.completions.parse(**asked, response_format=Ordered).choices[0]
    assert isinstance(answer.message.parsed, Ordered)
    tools = [openai.pydantic_function_tool(Part)]
    answer = client.chat.completions.parse(
        **asked, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Part)
    given = client.responses.parse(
        model="tiny", input="Go", max_output_tokens=400, text_format=Ordered
    )
    assert isinstance(given.output_parsed, Ordered)


def test_strict_is_not_told_to_the_model(server, client):
    counts = []
    for strict in (None, True, False):
        tools = [tool("get_weather", strict, {"city": {"type": "string"}})]
        counts.append(
            server.http.post("/tokenize", json={"messages": TALK, "tools": tools}).json()["tokens"]
        )
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"the real checkpoint is not here: {REAL}")
def test_the_real_checkpoint_calls_as_often_as_it_is_asked_to():
    from openqwen.engine import Engine
    from openqwen.model import load_model
    from openqwen.model.quantize import quantize
    from openqwen.tokenizer import load_tokenizer

    engine = Engine(quantize(load_model(REAL), "int8"), load_tokenizer(REAL))
    tools = [WEATHER, tool("get_time", properties={"city": {"type": "string"}})]

    def calls(content, choice="required", **options):
        request = ChatRequest(
            messages=[{"role": "user", "content": content}],
            tools=tools,
            tool_choice=choice,
            temperature=0,
            **options,
        )
        ids = engine.tokenizer.encode_chat(
            request.messages, add_generation_prompt=True, tools=request.offered
        )[0]
        output = engine.generate([ids], request.sampling({}, 120, 0))[0]
        assert output.finish_reason == "stop"
        machine = ToolCalls(request.untagged)
        pieces = machine.push(output.text) + machine.finish()
        return [piece.name for piece in pieces if isinstance(piece, Call)]

    twice = (
        "I need the weather in Paris and the weather in Rome. Call the tool twice, once for each "
        "city."
    )
    thrice = (
        "Get the weather in Oslo, the weather in Lima, and the weather in Rome. Make three calls."
    )
    for content in (
        "What is the weather in Paris?",
        "What time is it in Oslo?",
        "Weather in Berlin please",
    ):
        assert len(calls(content)) == 1
    assert calls("What is the weather in Paris?", NAMED) == ["get_weather"]
    assert calls(twice) == ["get_weather"] * 2
    assert calls(thrice) == ["get_weather"] * 3
    assert calls(twice, parallel_tool_calls=False) == ["get_weather"]
    assert calls("Weather in Berlin please", "auto") == ["get_weather"]  # in a fence
