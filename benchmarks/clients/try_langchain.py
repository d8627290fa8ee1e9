"""LangChain (langchain-openai) against a server; see checks.py."""

from typing import Any, Literal

import openai
from checks import (
    CITIES,
    HELLO,
    KEY,
    MODEL,
    TOO_LONG,
    WEATHER,
    Choice,
    check,
    full,
    main,
    refused,
    too_slow,
)
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Place(BaseModel):
    """What is to be read from a text."""

    city: Literal["Oslo", "Paris"]
    capital: bool


@tool
def get_weather(city: Literal["Oslo", "Paris"]) -> str:
    """The weather in a city."""
    return f"Snow in {city}, -5 degrees."


def _chat_model(url: str, **options: Any) -> ChatOpenAI:
    given = {"max_tokens": 8, "temperature": 0, "timeout": 120, **options}
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, **given)


@check("chat")
def _chat(url: str, strict: str) -> None:
    answer = _chat_model(url).invoke(HELLO)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 8  # type: ignore[index]


@check("stream")
def _stream(url: str, strict: str) -> None:
    model = _chat_model(url)
    chunks = list(model.stream(HELLO))
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke(HELLO).content


@check("tool required")
def _required(url: str, strict: str) -> None:
    model = _chat_model(url, max_tokens=64)
    bound = model.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    answer = bound.invoke(WEATHER)
    assert answer.tool_calls[0]["args"]["city"] in CITIES
    assert not answer.invalid_tool_calls


@check("tool round trip")
def _round_trip(url: str, strict: str) -> None:
    model = _chat_model(url, max_tokens=64).bind_tools([get_weather])
    said = model.invoke([HumanMessage(WEATHER)])
    if not said.tool_calls:
        raise Choice(f"it called nothing: {said.content!r}")
    result = get_weather.invoke(said.tool_calls[0])
    assert model.invoke([HumanMessage(WEATHER), said, result]).content


@check("structured")
def _structured(url: str, strict: str) -> None:
    model = _chat_model(url, max_tokens=64).with_structured_output(Place)
    assert isinstance(model.invoke("Oslo is Norway's capital. JSON."), Place)


@check("embeddings")
def _embeddings(url: str, strict: str) -> None:
    # The length check would send ids of OpenAI's own tokenizer.
    options: Any = {"base_url": f"{url}/v1", "api_key": KEY, "check_embedding_ctx_length": False}
    one, two = OpenAIEmbeddings(model=MODEL, **options).embed_documents(["a b", "c d"])
    assert len(one) == len(two) > 1


@check("responses")
def _responses(url: str, strict: str) -> None:
    model = _chat_model(url, max_tokens=64, use_responses_api=True)
    bound = model.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    said = bound.invoke([HumanMessage(WEATHER)])
    result = get_weather.invoke(said.tool_calls[0])
    assert model.invoke([HumanMessage(WEATHER), said, result]).text
    assert "".join(chunk.text for chunk in model.stream(HELLO))
    assert isinstance(model.with_structured_output(Place).invoke("Oslo. JSON."), Place)


@check("too long")
def _too_long(url: str, strict: str) -> None:
    refused(lambda: _chat_model(url).invoke(TOO_LONG), ContextOverflowError)


@check("busy (429)")
def _full(url: str, strict: str) -> None:
    with full(strict):
        model = _chat_model(strict, max_retries=0, max_tokens=1)
        refused(lambda: model.invoke(HELLO), openai.RateLimitError)
    with full(strict, 0.5):
        assert _chat_model(strict, max_tokens=1).invoke(HELLO).response_metadata


@check("late (408)")
def _slow(url: str, strict: str) -> None:
    with too_slow(strict):
        error = refused(lambda: _chat_model(strict).invoke(HELLO), openai.APIStatusError)
        assert error.status_code == 408


main()
