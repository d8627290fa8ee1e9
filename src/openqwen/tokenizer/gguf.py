"""The tokenizer in the metadata of a GGUF file, as llama.cpp's converter writes it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.control import CONTROL_TOKENS, DOCUMENT_END, ControlToken
from openqwen.tokenizer.files import (
    AddedToken,
    DamagedError,
    Parts,
    checked_control,
    checked_vocabulary,
    naming,
    without_added,
)
from openqwen.tokenizer.pretokenize import to_characters

if TYPE_CHECKING:
    from openqwen.tokenizer.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type
_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
_PADDING_ROW = re.compile(r"\[PAD\d+\]")


def parts_from_gguf(metadata: Mapping[str, Any], where: str | Path) -> Parts:
    """The tokenizer in the metadata of a GGUF file.

    GGUF names a token for every row of the embedding; padding rows are left out. It calls Qwen2.5's
    code tokens control tokens, which decoding would hide: for a known token, the published files
    decide whether decoding shows it.
    """
    kind = metadata.get("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "qwen2")
    if kind != "gpt2" or split != "qwen2":
        what = f"This tokenizer is of another kind: {kind}, {split}."
        raise OpenQwenError(what, where, "use a Qwen2 model")
    with naming(where):
        tokens, types = _list(metadata, "tokens"), _list(metadata, "token_type")
        if len(tokens) != len(types):
            raise DamagedError(f"it has {len(tokens)} tokens and {len(types)} token types")
        published = {token.content: token.special for token in CONTROL_TOKENS}
        added: list[AddedToken] = []
        ids: dict[str, int] = {}
        for i, (token, kind) in enumerate(zip(tokens, types)):
            if kind in (_CONTROL, _USER_DEFINED) and not _PADDING_ROW.fullmatch(token):
                special = published.get(token, kind == _CONTROL)
                added.append(AddedToken(id=i, content=token, special=special, normalized=False))
            elif kind == _NORMAL:
                ids[token] = i
        ids |= {token.content: token.id for token in added}
        merges = _list(metadata, "merges")
        vocabulary, pairs = checked_vocabulary(without_added(ids, added, merges), merges)
        control = checked_control(added, vocabulary)
        keys = {name: key for name, key in _KEYS.items() if key in metadata}
        settings = {name: _token(tokens, metadata[key]) for name, key in keys.items()}
        # Converters take this from Qwen's config.json; the tokenizer has none.
        if settings.get("bos_token") == DOCUMENT_END:
            del settings["bos_token"]
    return Parts(vocabulary, pairs, control, _read_templates(metadata), settings)


def _read_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The default template; if llama.cpp's converter wrote several, all of them by name."""
    names = metadata.get("tokenizer.chat_templates") or ()
    named = {name: metadata[f"tokenizer.chat_template.{name}"] for name in names}
    default = metadata.get("tokenizer.chat_template")
    return named | ({} if default is None else {"default": default}) if named else default


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise DamagedError(f"tokenizer.ggml.{name} is missing")
    return list(value)


def _token(tokens: list[str], i: int) -> str:
    if not 0 <= i < len(tokens):
        raise DamagedError(f"its end or padding token is {i}, beyond the {len(tokens)} tokens")
    return tokens[i]


def gguf_metadata(tokenizer: "Tokenizer", rows: int, eos_id: int) -> dict[str, Any]:
    """The `tokenizer.*` entries of a model with this many embedding rows that stops at `eos_id`.

    Every row gets a token: those beyond the tokenizer's are padding, which llama.cpp never chooses
    for a text.
    """
    size = tokenizer.vocab_size
    if rows < size:
        what = f"The tokenizer has {size} tokens, the network only {rows} embedding rows."
        raise OpenQwenError(what, do="take the tokenizer that belongs to these weights")
    names = [to_characters(token) for token in tokenizer.vocabulary]
    ids = tokenizer.control_ids
    kinds = np.full(rows, _NORMAL, np.int32)
    kinds[size:] = _UNUSED
    for token in tokenizer.control:
        kinds[ids[token.content]] = _kind(token)
    added = [content for content, i in ids.items() if i >= len(names)]
    padding = [f"[PAD{i}]" for i in range(size, rows)]
    merges = [f"{names[left]} {names[right]}" for left, right in tokenizer.merges]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": names + added + padding,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.padding_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.bos_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    special = tokenizer.special_tokens
    named = {key: special.get(name) for name, key in _KEYS.items()}
    metadata |= {key: ids[token] for key, token in named.items() if token in ids}
    metadata["tokenizer.ggml.eos_token_id"] = eos_id
    return metadata | _template_entries(tokenizer.template)


def _template_entries(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """The default template under its own key, the others by name."""
    named = {"default": template} if isinstance(template, str) else dict(template or {})
    default = named.pop("default", None)
    metadata: dict[str, Any] = {}
    for name, text in named.items():
        metadata[f"tokenizer.chat_template.{name}"] = text
    metadata |= {"tokenizer.chat_templates": list(named)} if named else {}
    return metadata | ({} if default is None else {"tokenizer.chat_template": default})


def _kind(token: ControlToken) -> int:
    """The token type; llama.cpp's converter takes all that looks like `<|this|>` for control."""
    looks_special = token.content.startswith("<|") and token.content.endswith("|>")
    return _CONTROL if token.special or looks_special else _USER_DEFINED
