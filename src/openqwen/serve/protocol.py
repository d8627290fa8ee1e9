"""What clients may send: OpenAI's requests, with vLLM's additions where they are of use.

Unknown fields are ignored; known ones that would change the answer and are not done are refused.
"""

# ruff: noqa: UP013 (shapes of one line each)

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from openqwen.engine import Sampling, Structure
from openqwen.serve.errors import ApiError
from openqwen.serve.forced import calls_or_json, calls_or_text, followed, only_calls
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

_TEXTS = ("text", "input_text", "output_text")


def _text_alone(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in _TEXTS:
        raise ValueError(f"this model reads text, not {kind}")
    return part


def _at(param: str, fault: str) -> ApiError:
    return ApiError(400, f"{param}: {fault}.", param)


def _readable(message: Any) -> Any:
    """Refuses what would be lost of a message without a word."""
    if isinstance(message, dict):
        if message.get("function_call") or message.get("role") == "function":
            raise ValueError("functions are the old form; write tool_calls, and role 'tool'")
        for name in ("audio", "refusal"):
            if message.get(name):
                raise ValueError(f"this model reads text, not {name}")
    return message


TextPart = TypedDict(
    "TextPart", {"type": Literal["text", "input_text", "output_text"], "text": str}
)
Content = str | list[Annotated[TextPart, BeforeValidator(_text_alone)]]
Function = TypedDict("Function", {"name": str, "arguments": NotRequired[str | Json | None]})
ToolCall = TypedDict(
    "ToolCall",
    {"id": NotRequired[str], "type": NotRequired[Literal["function"]], "function": Function},
)
Said = TypedDict(
    "Said", {"role": Literal["system", "developer", "user", "tool"], "content": Content}
)
Answer = TypedDict(
    "Answer",
    {
        "role": Literal["assistant"],
        "content": NotRequired[Content | None],
        "tool_calls": NotRequired[list[ToolCall] | None],
    },
)
Message = Annotated[Said | Answer, Field(discriminator="role"), BeforeValidator(_readable)]
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
Named = TypedDict("Named", {"name": str})
NamedTool = TypedDict("NamedTool", {"type": Literal["function"], "function": Named})
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
Structured = TypedDict(
    "Structured",
    {"json": Json | None, "regex": str | None, "grammar": str | None, "choice": Choices | None},
    total=False,
)
StreamOptions = TypedDict(
    "StreamOptions",
    {"include_usage": bool | None, "continuous_usage_stats": bool | None},
    total=False,
)


_GUIDED = "send structured_outputs"
# OpenAI's and vLLM's fields that change an answer and are not done, and why or what to send.
_REFUSED = {
    "functions": "this is the old form; send tools",
    "function_call": "this is the old form; send tool_choice",
    "audio": "this model writes text alone",
    "web_search_options": "this server does not search the web",
    "moderation": "this server does not moderate",
    "use_beam_search": "answers are sampled here",
    "bad_words": "send logit_bias",
    "allowed_token_ids": _GUIDED,
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "grammar": _GUIDED,
    "json_schema": _GUIDED,
    "prompt_logprobs": "send echo and logprobs to /v1/completions",
    "include_stop_str_in_output": "stop texts are left out of answers here",
    "truncate_prompt_tokens": "prompts are not cut here",
    "chat_template": "the checkpoint's own is used",
    "documents": "write them into a message",
}


class Body(BaseModel):
    """A number is a number, and not text that looks like one."""

    model_config = ConfigDict(strict=True, extra="ignore")
    refused: ClassVar[Mapping[str, str]] = {}
    model: str | None = Field(None, description="a name from /v1/models; none: the first")

    @model_validator(mode="before")
    @classmethod
    def _done(cls, values: Any) -> Any:
        for name, why in cls.refused.items() if isinstance(values, dict) else ():
            if values.get(name) not in (None, False, "", []):
                raise _at(name, f"not supported here: {why}")
        return values


class Turns(Body):
    """How the end of a chat is read."""

    add_generation_prompt: bool | None = Field(
        None, description="open a turn of the assistant; none: yes"
    )
    continue_final_message: bool | None = Field(
        None, description="leave the last message open, to go on with it"
    )

    @property
    def continues(self) -> bool:
        """Whether the last message is left open."""
        return bool(self.continue_final_message)

    @property
    def ending(self) -> Json:
        """The tokenizer's options."""
        opens = self.add_generation_prompt is not False and not self.continues
        return {"add_generation_prompt": opens, "continue_final_message": self.continues}

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise _at("continue_final_message", "it excludes add_generation_prompt")
        return self


class Options(Body):
    """How answers are made; shared by all requests for text.

    None: the checkpoint's own default, else no change.
    """

    refused = _REFUSED
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=1 << 31), _INTEGRAL] | None = Field(
        None, description="-1 and 0: no cut"
    )
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), _INTEGRAL] | None = None
    n: Annotated[int, Field(ge=1, le=128), _INTEGRAL] | None = Field(
        None, description="answers to each prompt"
    )
    stop: Filled | Annotated[list[Filled], Field(max_length=16)] | None = None
    stop_token_ids: list[Id] | None = None
    ignore_eos: bool | None = Field(None, description="go on after the model's own end")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Structured | None = None
    min_tokens: Annotated[int, Field(ge=0), _INTEGRAL] | None = Field(
        None, description="beside ignore_eos alone"
    )
    return_token_ids: bool | None = Field(
        None, description="tell the ids of prompt and answer, and which weights made each token"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Options":
        if self.stream_options is not None and not self.stream:
            raise _at("stream_options", "it is for streams alone")
        if self.min_tokens and not self.ignore_eos:
            raise _at("min_tokens", "it needs ignore_eos; else the model decides where it ends")
        if len(self._forms) > 1:
            told = f"{', '.join(self._forms)} exclude each other"
            raise _at("structured_outputs", told)
        return self

    @property
    def _forms(self) -> list[str]:
        """The forms in structured_outputs that an answer must have."""
        asked = self.structured_outputs or {}
        return [name for name, value in asked.items() if value is not None]

    def structure(self) -> Structure | None:
        """What the answer must look like, where the client says."""
        asked: Any = self.structured_outputs or {}
        if asked.get("choice"):
            return Structure("grammar", "start: " + " | ".join(map(json.dumps, asked["choice"])))
        for name, kind in (("json", "json_schema"), ("regex", "regex"), ("grammar", "grammar")):
            if (source := asked.get(name)) is not None:
                return Structure(kind, source if isinstance(source, str) else json.dumps(source))  # type: ignore[arg-type]
        return None

    def sampling(
        self, defaults: Mapping[str, Any], max_tokens: int | None, top_logprobs: int
    ) -> Sampling:
        """As the engine wants it. defaults: the checkpoint's generation_config."""

        def of(name: str, otherwise: float) -> float:
            values = (getattr(self, name), defaults.get(name), otherwise)
            return float(next(value for value in values if value is not None))

        temperature = of("temperature", 1.0)
        # Scores divided by next to nothing are no numbers.
        greedy = temperature < 1e-3 or (
            defaults.get("do_sample") is False and self.temperature is None
        )
        own = {
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        numbers: Json = {name: of(name, otherwise) for name, otherwise in own.items()}
        return Sampling(
            max_tokens=max_tokens,
            temperature=0.0 if greedy else temperature,
            top_k=max(int(of("top_k", 0)), 0),
            logit_bias=tuple((int(i), bias) for i, bias in (self.logit_bias or {}).items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            structure=self.structure(),
            **numbers,
        )


class ChatRequest(Options, Turns):
    """/v1/chat/completions."""

    refused = _REFUSED | {"echo": "send continue_final_message"}

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainFormat | JsonFormat | SchemaFormat | None = Field(
        None, discriminator="type"
    )
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def continues(self) -> bool:
        """Also where no new turn is wanted behind an assistant's message: it can only go on."""
        wanted = self.continue_final_message
        closed = self.add_generation_prompt is False and self.messages[-1]["role"] == "assistant"
        return closed if wanted is None else wanted

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        names = [tool["function"]["name"] for tool in self.tools or []]
        if self.top_logprobs and not self.logprobs:
            raise _at("top_logprobs", "it needs logprobs")
        if self.tool_choice not in (None, "none") and not names:
            raise _at("tool_choice", "it needs tools")
        if isinstance(self.tool_choice, dict) and self.tool_choice["function"]["name"] not in names:
            raise _at("tool_choice", f"it names none of the tools {names}")
        plain = self.response_format is None or self.response_format["type"] == "text"
        called = self.tool_choice not in (None, "auto", "none")
        called |= any(tool["function"].get("strict") for tool in self.offered or [])
        if self._forms and (called or not plain):
            told = "it excludes response_format and calls that are forced or strict"
            raise _at("structured_outputs", told)
        return self

    @property
    def offered(self) -> list[Any] | None:
        """The tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools or None

    @property
    def untagged(self) -> list[str]:
        """Functions whose calls are known without a tag: none where other JSON is awaited."""
        form: Any = self.response_format
        only_calls = self.tool_choice not in (None, "auto")
        known = form is None or form["type"] == "text" or only_calls
        return [tool["function"]["name"] for tool in self.offered or [] if known]

    def _form(self) -> Json | None:
        """The schema that an answer in words must fit."""
        form: Any = self.response_format
        if form is None or form["type"] == "text":
            return None
        wanted = form["json_schema"] if form["type"] == "json_schema" else form
        schema, name = wanted.get("schema"), wanted.get("name") or "schema"
        schema = {"type": "object"} if schema is None else schema
        return followed(schema, bool(wanted.get("strict")), "response_format", name)

    def structure(self) -> Structure | None:
        """Of the answer: calls that are forced, or of strict functions; the response format."""
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
        asked = super().structure()
        if asked is None and any(tool["function"].get("strict") for tool in tools):
            return calls_or_text(tools, several)
        return asked


def without_strict(tools: list[Any] | None) -> list[Json] | None:
    """Tools as the model is told of them: `strict` is for the grammar."""
    if tools is None:
        return None
    out = []
    for tool in tools:
        function = {key: value for key, value in tool["function"].items() if key != "strict"}
        out.append(tool | {"function": function})
    return out


def plain(messages: list[Any]) -> list[Json]:
    """Messages as the chat template reads them; an assistant may say nothing."""
    return as_messages(
        [message | {"content": message.get("content") or ""} for message in messages]
    )


class CompletionRequest(Options):
    """/v1/completions."""

    prompt: Prompts = Field(description="text in which control tokens are read, or ids")
    suffix: str | None = Field(
        None, description="text that follows the answer (fill-in-the-middle)"
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31), _INTEGRAL] | None = 16
    logprobs: Top | None = None
    echo: bool | None = Field(
        None, description="give the prompt back before the answer, with log-probabilities too"
    )
    best_of: Count | None = Field(None, description="as n: all that is written is given")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _at("max_tokens", "it can be 0 with echo alone")
        if self.suffix and self.echo:
            raise _at("suffix", "it excludes echo")
        if self.best_of not in (None, self.n or 1):
            raise _at("best_of", "it can only be n; send n, and choose among the answers")
        return self

    def sampling(
        self, defaults: Mapping[str, Any], max_tokens: int | None, top_logprobs: int
    ) -> Sampling:
        """See `Options.sampling`."""
        sampling = super().sampling(defaults, max_tokens, top_logprobs)
        if not self.echo or self.logprobs is None:
            return sampling
        # Who scores a text (lm-eval) asks for one token more and leaves out the last: there must be
        # one, be it the end.
        return replace(
            sampling,
            prompt_logprobs=self.logprobs,
            ignore_eos=sampling.ignore_eos or max_tokens == 1,
        )


class EmbeddingRequest(Body):
    """/v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(
        None, description="the first so many, scaled to length 1 again"
    )


class ScoreRequest(Body):
    """/score: what a reward model thinks of conversations that end with an answer."""

    conversations: list[Annotated[list[Message], Field(min_length=2)]] = Field(
        min_length=1, max_length=64
    )


class TokenizeRequest(Turns):
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


class TemplateRequest(Turns):
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
