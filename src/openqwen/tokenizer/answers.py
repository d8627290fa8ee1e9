"""A prompt with an answer as token ids: the same for training, scoring and the server."""

from collections.abc import Sequence

from openqwen.tokenizer.messages import Message, Tools
from openqwen.tokenizer.tokenizer import Tokenizer


def encode_answer(
    tokenizer: Tokenizer,
    asked: list[Message],
    reply: Message,
    tools: Tools = None,
    sampled: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """A prompt and an answer to it: ids, and a mask with 1 for the answer's tokens.

    The ids end with the token that ends the answer. The prompt is encoded as the engine encodes it,
    so that the answer's log-probability is the one that it was sampled at.

    Args:
        sampled: the ids that the answer was sampled as, with its end token. They are used if they
            decode to the reply's text: those of another tokenizer do not.
    """
    start, _ = tokenizer.encode_chat(asked, add_generation_prompt=True, tools=tools)
    if sampled and tokenizer.decode(sampled).strip() == reply["content"].strip():
        return start + list(sampled), [0] * len(start) + [1] * len(sampled)
    ids, mask = tokenizer.encode_chat([*asked, reply], tools=tools)
    end = end_of_targets(mask)
    if ids[: len(start)] == start:
        return ids[:end], [0] * len(start) + mask[len(start) : end]
    # A newline that opens the answer can merge with the template's own into one token, which the
    # engine never sees. The answer is then encoded by itself, with the template's end token.
    written = tokenizer.encode(reply["content"])
    written += [i for i in ids[end - 1 : end] if tokenizer.is_hidden(i)]
    return start + written, [0] * len(start) + [1] * len(written)


def end_of_targets(mask: Sequence[int]) -> int:
    """One past the last target, 0 without any: the template's newline behind it is no target."""
    for end in range(len(mask), 0, -1):
        if mask[end - 1]:
            return end
    return 0
