"""The chat template of Qwen2.5 (ChatML with tools), and how a template is rendered.

Templates come with checkpoints and are untrusted code, so they run in Jinja's sandbox. They get the
settings and the helpers of transformers, so a template renders to the same text there and here.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, ContextReference, Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openqwen.support.errors import OpenQwenError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."

# A turn is <|im_start|>ROLE, newline, CONTENT, <|im_end|>, newline. The system turn lists the
# tools; a call is a JSON object between <tool_call> tags; the results of consecutive calls share a
# turn of the user.
_CHATML = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")


def chatml_template(system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> str:
    """The template's source; a chat without a system message begins with `system_prompt`."""
    return _CHATML.strip().replace("SYSTEM_PROMPT", json.dumps(system_prompt, ensure_ascii=False))


def choose(templates: str | Mapping[str, str], tools: Any) -> str:
    """The template for a chat: of several, `tool_use` if there are tools, else `default`."""
    if isinstance(templates, str):
        return templates
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        what = f"None of this tokenizer's chat templates is the default; their names are {names}."
        raise OpenQwenError(what, "chat template", "name one of them 'default'")
    return templates["default"]


def render(
    template: str,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    special: Mapping[str, str],
    continue_final_message: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """(the chat as one text, where in it each `{% generation %}` block begins and ends).

    special: the special tokens by the names that templates use (`eos_token` ...).
    continue_final_message: end the text where the content of the last message ends.
    Raises OpenQwenError, which names the wrong message or what the template objects to.
    """
    check_messages(messages)
    if continue_final_message and add_generation_prompt:
        what = "A chat can continue its final message or begin a new one, not both."
        raise OpenQwenError(what, "continue_final_message", "set add_generation_prompt to false")
    messages = [_as_templates_see_it(message) for message in messages]
    if continue_final_message:
        messages[-1] |= {"content": _final_content(messages) + _TAG}
    pieces: list[str] = []
    marks: list[tuple[int, int]] = []
    variables = {
        **special,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        _TRACKER: (pieces, marks),
    }
    try:
        pieces.extend(_compile(template).generate(variables))
    except Exception as error:  # a template is a program: it may raise anything
        what = f"The chat template failed on this chat: {error}"
        raise OpenQwenError(what, "chat template") from error
    text = "".join(pieces)
    return (_until_tag(text, messages[-1]["content"]) if continue_final_message else text), marks


_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _as_templates_see_it(message: Message) -> Message:
    """The message without None values, and reasoning under two names, as in transformers."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in _REASONING:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _final_content(messages: list[Message]) -> str:
    content = messages[-1].get("content")
    if content is None:
        what, where = "The final message has no content to continue.", len(messages) - 1
        raise OpenQwenError(what, f"messages[{where}]", "give it a content, or begin a new message")
    return content


def _until_tag(text: str, tagged: str) -> str:
    """`text` up to the tag after the content that is continued, cut as in transformers."""
    place = text.rfind(_TAG.strip())
    if place < 0 or tagged.removesuffix(_TAG).strip() not in text:
        what = "The final message cannot be continued: the chat template changes it."
        raise OpenQwenError(what, "chat template")
    kept = text[:place]
    # A template that trims contents has trimmed the tag; then the content's end is trimmed too.
    return kept if text.startswith(_TAG, place) else kept.rstrip()


def check_messages(messages: list[Message]) -> None:
    """Raise OpenQwenError unless each message has a known role and a text.

    A message with tool calls needs no text.
    """
    if not messages:
        raise OpenQwenError("This chat has no messages.", do="begin it with a user message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise OpenQwenError(f"A message needs a role, one of {', '.join(ROLES)}.", where=where)
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise OpenQwenError("The content of a message must be text.", where=where)


_TRACKER = "_openqwen_generation"


class _Generation(Extension):
    """transformers' `{% generation %}` block, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [ContextReference()])
        return CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        pieces, marks = context[_TRACKER]
        said = caller()
        start = sum(map(len, pieces))
        marks.append((start, start + len(said)))
        return said


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes of <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
