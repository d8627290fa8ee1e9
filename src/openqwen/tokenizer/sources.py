"""Reads a tokenizer from a model's folder, or from one file of any kind that Qwen models have."""

import base64
import binascii
from pathlib import Path

from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import find_gguf, read_first_header
from openqwen.tokenizer.bpe import BytePairEncoder
from openqwen.tokenizer.files import (
    DamagedError,
    Pair,
    Parts,
    check_bytes,
    listed_control,
    naming,
    read_added_tokens,
    read_lines,
    read_tokenizer_json,
    read_vocabulary_and_merges,
    with_settings,
)
from openqwen.tokenizer.gguf import parts_from_gguf

_KINDS = "tokenizer.json, vocab.json with merges.txt, or one .tiktoken or .gguf file"


def read_source(path: Path) -> Parts:
    """The tokenizer in a model's folder or in one of its files.

    Raises OpenQwenError, which says what is missing or damaged.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise OpenQwenError("There is no tokenizer: this path is missing.", path, "check the path")
    if find_gguf(path):
        return parts_from_gguf(read_first_header(path).metadata, path)
    if path.suffix == ".tiktoken":
        return read_tiktoken(path)
    if path.name in ("vocab.json", "merges.txt"):
        return read_vocabulary_and_merges(path.parent)
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    raise OpenQwenError("This is no tokenizer file.", path, f"give a model's folder, {_KINDS}")


def _in_folder(folder: Path) -> Path:
    """The file that holds the tokenizer, the most complete kind first."""
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.tiktoken"))
    if len(files) > 1:
        what = f"This folder holds {len(files)} *.tiktoken files."
        raise OpenQwenError(what, folder, "name one of them")
    if file := next(iter(files), None) or find_gguf(folder):
        return file
    raise OpenQwenError("There is no tokenizer in this folder.", folder, f"it needs {_KINDS}")


def read_tiktoken(path: Path) -> Parts:
    """Qwen1's form: one token a line, its bytes in base64 and its rank, which is its id.

    The file has no control tokens and no template: they come from the files beside it. Without
    those, there are Qwen2's three control tokens and no template.
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
        check_bytes(vocabulary)
        merges = merges_of_ranks(vocabulary)
    control = listed_control(read_added_tokens(path.parent), vocabulary, path.parent)
    return with_settings(vocabulary, merges, control, path.parent)


def merges_of_ranks(vocabulary: list[bytes]) -> list[Pair]:
    """The merges behind a vocabulary that is in the order of training.

    Encoding a token with all earlier merges leaves two pieces: the merge that made it joined them.
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
