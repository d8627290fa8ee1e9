"""The tokenizer as the metadata of a GGUF file, as llama.cpp's converter writes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.control import ControlToken
from openqwen.tokenizer.pretokenize import to_characters
from openqwen.tokenizer.sources import TOKENS_BY_NAME
from openqwen.tokenizer.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def gguf_metadata(tokenizer: Tokenizer, rows: int, eos_id: int) -> dict[str, Any]:
    """The `tokenizer.*` entries of a model with this many embedding rows that stops at `eos_id`.

    Every row has a token: those beyond the tokenizer's are padding that llama.cpp never chooses for
    a text.
    """
    if rows < tokenizer.vocab_size:
        raise OpenQwenError(
            (
                f"The tokenizer has {tokenizer.vocab_size} tokens, the network only {rows} "
                "embedding rows."
            ),
            do="take the tokenizer that belongs to these weights",
        )
    names = [to_characters(token) for token in tokenizer.vocabulary]
    ids = tokenizer.control_ids
    padding = range(tokenizer.vocab_size, rows)
    kinds = np.full(rows, _NORMAL, np.int32)
    kinds[tokenizer.vocab_size :] = _UNUSED
    for token in tokenizer.control:
        kinds[ids[token.content]] = _kind(token)
    added = [content for content, i in ids.items() if i >= len(names)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": names + added + [f"[PAD{i}]" for i in padding],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [
            f"{names[left]} {names[right]}" for left, right in tokenizer.merges
        ],
        "tokenizer.ggml.padding_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.bos_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    special = tokenizer.special_tokens
    named = {key: special.get(name) for name, key in TOKENS_BY_NAME.items()}
    metadata |= {key: ids[token] for key, token in named.items() if token in ids}
    return metadata | {"tokenizer.ggml.eos_token_id": eos_id} | _templates(tokenizer.template)


def _templates(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """The default under its own key, the others by name, as llama.cpp's converter writes them."""
    named = {"default": template} if isinstance(template, str) else dict(template or {})
    default = named.pop("default", None)
    metadata: dict[str, Any] = {}
    for name, text in named.items():
        metadata[f"tokenizer.chat_template.{name}"] = text
    metadata |= {"tokenizer.chat_templates": list(named)} if named else {}
    return metadata | ({} if default is None else {"tokenizer.chat_template": default})


def _kind(token: ControlToken) -> int:
    """llama.cpp takes whatever looks like `<|this|>` for a control token, as its converter does."""
    looks_special = token.content.startswith("<|") and token.content.endswith("|>")
    return _CONTROL if token.special or looks_special else _USER_DEFINED
