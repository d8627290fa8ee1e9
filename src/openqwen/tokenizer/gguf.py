"""The tokenizer as the metadata of a GGUF file, as llama.cpp's converter writes it."""

from typing import Any

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.control import ControlToken
from openqwen.tokenizer.pretokenize import to_characters
from openqwen.tokenizer.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def gguf_metadata(tokenizer: Tokenizer, rows: int, eos_id: int) -> dict[str, Any]:
    """The `tokenizer.*` entries of a model with this many embedding rows that stops at `eos_id`.

    Every row has a token: those beyond the tokenizer's are padding that llama.cpp never chooses for a text.
    """
    if rows < tokenizer.vocab_size:
        raise OpenQwenError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the network only {rows} embedding rows.",
            do="take the tokenizer that belongs to these weights",
        )
    names = [to_characters(token) for token in tokenizer.vocabulary]
    padding = range(tokenizer.vocab_size, rows)
    kinds = [_NORMAL] * len(names) + [_kind(token) for token in tokenizer.control] + [_UNUSED] * len(padding)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": names + [t.content for t in tokenizer.control] + [f"[PAD{i}]" for i in padding],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [f"{names[left]} {names[right]}" for left, right in tokenizer.merges],
        "tokenizer.ggml.eos_token_id": eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.bos_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    return metadata | ({"tokenizer.chat_template": tokenizer.template} if tokenizer.template else {})


def _kind(token: ControlToken) -> int:
    """llama.cpp takes whatever looks like `<|this|>` for a control token, as its converter does."""
    looks_special = token.content.startswith("<|") and token.content.endswith("|>")
    return _CONTROL if token.special or looks_special else _USER_DEFINED
