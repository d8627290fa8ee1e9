"""What clients may send: OpenAI's requests, with vLLM's additions where they are of use. Unknown fields are ignored."""

# ruff: noqa: UP013 (shapes of one line each)

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from openqwen.engine import Sampling, Structure
from openqwen.tokenizer.messages import as_messages

Json = dict[str, Any]
# JSON has one kind of number: to it, 8.0 is an integer.
_INTEGRAL = BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)
Count = Annotated[int, Field(ge=1, le=1 << 31), _INTEGRAL]
Id = Annotated[int, Field(ge=0, lt=1 << 31), _INTEGRAL]
Top = Annotated[int, Field(ge=0, le=20), _INTEGRAL]
Filled = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Id], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Several = Field(min_length=1, max_length=256)
Prompts = Filled | Ids | Annotated[list[Filled], Several] | Annotated[list[Ids], Several]

TextPart = TypedDict("TextPart", {"type": Literal["text", "input_text", "output_text"], "text": str})
Content = str | list[TextPart]
Function = TypedDict("Function", {"name": str, "arguments": NotRequired[str | Json | None]})
ToolCall = TypedDict(
    "ToolCall", {"id": NotRequired[str], "type": NotRequired[Literal["function"]], "function": Function}
)
Said = TypedDict("Said", {"role": Literal["system", "developer", "user", "tool"], "content": Content})
Answer = TypedDict(
    "Answer",
    {
        "role": Literal["assistant"],
        "content": NotRequired[Content | None],
        "tool_calls": NotRequired[list[ToolCall] | None],
    },
)
Message = Annotated[Said | Answer, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
ToolFunction = TypedDict(
    "ToolFunction",
    {"name": FunctionName, "description": NotRequired[str | None], "parameters": NotRequired[Json | None]},
)
Tool = TypedDict("Tool", {"type": Literal["function"], "function": ToolFunction})
Named = TypedDict("Named", {"name": str})
NamedTool = TypedDict("NamedTool", {"type": Literal["function"], "function": Named})
Schema = TypedDict("Schema", {"name": NotRequired[str], "schema": Json})
PlainFormat = TypedDict("PlainFormat", {"type": Literal["text"]})
JsonFormat = TypedDict("JsonFormat", {"type": Literal["json_object"], "schema": NotRequired[Json | None]})
SchemaFormat = TypedDict("SchemaFormat", {"type": Literal["json_schema"], "json_schema": Schema})
Structured = TypedDict(
    "Structured",
    {"json": Json | None, "regex": str | None, "grammar": str | None, "choice": list[str] | None},
    total=False,
)
StreamOptions = TypedDict(
    "StreamOptions", {"include_usage": bool | None, "continuous_usage_stats": bool | None}, total=False
)
# The blanks of calls in Qwen2.5's training data, and no others: else a model may write blanks without end.
_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Body(BaseModel):
    """A number is a number, and not text that looks like one."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = Field(None, description="a name from /v1/models; none: the first")


class Options(Body):
    """How answers are made; shared by all requests for text. None: the checkpoint's own default, else no change."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=1 << 31), _INTEGRAL] | None = Field(None, description="-1 and 0: no cut")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), _INTEGRAL] | None = None
    n: Annotated[int, Field(ge=1, le=128), _INTEGRAL] | None = Field(None, description="answers to each prompt")
    stop: Filled | Annotated[list[Filled], Field(max_length=16)] | None = None
    stop_token_ids: list[Id] | None = None
    ignore_eos: bool | None = Field(None, description="go on after the model's own end")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Structured | None = None
    return_token_ids: bool | None = Field(None, description="tell the ids, and which weights made each token")

    @model_validator(mode="after")
    def _consistent(self) -> "Options":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams alone")
        return self

    def structure(self) -> Structure | None:
        """What the answer must look like, where the client says."""
        asked: Any = self.structured_outputs or {}
        if asked.get("choice"):
            return Structure("grammar", "start: " + " | ".join(map(json.dumps, asked["choice"])))
        for name, kind in (("json", "json_schema"), ("regex", "regex"), ("grammar", "grammar")):
            if (source := asked.get(name)) is not None:
                return Structure(kind, source if isinstance(source, str) else json.dumps(source))  # type: ignore[arg-type]
        return None

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int | None, top_logprobs: int) -> Sampling:
        """As the engine wants it. defaults: the checkpoint's generation_config."""

        def of(name: str, otherwise: float) -> float:
            value = getattr(self, name)
            return float(defaults.get(name) or otherwise) if value is None else value

        temperature = of("temperature", 1.0)
        # Scores divided by next to nothing are no numbers.
        greedy = temperature < 1e-3 or (defaults.get("do_sample") is False and self.temperature is None)
        own = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        numbers: Json = {name: of(name, otherwise) for name, otherwise in own.items()}
        return Sampling(
            max_tokens=max_tokens,
            temperature=0.0 if greedy else temperature,
            top_k=max(int(of("top_k", 0)), 0),
            logit_bias=tuple((int(i), bias) for i, bias in (self.logit_bias or {}).items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 63),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            structure=self.structure(),
            **numbers,
        )


class ChatRequest(Options):
    """/v1/chat/completions."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainFormat | JsonFormat | SchemaFormat | None = Field(None, discriminator="type")

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        names = [tool["function"]["name"] for tool in self.tools or []]
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, dict) and self.tool_choice["function"]["name"] not in names:
            raise ValueError(f"tool_choice names none of the tools {names}")
        return self

    @property
    def offered(self) -> list[Any] | None:
        """The tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools or None

    def structure(self) -> Structure | None:
        """Of the answer: forced calls, else the response format."""
        if self.tool_choice == "required" or isinstance(self.tool_choice, dict):
            only = self.tool_choice["function"]["name"] if isinstance(self.tool_choice, dict) else None
            functions = [t["function"] for t in self.tools or [] if only in (None, t["function"]["name"])]
            return forced_calls(functions, several=only is None and self.parallel_tool_calls is not False)
        form: Any = self.response_format
        if form is None or form["type"] == "text":
            return super().structure()
        schema = form["json_schema"]["schema"] if form["type"] == "json_schema" else form.get("schema")
        return Structure("json_schema", json.dumps({"type": "object"} if schema is None else schema))


def forced_calls(functions: list[ToolFunction], several: bool) -> Structure:
    """A grammar of nothing but calls to these functions, written as Qwen2.5 writes them."""
    rules, calls = [r'start: call ("\n" call)*' if several else "start: call"], []
    for number, function in enumerate(functions):
        head = json.dumps(f'\n{{"name": {json.dumps(function["name"])}, "arguments": ')
        calls.append(f'<tool_call> {head} arguments{number} "}}\\n" </tool_call>')
        parameters = {"type": "object", **(function.get("parameters") or {}), "x-guidance": _AS_TRAINED}
        rules.append(f"arguments{number}: %json {json.dumps(parameters)}")
    return Structure("grammar", "\n".join([*rules, "call: " + " | ".join(calls)]))


def plain(messages: list[Any]) -> list[Json]:
    """Messages as the chat template reads them; an assistant may say nothing."""
    return as_messages([message | {"content": message.get("content") or ""} for message in messages])


class CompletionRequest(Options):
    """/v1/completions."""

    prompt: Prompts = Field(description="text in which control tokens are read, or ids")
    max_tokens: Count | None = 16
    logprobs: Top | None = None
    echo: bool | None = Field(None, description="give the prompt back before the answer, with log-probabilities too")

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int | None, top_logprobs: int) -> Sampling:
        """See `Options.sampling`."""
        sampling = super().sampling(defaults, max_tokens, top_logprobs)
        if not self.echo or self.logprobs is None:
            return sampling
        # Who scores a text (lm-eval) asks for one token more and leaves out the last: there must be one, be it the end.
        return replace(sampling, prompt_logprobs=self.logprobs, ignore_eos=sampling.ignore_eos or max_tokens == 1)


class EmbeddingRequest(Body):
    """/v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(None, description="the first so many, scaled to length 1 again")


class ScoreRequest(Body):
    """/score: what a reward model thinks of conversations that end with an answer."""

    conversations: list[Annotated[list[Message], Field(min_length=2)]] = Field(min_length=1, max_length=64)


class TokenizeRequest(Body):
    """/tokenize: one of `prompt`, `content` (llama.cpp's name) and `messages`."""

    prompt: str | None = None
    content: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    parse_special: bool = Field(True, description="read control tokens in text")
    with_pieces: bool = Field(False, description="give each token's text too")


class DetokenizeRequest(Body):
    """/detokenize."""

    tokens: list[Id]


class TemplateRequest(Body):
    """/apply-template."""

    messages: Messages
    tools: list[Tool] | None = None


class WeightsRequest(Body):
    """/update_weights: the subfolder of --weights to load."""

    version: Id


class BatchRequest(Body):
    """/v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
