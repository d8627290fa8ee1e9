"""openai-python against a server; see checks.py."""

import json
from typing import Any, Literal

import openai
from checks import (
    CITIES,
    HELLO,
    KEY,
    MODEL,
    TOO_LONG,
    TOOL,
    WEATHER,
    Choice,
    check,
    full,
    main,
    refused,
    too_slow,
)
from pydantic import BaseModel


class Place(BaseModel):
    """What is to be read from a text."""

    city: Literal["Oslo", "Paris"]
    capital: bool


def _client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120, **options)


def _ask(url: str, text: str = HELLO, **options: Any) -> Any:
    retries = {"max_retries": options.pop("max_retries")} if "max_retries" in options else {}
    messages = options.pop("messages", [{"role": "user", "content": text}])
    options = {"model": MODEL, "max_tokens": 8, "temperature": 0, **options}
    return _client(url, **retries).chat.completions.create(messages=messages, **options)


@check("chat")
def _chat(url: str, strict: str) -> None:
    answer = _ask(url)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 8


@check("stream")
def _stream(url: str, strict: str) -> None:
    whole = _ask(url).choices[0].message.content
    chunks = list(_ask(url, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.total_tokens


@check("tool required")
def _required(url: str, strict: str) -> None:
    options = {
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 64,
    }
    answer = _ask(url, WEATHER, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert json.loads(answer.message.tool_calls[0].function.arguments)["city"] in CITIES


@check("tool round trip")
def _round_trip(url: str, strict: str) -> None:
    messages: list[Any] = [{"role": "user", "content": WEATHER}]
    said = _ask(url, messages=messages, tools=[TOOL], max_tokens=64).choices[0].message
    if not said.tool_calls:
        raise Choice(f"it called nothing: {said.content!r}")
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "Snow, -5 degrees."}
    last = _ask(url, messages=[*messages, said, result], tools=[TOOL], max_tokens=32)
    assert last.choices[0].message.content


@check("structured")
def _structured(url: str, strict: str) -> None:
    messages: Any = [{"role": "user", "content": "Oslo is Norway's capital. JSON."}]
    asked = _client(url).chat.completions
    answer = asked.parse(model=MODEL, messages=messages, response_format=Place, max_tokens=64)
    assert isinstance(answer.choices[0].message.parsed, Place)


@check("embeddings")
def _embeddings(url: str, strict: str) -> None:
    one, two = _client(url).embeddings.create(model=MODEL, input=["a b", "c d"]).data
    assert len(one.embedding) == len(two.embedding) > 1


@check("responses")
def _responses(url: str, strict: str) -> None:
    tools: Any = [{"type": "function", **TOOL["function"]}]
    forced: Any = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    asked = _client(url).responses
    first = asked.create(model=MODEL, input=WEATHER, max_output_tokens=64, **forced)
    call = first.output[0]
    assert json.loads(call.arguments)["city"] in CITIES
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Snow."}
    before = {"previous_response_id": first.id}
    assert asked.create(model=MODEL, input=[result], max_output_tokens=16, **before).output_text


@check("too long")
def _too_long(url: str, strict: str) -> None:
    error = refused(lambda: _ask(url, TOO_LONG), openai.BadRequestError)
    assert error.code == "context_length_exceeded"


@check("busy (429)")
def _full(url: str, strict: str) -> None:
    with full(strict):
        refused(lambda: _ask(strict, max_retries=0, max_tokens=1), openai.RateLimitError)
    with full(strict, 0.5):
        assert _ask(strict, max_tokens=1).choices


@check("late (408)")
def _slow(url: str, strict: str) -> None:
    with too_slow(strict):
        assert refused(lambda: _ask(strict), openai.APIStatusError).status_code == 408


main()
