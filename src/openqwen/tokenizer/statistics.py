"""How well a vocabulary compresses text, and examples of its tokens."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from openqwen.tokenizer.tokenizer import Tokenizer

_LONGEST = 24  # how many of the longest tokens are shown
_EXAMPLE = 160  # characters of each source's example
_SAMPLE = 200  # texts of each source that are encoded


def tokenizer_statistics(
    tokenizer: Tokenizer, sources: Mapping[str, Iterable[str]], training_bytes: int
) -> dict[str, Any]:
    """The content of statistics.json.

    sources: held-out texts by source; the first 200 of each are encoded. training_bytes: how much
    text the vocabulary was trained on.
    """
    bytes_per_token: dict[str, float] = {}
    examples: list[dict[str, Any]] = []
    for source, texts in sorted(sources.items()):
        sample = list(islice(texts, _SAMPLE))
        tokens = sum(len(tokenizer.encode(text)) for text in sample)
        if not tokens:
            continue
        size = sum(len(text.encode(errors="replace")) for text in sample)
        bytes_per_token[source] = size / tokens
        text = next(text for text in sample if text)[:_EXAMPLE]
        shown = [_show(tokenizer, i) for i in tokenizer.encode(text)]
        examples.append({"text": text, "tokens": shown})
    lengths = [len(token) for token in tokenizer.vocabulary]
    longest = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[:_LONGEST]
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
