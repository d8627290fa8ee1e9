"""pydantic-ai against a server; see checks.py."""

from typing import Any, Literal

from checks import (
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
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, Embedder, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.exceptions import ModelContextWindowExceededError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Place(BaseModel):
    """What is to be read from a text."""

    city: Literal["Oslo", "Paris"]
    capital: bool


def _agent(url: str, output: Any = str, max_tokens: int = 8, retries: int = 2) -> Agent[None, Any]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120, max_retries=retries)
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
    settings: Any = {"max_tokens": max_tokens, "temperature": 0, "parallel_tool_calls": False}
    return Agent(model, output_type=output, model_settings=settings)


@check("chat")
def _chat(url: str, strict: str) -> None:
    answer = _agent(url).run_sync(HELLO)
    assert answer.output
    assert answer.response.usage.output_tokens <= 8


@check("stream")
def _stream(url: str, strict: str) -> None:
    whole = _agent(url).run_sync(HELLO).output
    streamed = _agent(url).run_stream_sync(HELLO)
    assert list(streamed.stream_text(debounce_by=None))[-1] == whole


@check("tool required")
def _required(url: str, strict: str) -> None:
    answer = _agent(url, ToolOutput(Place, name="place"), 64).run_sync("Oslo is Norway's capital.")
    assert isinstance(answer.output, Place)


@check("tool round trip")
def _round_trip(url: str, strict: str) -> None:
    agent, called = _agent(url, max_tokens=64), []

    @agent.tool_plain
    def get_weather(city: Literal["Oslo", "Paris"]) -> str:
        """The weather in a city."""
        called.append(city)
        return f"Snow in {city}, -5 degrees."

    answer = agent.run_sync(WEATHER).output
    if not called:
        raise Choice(f"it called nothing: {answer!r}")
    assert answer


@check("structured")
def _structured(url: str, strict: str) -> None:
    answer = _agent(url, NativeOutput(Place), 64).run_sync("Oslo is Norway's capital.")
    assert isinstance(answer.output, Place)


@check("embeddings")
def _embeddings(url: str, strict: str) -> None:
    model = OpenAIEmbeddingModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=KEY))
    one, two = Embedder(model).embed_documents_sync(["a b", "c d"]).embeddings
    assert len(one) == len(two) > 1


@check("responses")
def _responses(url: str, strict: str) -> None:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=KEY)
    settings: Any = {"max_tokens": 64, "parallel_tool_calls": False}
    for output in (ToolOutput(Place, name="place"), NativeOutput(Place), str):
        agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), output_type=output)
        assert agent.run_sync("Oslo is Norway's capital.", model_settings=settings).output


@check("too long")
def _too_long(url: str, strict: str) -> None:
    error = refused(lambda: _agent(url).run_sync(TOO_LONG), ModelHTTPError)
    assert isinstance(error, ModelContextWindowExceededError)


@check("busy (429)")
def _full(url: str, strict: str) -> None:
    with full(strict):
        error = refused(lambda: _agent(strict, retries=0).run_sync(HELLO), ModelHTTPError)
        assert error.status_code == 429
    with full(strict, 0.5):
        assert _agent(strict, max_tokens=2).run_sync(HELLO).output is not None


@check("late (408)")
def _slow(url: str, strict: str) -> None:
    with too_slow(strict):
        error = refused(lambda: _agent(strict).run_sync(HELLO), ModelHTTPError)
        assert error.status_code == 408


main()
