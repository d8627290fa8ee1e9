"""The chat template of Qwen2.5 (ChatML with tools), and how a template is rendered.

Templates come with checkpoints and are code that nobody has read: they run in Jinja's sandbox, with the settings and
the helpers that transformers gives them, so one template renders to one text everywhere.
"""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openqwen.support.errors import OpenQwenError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
# One turn is <|im_start|>ROLE, newline, CONTENT, <|im_end|>, newline. Tools are listed in the system turn; a call is a
# JSON object between <tool_call> tags; the results of consecutive calls share one turn of the user.
_CHATML = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")


def chatml_template(system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> str:
    """The template's source; `system_prompt` stands where a chat does not begin with a system message."""
    return _CHATML.strip().replace("SYSTEM_PROMPT", json.dumps(system_prompt, ensure_ascii=False))


def render(
    template: str,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> str:
    """The chat as one text. OpenQwenError names the message that is wrong, or what the template objects to."""
    check_messages(messages)
    if continue_final_message:
        return _open_ended(template, messages, tools)
    # As in transformers, a key whose value is None counts as absent: templates test for the key.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compile(template).render(
            messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise OpenQwenError(f"The chat template failed on this chat: {error}", where="chat template") from error


def _open_ended(template: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    """The chat up to the end of its last message's text, found by a mark that is rendered in its place (transformers).

    Where the template trims the text, its end is trimmed too.
    """
    said = messages[-1].get("content")
    if said is None or (messages[-1].get("tool_calls") and not said):
        where = f"messages[{len(messages) - 1}]"
        raise OpenQwenError("The last message has no text to go on from.", where=where, do="give it content")
    marked = [*messages[:-1], messages[-1] | {"content": f"{said}{_MARK}"}]
    rendered = render(template, marked, tools, False)
    text = rendered.rpartition(_MARK.strip())[0]
    return text if _MARK in rendered else text.rstrip()


def check_messages(messages: list[Message]) -> None:
    """Each message has a known role and a text; only an assistant that calls tools may leave the text out."""
    if not messages:
        raise OpenQwenError("This chat has no messages.", do="begin it with a user message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise OpenQwenError(f"A message needs a role, one of {', '.join(ROLES)}.", where=where)
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise OpenQwenError("The content of a message must be text.", where=where)


class _Generation(Extension):
    """transformers' `{% generation %}` block, by which a template marks what the assistant says: its contents, here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes <, > and & for HTML; a chat wants them as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
