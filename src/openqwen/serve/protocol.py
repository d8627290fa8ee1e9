"""The requests that clients may send: OpenAI's, with some of vLLM's fields.

Unknown fields are ignored. Known fields that would change the answer, but are not supported, are
refused.
"""

# ruff: noqa: UP013 (a class for each shape would be longer)

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from openqwen.engine import Sampling, Structure
from openqwen.http.errors import ApiError
from openqwen.serve.forced import calls_or_json, calls_or_text, enforceable, only_calls
from openqwen.tokenizer.messages import as_messages

Json = dict[str, Any]
# JSON has one kind of number, so 8.0 counts as an integer.
_INTEGRAL = BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)
Count = Annotated[int, Field(ge=1, le=1 << 31), _INTEGRAL]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 31), _INTEGRAL]
TopCount = Annotated[int, Field(ge=0, le=20), _INTEGRAL]
NonEmpty = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[NonNegative], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
_SEVERAL = Field(min_length=1, max_length=256)
Prompts = (
    NonEmpty | TokenIds | Annotated[list[NonEmpty], _SEVERAL] | Annotated[list[TokenIds], _SEVERAL]
)

_TEXTS = ("text", "input_text", "output_text")


def _refuse_media(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in _TEXTS:
        raise ValueError(f"this model reads text, not {kind}")
    return part


def _refuse_unread(message: Any) -> Any:
    """Refuse parts of a message that the model would not see."""
    if isinstance(message, dict):
        if message.get("function_call") or message.get("role") == "function":
            raise ValueError("functions are the old form; send tool_calls, and role 'tool'")
        for name in ("audio", "refusal"):
            if message.get(name):
                raise ValueError(f"this model reads text, not {name}")
    return message


def _fault(param: str, fault: str) -> ApiError:
    return ApiError(400, f"{param}: {fault}.", param)


TextPart = TypedDict(
    "TextPart", {"type": Literal["text", "input_text", "output_text"], "text": str}
)
Content = str | list[Annotated[TextPart, BeforeValidator(_refuse_media)]]
Function = TypedDict("Function", {"name": str, "arguments": NotRequired[str | Json | None]})
ToolCall = TypedDict(
    "ToolCall",
    {"id": NotRequired[str], "type": NotRequired[Literal["function"]], "function": Function},
)
PromptMessage = TypedDict(
    "PromptMessage", {"role": Literal["system", "developer", "user", "tool"], "content": Content}
)
AssistantMessage = TypedDict(
    "AssistantMessage",
    {
        "role": Literal["assistant"],
        "content": NotRequired[Content | None],
        "tool_calls": NotRequired[list[ToolCall] | None],
    },
)
Message = Annotated[
    PromptMessage | AssistantMessage,
    Field(discriminator="role"),
    BeforeValidator(_refuse_unread),
]
Messages = Annotated[list[Message], Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
ToolFunction = TypedDict(
    "ToolFunction",
    {
        "name": FunctionName,
        "description": NotRequired[str | None],
        "parameters": NotRequired[Json | None],
        "strict": NotRequired[bool | None],
    },
)
Tool = TypedDict("Tool", {"type": Literal["function"], "function": ToolFunction})
FunctionReference = TypedDict("FunctionReference", {"name": str})
ToolReference = TypedDict(
    "ToolReference", {"type": Literal["function"], "function": FunctionReference}
)
Schema = TypedDict(
    "Schema",
    {"name": NotRequired[str], "schema": Json, "strict": NotRequired[bool | None]},
)
PlainFormat = TypedDict("PlainFormat", {"type": Literal["text"]})
JsonFormat = TypedDict(
    "JsonFormat", {"type": Literal["json_object"], "schema": NotRequired[Json | None]}
)
SchemaFormat = TypedDict("SchemaFormat", {"type": Literal["json_schema"], "json_schema": Schema})
Choices = Annotated[list[str], Field(min_length=1)]
StructuredOutputs = TypedDict(
    "StructuredOutputs",
    {"json": Json | None, "regex": str | None, "grammar": str | None, "choice": Choices | None},
    total=False,
)
StreamOptions = TypedDict(
    "StreamOptions",
    {"include_usage": bool | None, "continuous_usage_stats": bool | None},
    total=False,
)


_GUIDED = "send structured_outputs"
# Fields of OpenAI and vLLM that would change an answer and are not supported: why, or what to send.
_REFUSED = {
    "functions": "this is the old form; send tools",
    "function_call": "this is the old form; send tool_choice",
    "audio": "this model writes text only",
    "web_search_options": "this server does not search the web",
    "moderation": "this server does not moderate",
    "use_beam_search": "this server only samples",
    "bad_words": "send logit_bias",
    "allowed_token_ids": _GUIDED,
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "grammar": _GUIDED,
    "json_schema": _GUIDED,
    "prompt_logprobs": "send echo and logprobs to /v1/completions",
    "include_stop_str_in_output": "answers never hold the stop text",
    "truncate_prompt_tokens": "this server does not shorten prompts",
    "chat_template": "the checkpoint's template is used",
    "documents": "put them into a message",
}


class RequestBody(BaseModel):
    """A JSON body. Types are strict: text that looks like a number is not a number.

    refused: fields that are not supported, and why.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    refused: ClassVar[Mapping[str, str]] = {}
    model: str | None = Field(None, description="a name from /v1/models; default: the first")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, why in cls.refused.items() if isinstance(values, dict) else ():
            if values.get(name) not in (None, False, "", []):
                raise _fault(name, f"not supported here: {why}")
        return values


class ChatEnding(RequestBody):
    """How the rendered chat ends."""

    add_generation_prompt: bool | None = Field(
        None, description="begin a turn of the assistant; default: true"
    )
    continue_final_message: bool | None = Field(
        None, description="leave the last message open, so that the answer continues it"
    )

    @property
    def continues(self) -> bool:
        """Whether the last message is left open."""
        return bool(self.continue_final_message)

    @property
    def ending(self) -> Json:
        """Arguments of `Tokenizer.encode_chat`."""
        opens = self.add_generation_prompt is not False and not self.continues
        return {"add_generation_prompt": opens, "continue_final_message": self.continues}

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise _fault("continue_final_message", "it excludes add_generation_prompt")
        return self


class Options(RequestBody):
    """The fields that all requests for text share.

    Where a field is None, the checkpoint's generation_config.json decides, else OpenAI's default.
    """

    refused = _REFUSED
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=1 << 31), _INTEGRAL] | None = Field(
        None, description="keep this many of the likeliest tokens; -1 and 0: all"
    )
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), _INTEGRAL] | None = None
    n: Annotated[int, Field(ge=1, le=128), _INTEGRAL] | None = Field(
        None, description="number of answers to each prompt"
    )
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    stop_token_ids: list[NonNegative] | None = None
    ignore_eos: bool | None = Field(None, description="continue after the model's own stop tokens")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    min_tokens: Annotated[int, Field(ge=0), _INTEGRAL] | None = Field(
        None, description="supported only together with ignore_eos"
    )
    return_token_ids: bool | None = Field(
        None, description="return token ids, and the version of the weights that made each"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Options":
        if self.stream_options is not None and not self.stream:
            raise _fault("stream_options", "it needs stream: true")
        if self.min_tokens and not self.ignore_eos:
            raise _fault("min_tokens", "it needs ignore_eos: true")
        if len(self._forms) > 1:
            fault = f"{', '.join(self._forms)} exclude each other"
            raise _fault("structured_outputs", fault)
        return self

    @property
    def _forms(self) -> list[str]:
        """The kinds of form that structured_outputs gives."""
        forms = self.structured_outputs or {}
        return [name for name, value in forms.items() if value is not None]

    def structure(self) -> Structure | None:
        """The form that the answer must have, if the request gives one."""
        forms: Any = self.structured_outputs or {}
        if forms.get("choice"):
            return Structure("grammar", "start: " + " | ".join(map(json.dumps, forms["choice"])))
        kinds: dict[str, Any] = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}
        for name, kind in kinds.items():
            if (source := forms.get(name)) is not None:
                return Structure(kind, source if isinstance(source, str) else json.dumps(source))
        return None

    def sampling(
        self, defaults: Mapping[str, Any], max_tokens: int | None, top_logprobs: int
    ) -> Sampling:
        """The engine's sampling. defaults: the checkpoint's generation_config.json."""

        def value(name: str, default: float) -> float:
            values = (getattr(self, name), defaults.get(name), default)
            return float(next(value for value in values if value is not None))

        temperature = value("temperature", 1.0)
        greedy = defaults.get("do_sample") is False and self.temperature is None
        return Sampling(
            max_tokens=max_tokens,
            temperature=0.0 if greedy else temperature,
            top_k=max(int(value("top_k", 0)), 0),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=value("presence_penalty", 0.0),
            frequency_penalty=value("frequency_penalty", 0.0),
            logit_bias=tuple((int(i), bias) for i, bias in (self.logit_bias or {}).items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            structure=self.structure(),
        )


class ChatRequest(Options, ChatEnding):
    """/v1/chat/completions."""

    refused = _REFUSED | {"echo": "send continue_final_message"}

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolReference | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainFormat | JsonFormat | SchemaFormat | None = Field(
        None, discriminator="type"
    )
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def continues(self) -> bool:
        """Whether the last message is left open.

        By default where it is the assistant's and no new turn is to begin.
        """
        if self.continue_final_message is not None:
            return self.continue_final_message
        return self.add_generation_prompt is False and self.messages[-1]["role"] == "assistant"

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        names = [tool["function"]["name"] for tool in self.tools or []]
        if self.top_logprobs and not self.logprobs:
            raise _fault("top_logprobs", "it needs logprobs")
        if self.tool_choice not in (None, "none") and not names:
            raise _fault("tool_choice", "it needs tools")
        if isinstance(self.tool_choice, dict) and self.tool_choice["function"]["name"] not in names:
            raise _fault("tool_choice", f"it names none of the tools {names}")
        plain = self.response_format is None or self.response_format["type"] == "text"
        forced = self.tool_choice not in (None, "auto", "none")
        strict = any(tool["function"].get("strict") for tool in self.offered or [])
        if self._forms and (forced or strict or not plain):
            fault = "it excludes response_format and forced or strict tool calls"
            raise _fault("structured_outputs", fault)
        return self

    @property
    def offered(self) -> list[Any] | None:
        """The tools that the prompt describes."""
        return None if self.tool_choice == "none" else self.tools or None

    @property
    def untagged(self) -> list[str]:
        """Functions whose calls are recognised without a tag; none where JSON may be the answer."""
        form: Any = self.response_format
        forced = self.tool_choice not in (None, "auto")
        if form is not None and form["type"] != "text" and not forced:
            return []
        return [tool["function"]["name"] for tool in self.offered or []]

    def _form(self) -> Json | None:
        """The schema of an answer that is not a tool call."""
        form: Any = self.response_format
        if form is None or form["type"] == "text":
            return None
        if form["type"] == "json_schema":
            form = form["json_schema"]
        schema = {"type": "object"} if form.get("schema") is None else form["schema"]
        name = form.get("name") or "schema"
        return enforceable(schema, bool(form.get("strict")), "response_format", name)

    def structure(self) -> Structure | None:
        """The form of the answer, from tool_choice, strict tools and response_format."""
        choice, tools, form = self.tool_choice, self.offered or [], self._form()
        several = self.parallel_tool_calls is not False
        if isinstance(choice, dict):
            return only_calls(tools, choice["function"]["name"], several=False)
        if choice == "required":
            return only_calls(tools, None, several)
        if form is not None and tools:
            return calls_or_json(tools, form, several)
        if form is not None:
            return Structure("json_schema", json.dumps(form))
        structure = super().structure()
        if structure is None and any(tool["function"].get("strict") for tool in tools):
            return calls_or_text(tools, several)
        return structure


def without_strict(tools: list[Any] | None) -> list[Json] | None:
    """Tools as the prompt describes them, without `strict`, which is for the grammar."""
    if tools is None:
        return None
    functions = [dict(tool["function"]) for tool in tools]
    for function in functions:
        function.pop("strict", None)
    return [tool | {"function": function} for tool, function in zip(tools, functions)]


def plain(messages: list[Any]) -> list[Json]:
    """Messages as the chat template reads them; the content may be missing."""
    return as_messages(
        [message | {"content": message.get("content") or ""} for message in messages]
    )


class CompletionRequest(Options):
    """/v1/completions."""

    prompt: Prompts = Field(description="text, with control tokens read as such, or token ids")
    suffix: str | None = Field(None, description="text after the answer (fill-in-the-middle)")
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31), _INTEGRAL] | None = 16
    logprobs: TopCount | None = None
    echo: bool | None = Field(
        None,
        description="put the prompt, and its log-probabilities, before the answer",
    )
    best_of: Count | None = Field(None, description="must equal n")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _fault("max_tokens", "it can be 0 only with echo")
        if self.suffix and self.echo:
            raise _fault("suffix", "it excludes echo")
        if self.best_of not in (None, self.n or 1):
            raise _fault("best_of", "it must equal n; send n, and choose among the answers")
        return self

    def sampling(
        self, defaults: Mapping[str, Any], max_tokens: int | None, top_logprobs: int
    ) -> Sampling:
        """See `Options.sampling`."""
        sampling = super().sampling(defaults, max_tokens, top_logprobs)
        if not self.echo or self.logprobs is None:
            return sampling
        # lm-eval scores a text by requesting one more token, which it drops. There must be one,
        # even where the model would stop.
        return replace(
            sampling,
            prompt_logprobs=self.logprobs,
            ignore_eos=sampling.ignore_eos or max_tokens == 1,
        )


class EmbeddingRequest(RequestBody):
    """/v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(
        None,
        description="numbers of each embedding to keep; it is then scaled to length 1",
    )


class ScoreRequest(RequestBody):
    """/score: a reward model's scores of conversations that end with an answer."""

    conversations: list[Annotated[list[Message], Field(min_length=2)]] = Field(
        min_length=1, max_length=64
    )


class TokenizeRequest(ChatEnding):
    """/tokenize: one of `prompt`, `content` (llama.cpp's name for it) and `messages`."""

    prompt: str | None = None
    content: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    parse_special: bool = Field(True, description="read control tokens in the text as such")
    with_pieces: bool = Field(False, description="return each token's text too")


class DetokenizeRequest(RequestBody):
    """/detokenize."""

    tokens: list[NonNegative]


class TemplateRequest(ChatEnding):
    """/apply-template."""

    messages: Messages
    tools: list[Tool] | None = None


class WeightsRequest(RequestBody):
    """/update_weights: the subfolder of --weights to load."""

    version: NonNegative


class BatchRequest(RequestBody):
    """/v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
