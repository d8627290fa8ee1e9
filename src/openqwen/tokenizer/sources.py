"""Where a tokenizer may come from: a model's folder, or one file of any of the kinds that Qwen
models come in.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import find_gguf, read_first_header
from openqwen.tokenizer.bpe import BytePairEncoder
from openqwen.tokenizer.control import CONTROL_TOKENS, DOCUMENT_END, QWEN2_CONTROL_TOKENS
from openqwen.tokenizer.files import (
    AddedToken,
    DamagedError,
    Pair,
    Parts,
    checked_control,
    checked_vocabulary,
    naming,
    read_added_tokens,
    read_lines,
    read_tokenizer_json,
    read_vocabulary_and_merges,
    with_settings,
    without_added,
)
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER

# GGUF's token types (llama.cpp, llama_token_type).
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
TOKENS_BY_NAME = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
_PADDING_ROW = re.compile(r"\[PAD\d+\]")
_KINDS = "tokenizer.json, vocab.json with merges.txt, or one .tiktoken or .gguf file"


def read_source(path: Path) -> Parts:
    """The tokenizer in a model's folder or in one file of it.

    OpenQwenError says what is missing or damaged.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise OpenQwenError(
            "There is no tokenizer: this path is missing.", where=path, do="check the path"
        )
    if find_gguf(path):
        return parts_from_gguf(read_first_header(path).metadata, path)
    if path.suffix == ".tiktoken":
        return read_tiktoken(path)
    if path.name in ("vocab.json", "merges.txt"):
        return read_vocabulary_and_merges(path.parent)
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    raise OpenQwenError(
        "This is no tokenizer file.", where=path, do=f"give a model's folder, {_KINDS}"
    )


def _in_folder(folder: Path) -> Path:
    """The file that holds the tokenizer, the most complete kind first."""
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.tiktoken"))
    if len(found) > 1:
        what = f"This folder holds {len(found)} *.tiktoken files."
        raise OpenQwenError(what, where=folder, do="name one of them")
    if file := next(iter(found), None) or find_gguf(folder):
        return file
    raise OpenQwenError(
        "There is no tokenizer in this folder.", where=folder, do=f"it needs {_KINDS}"
    )


def read_tiktoken(path: Path) -> Parts:
    """Qwen1's form: a line a token, its bytes in base64 and its rank, which is its id.

    The file has neither control tokens nor template: both come from the files beside it, else
    Qwen2's three and none.
    """
    vocabulary: list[bytes] = []
    with naming(path):
        for number, line in enumerate(filter(None, read_lines(path)), 1):
            try:
                encoded, rank = line.split()
                vocabulary.append(base64.b64decode(encoded, validate=True))
            except (ValueError, binascii.Error):
                raise DamagedError(f"line {number} is not base64 and a number") from None
            if rank != str(number - 1):
                raise DamagedError(f"line {number} has rank {rank}, not {number - 1}")
        if len(set(vocabulary)) != len(vocabulary) or not all(vocabulary):
            raise DamagedError("a token is empty or occurs twice")
        if missing := set(BYTES_IN_ID_ORDER) - set(vocabulary):
            raise DamagedError(f"the vocabulary lacks {len(missing)} of the 256 bytes")
        merges = merges_of_ranks(vocabulary)
    listed = read_added_tokens(path.parent)
    with naming(path.parent / "tokenizer_config.json"):
        control = QWEN2_CONTROL_TOKENS if listed is None else checked_control(listed, vocabulary)
    return with_settings(vocabulary, merges, control, path.parent)


def merges_of_ranks(vocabulary: list[bytes]) -> list[Pair]:
    """The merges behind a vocabulary that is in the order of training.

    The merge that made a token joined the two pieces into which the merges before it cut that
    token.
    """
    encoder = BytePairEncoder(vocabulary, [])
    merges = []
    for i, token in enumerate(vocabulary):
        if len(token) == 1:
            continue
        pieces = encoder.merge(token)
        if len(pieces) != 2:
            raise DamagedError(f"token {i}, {token!r}, is not two earlier tokens merged")
        merges.append((pieces[0], pieces[1]))
        encoder.add(pieces[0], pieces[1], i)
    return merges


def parts_from_gguf(metadata: Mapping[str, Any], where: str | Path) -> Parts:
    """The tokenizer in the metadata of a GGUF file.

    GGUF names a token for every row of the embedding; padding rows are no tokens. It calls
    Qwen2.5's code tokens control tokens, which decoding would hide: of a known token, the published
    files decide whether it shows.
    """
    with naming(where):
        kind, split = (
            metadata.get("tokenizer.ggml.model"),
            metadata.get("tokenizer.ggml.pre", "qwen2"),
        )
        if kind != "gpt2" or split != "qwen2":
            raise OpenQwenError(
                f"This tokenizer is of another kind: {kind}, {split}.",
                where=where,
                do="use a Qwen2 model",
            )
        tokens, types = _list(metadata, "tokens"), _list(metadata, "token_type")
        if len(tokens) != len(types):
            raise DamagedError(f"it has {len(tokens)} tokens and {len(types)} token types")
        special = {token.content: token.special for token in CONTROL_TOKENS}
        added = [
            AddedToken(
                id=i, content=token, special=special.get(token, kind == _CONTROL), normalized=False
            )
            for i, (token, kind) in enumerate(zip(tokens, types))
            if kind in (_CONTROL, _USER_DEFINED) and not _PADDING_ROW.fullmatch(token)
        ]
        names = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == _NORMAL}
        names |= {token.content: token.id for token in added}
        merges = _list(metadata, "merges")
        vocabulary, pairs = checked_vocabulary(without_added(names, added, merges), merges)
        control = checked_control(added, vocabulary)
        settings = {
            name: _token(tokens, metadata[key])
            for name, key in TOKENS_BY_NAME.items()
            if key in metadata
        }
        if settings.get("bos_token") == DOCUMENT_END:  # converters take it from Qwen's config.json;
            del settings["bos_token"]  # the tokenizer has none
    return Parts(vocabulary, pairs, control, _templates(metadata), settings)


def _templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The default template, and those by name where llama.cpp's converter found several."""
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
