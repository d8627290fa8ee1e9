"""What a vocabulary does to text: how much a token holds, and what the tokens look like."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from openqwen.tokenizer.tokenizer import Tokenizer

_LONGEST = 24  # tokens shown
_EXAMPLE = 160  # characters of each source's example
_SAMPLE = 200  # texts of each source that are encoded


def tokenizer_statistics(
    tokenizer: Tokenizer, sources: Mapping[str, Iterable[str]], training_bytes: int
) -> dict[str, Any]:
    """The payload of statistics.json.

    sources: texts by source, best the held-out ones; the first 200 of each are looked at.
    training_bytes: how much text the vocabulary was learned from.
    """
    bytes_per_token: dict[str, float] = {}
    examples: list[dict[str, Any]] = []
    for source, texts in sorted(sources.items()):
        sample = list(islice(texts, _SAMPLE))
        tokens = sum(len(tokenizer.encode(text)) for text in sample)
        if tokens:
            bytes_per_token[source] = (
                sum(len(text.encode(errors="replace")) for text in sample) / tokens
            )
            text = next(text for text in sample if text)[:_EXAMPLE]
            examples.append(
                {"text": text, "tokens": [_show(tokenizer, i) for i in tokenizer.encode(text)]}
            )
    longest = sorted(
        range(len(tokenizer.vocabulary)), key=lambda i: (-len(tokenizer.vocabulary[i]), i)
    )[:_LONGEST]
    return {
        "vocabulary": tokenizer.vocab_size,
        "merges": len(tokenizer.merges),
        "bytes_per_token": bytes_per_token,
        "longest": [_show(tokenizer, i) for i in longest],
        "examples": examples,
        "training_bytes": training_bytes,
    }


def _show(tokenizer: Tokenizer, i: int) -> str:
    return tokenizer.decode([i], skip_control=False)
