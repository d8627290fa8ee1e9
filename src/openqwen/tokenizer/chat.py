"""A chat to ids, with the tokens that the assistant wrote marked, and no way for a message to forge a control token.

Control tokens are found in text, and the template writes them as text, so `<|im_end|>` typed by a user would end the
turn. Before rendering, each control token inside what users wrote is therefore broken by a guard: a character that the
chat does not contain. What is found in the rendered text is then the template's own; the guards are removed afterwards
and the text between the control tokens is encoded in one piece, exactly as it would be without them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import regex

from openqwen.tokenizer.template import Message, render

if TYPE_CHECKING:
    from openqwen.tokenizer.tokenizer import Tokenizer

_HEADER = "assistant\n"


def encode_chat(
    tokenizer: "Tokenizer",
    template: str,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> tuple[list[int], list[int]]:
    """Render and encode: ids, and for each 1 where the assistant wrote it (its `<|im_end|>` included), else 0.

    An assistant's turn begins after `<|im_start|>assistant` and its newline. Where the answer itself begins with a
    newline, one token may hold both newlines: the assistant did not write it alone, so it is not marked.
    """
    forged = any(map(regex.compile(tokenizer.control_pattern).search, _strings([messages, tools])))
    guard = _unused_character([messages, tools]) if forged else ""
    shield = _shield(tokenizer, guard) if forged else lambda value: value
    text = render(template, shield(messages), shield(tools), add_generation_prompt, continue_final_message)
    chat: list[int] = []
    mask: list[int] = []
    opening = writing = False  # just after <|im_start|>; inside the assistant's turn
    for piece, control_id in tokenizer.split_control(text):
        if control_id is not None:
            writing = writing and control_id != tokenizer.im_start_id
            chat.append(control_id)
            mask.append(int(writing))
            writing = writing and control_id != tokenizer.eos_id
            opening = control_id == tokenizer.im_start_id
            continue
        if forged:
            piece = piece.replace(guard, "")
        ids = tokenizer.encode(piece)
        header = 0
        if opening and piece.startswith(_HEADER):
            writing = True
            header = _tokens_from_before(tokenizer, ids, len(_HEADER))
        chat += ids
        mask += [0] * header + [int(writing)] * (len(ids) - header)
        opening = False
    return chat, mask


def _tokens_from_before(tokenizer: "Tokenizer", ids: list[int], position: int) -> int:
    """How many of the tokens begin before this byte of their text."""
    begin = 0
    for count, i in enumerate(ids):
        if begin >= position:
            return count
        begin += len(tokenizer.token_bytes(i))
    return len(ids)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _unused_character(value: Any) -> str:
    """A private-use character that no string inside `value` holds."""
    used = set().union(*_strings(value))
    return next(character for character in map(chr, range(0xE000, 0x110000)) if character not in used)


def _shield(tokenizer: "Tokenizer", guard: str) -> Any:
    """A function that breaks each control token in the strings of a value, keys too, after its first character."""
    inside = regex.compile(rf"(?={tokenizer.control_pattern})(.)", regex.DOTALL)

    def shield(value: Any) -> Any:
        if isinstance(value, str):
            return inside.sub(rf"\1{guard}", value)
        if isinstance(value, dict):
            return {shield(key): shield(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shield(inner) for inner in value]
        return value

    return shield
