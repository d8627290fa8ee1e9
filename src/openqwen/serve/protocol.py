"""What clients may send: OpenAI's requests, with vLLM's additions where they are of use. Unknown fields are ignored."""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openqwen.engine import Sampling, Structure
from openqwen.serve.errors import ApiError

Ids = list[Annotated[int, Field(ge=0, lt=1 << 31)]]
Json = dict[str, Any]
# The blanks of calls in Qwen2.5's training data, and no others: else a model may write blanks without end.
_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Body(BaseModel):
    """A number is a number, and not text that looks like one."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    """What a stream tells besides the answer."""

    include_usage: bool | None = Field(None, description="a last chunk with token counts")
    continuous_usage_stats: bool | None = Field(None, description="token counts in every chunk")


class Structured(Body):
    """vLLM's `structured_outputs`: one of these."""

    json_: Json | str | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = Field(None, description="a regular expression")
    choice: list[str] | None = Field(None, min_length=1, description="one of these texts")
    grammar: str | None = Field(None, description="a grammar in Lark's notation")


class Options(Body):
    """How answers are made; shared by all requests for text. None: the checkpoint's own default, else no change."""

    model: str | None = Field(None, description="a name from /v1/models; none: the only one")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="-1 and 0: no cut")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(None, ge=1, le=128, description="answers to each prompt")
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = Field(None, description="go on after the model's own end")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Structured | None = None
    return_token_ids: bool | None = Field(None, description="tell the ids, and which weights made each token")
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Options":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams alone")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise ValueError("stop takes 16 texts at most")
        return self

    def structure(self) -> Structure | None:
        """What the answer must look like, where the client says."""
        asked = self.structured_outputs
        if asked is None:
            return None
        if asked.json_ is not None:
            return schema(asked.json_)
        if asked.choice is not None:
            return Structure("grammar", _alternatives(asked.choice))
        if asked.regex is not None:
            return Structure("regex", asked.regex)
        return None if asked.grammar is None else Structure("grammar", asked.grammar)

    def sampling(self, defaults: Json, max_tokens: int, structure: Structure | None, top_logprobs: int) -> Sampling:
        """As the engine wants it. defaults: the checkpoint's generation_config."""

        def of(name: str, otherwise: float) -> Any:
            value = getattr(self, name)
            return defaults.get(name, otherwise) if value is None else value

        greedy = defaults.get("do_sample") is False and self.temperature is None
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=0.0 if greedy else float(of("temperature", 1.0)),
            top_k=max(of("top_k", 0), 0),
            top_p=float(of("top_p", 1.0)),
            min_p=float(of("min_p", 0.0)),
            repetition_penalty=float(of("repetition_penalty", 1.0)),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(i), bias) for i, bias in (self.logit_bias or {}).items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 63),
            stop=tuple(stop),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            structure=structure,
        )


def schema(value: Json | str) -> Structure:
    """A JSON schema as the engine takes it."""
    return Structure("json_schema", value if isinstance(value, str) else json.dumps(value))


class TextPart(Body):
    """A piece of a message's content; this model reads text only."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Function(Body):
    """A function that was called; arguments are JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content must be text; only an assistant that calls tools may leave it out")
        return self

    def plain(self, where: str) -> Json:
        """As the chat template reads it."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: Json = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        if self.tool_calls and self.role == "assistant":
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.function.name, "arguments": _arguments(call, where)}}
                for call in self.tool_calls
            ]
        return message


def _arguments(call: ToolCall, where: str) -> Any:
    try:
        return json.loads(call.function.arguments or "{}")
    except json.JSONDecodeError:
        raise ApiError(400, "The arguments of a tool call must be JSON.", param=where) from None


class ToolFunction(Body):
    """A function that the model may call; parameters is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class Named(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: Named


class Schema(Body):
    """A named JSON schema."""

    name: str | None = None
    schema_: Json = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema_: Json | None = Field(None, alias="schema", description="of a json_object")

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    def structure(self) -> Structure | None:
        """As the engine takes it."""
        if self.type == "text":
            return None
        return schema(self.json_schema.schema_ if self.json_schema else self.schema_ or {"type": "object"})


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ChatRequest(Options):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or []]
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names no tool of {names}")
        return self

    @property
    def offered(self) -> list[Json] | None:
        """The tools that the model is told of."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def structure(self) -> Structure | None:
        """Of the answer: forced calls, else the response format."""
        choice = self.tool_choice
        if self.tools and (choice == "required" or isinstance(choice, NamedTool)):
            only = choice.function.name if isinstance(choice, NamedTool) else None
            functions = [tool.function for tool in self.tools if only in (None, tool.function.name)]
            return forced_calls(functions, several=only is None and self.parallel_tool_calls is not False)
        formatted = self.response_format.structure() if self.response_format else None
        return formatted or super().structure()


def forced_calls(functions: list[ToolFunction], several: bool) -> Structure:
    """A grammar of nothing but calls to these functions, written as Qwen2.5 writes them."""
    rules = [r'start: call ("\n" call)*' if several else "start: call"]
    bodies = []
    for number, function in enumerate(functions):
        head = json.dumps(f'\n{{"name": {json.dumps(function.name)}, "arguments": ')
        bodies.append(f'<tool_call> {head} arguments{number} "}}\\n" </tool_call>')
        parameters = {"type": "object", **(function.parameters or {}), "x-guidance": _AS_TRAINED}
        rules.append(f"arguments{number}: %json {json.dumps(parameters)}")
    return Structure("grammar", "\n".join([*rules, "call: " + " | ".join(bodies)]))


def _alternatives(texts: list[str]) -> str:
    return "start: " + " | ".join(json.dumps(text) for text in texts)


class CompletionRequest(Options):
    """/v1/completions."""

    prompt: str | list[str] | Ids | list[Ids] = Field(description="text in which control tokens are read, or ids")
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="give the prompt back before the answer")


class EmbeddingRequest(Body):
    """/v1/embeddings."""

    model: str | None = None
    input: str | list[str] | Ids | list[Ids]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, description="the first so many, scaled to length 1 again")
    user: str | None = None


class ScoreRequest(Body):
    """/score: what a reward model thinks of conversations that end with an answer."""

    model: str | None = None
    conversations: list[Annotated[list[Message], Field(min_length=2)]] = Field(min_length=1, max_length=64)


class TokenizeRequest(Body):
    """/tokenize: one of `prompt`, `content` (llama.cpp's name) and `messages`."""

    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    parse_special: bool = Field(True, description="read control tokens in text")
    with_pieces: bool = Field(False, description="give each token's text too")


class TemplateRequest(Body):
    """/apply-template."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None


class DetokenizeRequest(Body):
    """/detokenize."""

    tokens: Ids


class WeightsRequest(Body):
    """/update_weights: the subfolder of --weights to load."""

    version: int = Field(ge=0, lt=1 << 31)


class BatchRequest(Body):
    """/v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
