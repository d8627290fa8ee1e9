"""The tokenizer as files: Hugging Face's layout, which transformers, vLLM and llama.cpp's converter read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json, write_text
from openqwen.tokenizer.control import DOCUMENT_END, TURN_END, TURN_START, ControlToken
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER, PATTERN, to_bytes, to_characters

Pair = tuple[int, int]

# Applied in this order: NFC, Qwen2's split, bytes as characters. The ByteLevel parts bring their own defaults, which
# Qwen2 does not use, hence the flags.
_NORMALIZER = {"type": "NFC"}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
        _BYTE_LEVEL,
    ],
}


def write_tokenizer(
    folder: Path,
    vocabulary: Sequence[bytes],
    merges: Sequence[Pair],
    control: Sequence[ControlToken],
    template: str | None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [to_characters(token) for token in vocabulary]
    ids = {name: i for i, name in enumerate(names)}
    pairs = [(names[left], names[right]) for left, right in merges]
    added = {len(names) + i: _added_token(token) for i, token in enumerate(control)}
    write_json(folder / "tokenizer.json", _tokenizer_json(ids, pairs, added))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(control, added, template))
    write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in pairs)]))


def _tokenizer_json(ids: dict[str, int], pairs: list[tuple[str, str]], added: dict[int, Any]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": pairs,
        },
    }


def _tokenizer_config(control: Sequence[ControlToken], added: dict[int, Any], template: str | None) -> dict[str, Any]:
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "additional_special_tokens": [t.content for t in control if t.special and t.content != DOCUMENT_END],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END if template else DOCUMENT_END,
        "errors": "replace",
        "pad_token": DOCUMENT_END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return config | ({"chat_template": template} if template else {})


def _added_token(token: ControlToken) -> dict[str, Any]:
    """Found in raw text, as it stands: no stripping, no normalising."""
    return {
        "content": token.content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token.special,
    }


class _Added(BaseModel):
    id: int
    content: str = Field(min_length=1)
    special: bool


class _Model(BaseModel):
    """Byte pairs, and none of the format's options that would change ids."""

    type: Literal["BPE"]
    dropout: None = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None
    ignore_merges: Literal[False] = False
    vocab: dict[str, int]
    merges: list[tuple[str, str] | str]


class _File(BaseModel):
    """The parts of tokenizer.json that decide ids."""

    added_tokens: list[_Added]
    normalizer: dict[str, Any]
    pre_tokenizer: dict[str, Any]
    model: _Model


def read_tokenizer(path: Path) -> tuple[list[bytes], list[Pair], list[ControlToken], str | None]:
    """(vocabulary, merges, control tokens, template) from a model's folder or a tokenizer.json.

    OpenQwenError where a file is missing or damaged, or where its rules are not Qwen2's.
    """
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        file = _File.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise OpenQwenError(
            f"This tokenizer is damaged or of another kind: {field}: {first['msg']}", where=path
        ) from None
    if file.normalizer != _NORMALIZER or _split_expression(file.pre_tokenizer) != PATTERN:
        raise OpenQwenError("This tokenizer cuts text by other rules than Qwen2's.", where=path, do="use a Qwen2 model")
    try:
        vocabulary, merges = _vocabulary(file.model)
        control = _control(file.added_tokens, len(vocabulary))
    except _DamagedError as error:
        raise OpenQwenError(f"This tokenizer is damaged: {error}", where=path) from None
    return vocabulary, merges, control, _read_template(path.parent)


class _DamagedError(Exception):
    """What is wrong inside a file; the reader adds which file."""


def _split_expression(pre_tokenizer: dict[str, Any]) -> str | None:
    try:
        return pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"]
    except (KeyError, IndexError, TypeError):
        return None


def _vocabulary(model: _Model) -> tuple[list[bytes], list[Pair]]:
    names = sorted(model.vocab, key=model.vocab.__getitem__)
    if [model.vocab[name] for name in names] != list(range(len(names))):
        raise _DamagedError("the ids of the vocabulary are not 0, 1, 2, ... without a gap")
    try:
        vocabulary = [to_bytes(name) for name in names]
    except KeyError as error:
        raise _DamagedError(f"the character {error} in the vocabulary stands for no byte") from None
    if missing := set(BYTES_IN_ID_ORDER) - set(vocabulary):
        raise _DamagedError(f"the vocabulary lacks {len(missing)} of the 256 bytes")
    merges = []
    for number, merge in enumerate(model.merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or any(part not in model.vocab for part in (*parts, "".join(parts))):
            raise _DamagedError(f"merge {number}, {merge!r}, does not make a token of two tokens of the vocabulary")
        merges.append((model.vocab[parts[0]], model.vocab[parts[1]]))
    return vocabulary, merges


def _control(added: list[_Added], first: int) -> list[ControlToken]:
    added = sorted(added, key=lambda token: token.id)
    if [token.id for token in added] != list(range(first, first + len(added))):
        raise _DamagedError(f"the ids of the control tokens do not follow the vocabulary's, from {first} on")
    contents = {token.content for token in added}
    if len(contents) != len(added):
        raise _DamagedError("a control token occurs twice")
    for name in (DOCUMENT_END, TURN_START, TURN_END):
        if name not in contents:
            raise _DamagedError(f"the control token {name} is missing")
    return [ControlToken(token.content, token.special) for token in added]


def _read_template(folder: Path) -> str | None:
    """chat_template.jinja, where newer checkpoints keep it, or the entry of tokenizer_config.json."""
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise OpenQwenError(f"This chat template is not UTF-8: {error}", where=jinja) from None
    entries = read_json(config) if config.exists() else {}
    template = entries.get("chat_template") if isinstance(entries, dict) else None
    if template is not None and not isinstance(template, str):
        raise OpenQwenError("This file's chat_template is not text.", where=config)
    return template
