"""Converts the engine's types to requests of OpenAI's API, and responses back.

Fields that OpenAI does not have (top_k, stop_token_ids, structured_outputs, return_token_ids ...)
are vLLM's, which OpenQwen's server knows too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from openqwen.engine.generator import FinishReason, Output, Prompt, Sampling, Structure
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.messages import as_messages

Json = dict[str, Any]

# Values without effect. They are sent nonetheless, since a server takes missing ones from the
# checkpoint's generation_config.json. If a server refuses one, it is left out.
_NEUTRAL: Mapping[str, float] = {
    "top_k": -1,  # not 0, which SGLang refuses
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
}
_NOT_MAPPED = {
    "top_logprobs": "servers return likely tokens as texts, not as ids",
    "long_context": "the server decides how it reads long prompts",
    "prompt_logprobs_from": "servers score all tokens of a prompt",
}


class ApiCall(NamedTuple):
    """One HTTP request. optional: fields of the body to leave out if the server refuses them."""

    path: str
    body: Json
    optional: frozenset[str] = frozenset()


def answer_call(prompt: Prompt, sampling: Sampling, seed: int, model: str) -> ApiCall:
    """The request for one answer. Raises OpenQwenError for settings without a field in the API."""
    for name, why in _NOT_MAPPED.items():
        if getattr(sampling, name):
            raise _cannot_be_sent(name, why)
    if sampling.prompt_logprobs:
        raise _cannot_be_sent("prompt_logprobs", _NOT_MAPPED["top_logprobs"], "give 0")
    numbers = {name: getattr(sampling, name) for name in _NEUTRAL} | {"top_k": sampling.top_k or -1}
    body: Json = {"model": model, "temperature": sampling.temperature, "top_p": sampling.top_p}
    body |= numbers | {"return_token_ids": True}
    optional = {name for name, value in numbers.items() if value == _NEUTRAL[name]}
    optional |= {"return_token_ids", "logprobs"}
    if sampling.temperature > 0:  # greedy answers have no seed: their cache entries are shared
        body["seed"] = _signed(seed)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_ids:
        body["stop_token_ids"] = list(sampling.stop_ids)
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.logit_bias:
        body["logit_bias"] = _summed(sampling.logit_bias)
    if _is_messages(prompt):
        path = "/chat/completions"
        body |= {"messages": _messages(prompt), "logprobs": True}
        if sampling.max_tokens is not None:
            body["max_tokens"] = sampling.max_tokens
    else:
        path = "/completions"
        # null, since a missing max_tokens means 16. llama.cpp returns nothing for logprobs 0.
        body |= {"prompt": _plain(prompt), "max_tokens": sampling.max_tokens, "logprobs": 1}
    if sampling.structure:
        body |= _structured(sampling.structure, path)
    return ApiCall(path, body, frozenset(optional))


def score_call(prompt: Prompt, model: str) -> ApiCall:
    """The request for the log-probabilities of a prompt's own tokens."""
    if _is_messages(prompt):
        why = "the API does not return them for messages"
        raise _cannot_be_sent("prompt_logprobs", why, "give a text or token ids")
    body = {"model": model, "prompt": _plain(prompt), "max_tokens": 0, "echo": True, "logprobs": 1}
    return ApiCall("/completions", body)


def read_answer(response: Json) -> Output:
    """The first answer in a response.

    A finish reason that is neither a stop nor a limit, such as a content filter, becomes "error".

    Raises:
        ValueError: the response does not have the API's form.
    """
    try:
        choice = response["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        output = Output(
            text=_checked(text or "", str),
            token_ids=[_checked(i, int) for i in choice.get("token_ids") or ()],
            logprobs=_logprobs(choice.get("logprobs") or {}),
            finish_reason=_REASONS.get(choice["finish_reason"], "error"),
            versions=[_checked(i, int) for i in choice.get("token_versions") or ()],
        )
        prompt_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids") or ()
        output.prompt_ids = [_checked(i, int) for i in prompt_ids]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no completion ({type(error).__name__}: {error})") from None
    if "stop_id" in choice:  # OpenQwen's server
        output.stop_id = choice["stop_id"]
    elif _ended_by_token(choice) and output.token_ids:
        output.stop_id = output.token_ids.pop()
        del output.logprobs[len(output.token_ids) :]
    return output


def read_score(response: Json) -> list[float]:
    """The log-probability of each prompt token but the first, or a ValueError without them."""
    try:
        logprobs = response["choices"][0]["logprobs"]["token_logprobs"]
        return [float(value) for value in logprobs[1:]]
    except (KeyError, IndexError, TypeError) as error:
        what = f"it has no log-probabilities of the prompt ({type(error).__name__}: {error})"
        raise ValueError(what) from None


def _ended_by_token(choice: Json) -> bool:
    """Whether vLLM ended this answer at its last token, not at a stop text or a limit."""
    stopped = choice["finish_reason"] == "stop" and "stop_reason" in choice
    return stopped and not isinstance(choice["stop_reason"], str)


def _cannot_be_sent(name: str, why: str, do: str = "leave it out") -> OpenQwenError:
    what = f"{name} cannot be sent to a server: {why}."
    return OpenQwenError(what, where=f"sampling, {name}", do=do)


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer; servers refuse larger ones."""
    return (seed + 2**63) % 2**64 - 2**63


def _summed(biases: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Biases by id; those of the same id are added."""
    total: dict[str, float] = {}
    for i, bias in biases:
        total[str(i)] = total.get(str(i), 0.0) + bias
    return total


def _is_messages(prompt: Prompt) -> bool:
    return bool(prompt) and not isinstance(prompt, str) and not isinstance(prompt[0], int)


def _plain(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(cast(Sequence[int], prompt))


def _messages(prompt: Prompt) -> list[Json]:
    """Messages with the API's fields only.

    In the API the arguments of tool calls are JSON text, and each result has the id of its call.
    In a record without ids, results have the order of their calls.
    """
    messages: list[Json] = []
    waiting: list[str] = []  # ids of the calls without a result so far
    for message in as_messages(prompt):
        kept = {name: message[name] for name in _MESSAGE_FIELDS if name in message}
        if "tool_calls" in kept:
            name = f"call_{len(messages)}"
            calls = [_tool_call(call, f"{name}_{n}") for n, call in enumerate(kept["tool_calls"])]
            kept["tool_calls"] = calls
            waiting = [call["id"] for call in calls]
        if kept["role"] == "tool" and waiting:
            following = waiting.pop(0)
            kept.setdefault("tool_call_id", following)
        messages.append(kept)
    return messages


def _tool_call(call: Json, otherwise: str) -> Json:
    """A call in the API's form. otherwise: its id if it has none."""
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"id": otherwise, **call, "function": {**function, "arguments": arguments}}


def _structured(structure: Structure, path: str) -> Json:
    """The field for a structure: OpenAI's if there is one, as more servers know it."""
    if structure.kind != "json_schema":
        return {"structured_outputs": {structure.kind: structure.source}}
    schema = json.loads(structure.source)
    if path == "/chat/completions":
        form = {"name": "answer", "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": form}}
    return {"structured_outputs": {"json": schema}}


def _logprobs(logprobs: Json) -> list[float]:
    """The numbers of either form: objects for each token (chat), or a list (completions)."""
    if logprobs.get("content") is not None:
        return [float(entry["logprob"]) for entry in logprobs["content"]]
    return [float(value) for value in logprobs.get("token_logprobs") or ()]


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} is not of type {kind.__name__}")
    return value
