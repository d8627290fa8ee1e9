"""litellm against a server; see checks.py."""

import json
from typing import Any

import litellm
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

SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "place", "strict": True, "schema": TOOL["function"]["parameters"]},
}


def _ask(url: str, text: str = HELLO, **options: Any) -> Any:
    messages = options.pop("messages", [{"role": "user", "content": text}])
    given = {"max_tokens": 8, "temperature": 0, "timeout": 120, "api_key": KEY, **options}
    return litellm.completion(f"openai/{MODEL}", messages, api_base=f"{url}/v1", **given)


@check("chat")
def _chat(url: str, strict: str) -> None:
    answer = _ask(url)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 8


@check("stream")
def _stream(url: str, strict: str) -> None:
    whole = _ask(url).choices[0].message.content
    chunks = list(_ask(url, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == whole


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
    answer = _ask(url, "Oslo is Norway's capital. JSON.", response_format=SCHEMA, max_tokens=64)
    assert json.loads(answer.choices[0].message.content)["city"] in CITIES


@check("embeddings")
def _embeddings(url: str, strict: str) -> None:
    made = litellm.embedding(f"openai/{MODEL}", ["a b", "c d"], api_base=f"{url}/v1", api_key=KEY)
    assert len(made.data[0]["embedding"]) == len(made.data[1]["embedding"]) > 1


@check("too long")
def _too_long(url: str, strict: str) -> None:
    refused(lambda: _ask(url, TOO_LONG), litellm.ContextWindowExceededError)


@check("busy (429)")
def _full(url: str, strict: str) -> None:
    with full(strict):
        refused(lambda: _ask(strict, max_retries=0, max_tokens=1), litellm.RateLimitError)
    with full(strict, 0.5):
        assert _ask(strict, max_retries=2, max_tokens=1).choices


@check("late (408)")
def _slow(url: str, strict: str) -> None:
    with too_slow(strict):
        refused(lambda: _ask(strict), litellm.Timeout)


main()
