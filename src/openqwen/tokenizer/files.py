"""The tokenizer as files: Hugging Face's layout, which transformers, vLLM and llama.cpp's converter read."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, refuse_pointer, write_json, write_text
from openqwen.tokenizer.control import DOCUMENT_END, QWEN2_CONTROL_TOKENS, TURN_END, TURN_START, ControlToken
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER, PATTERN, to_bytes, to_characters

Pair = tuple[int, int]
TEMPLATE_FILE = "chat_template.jinja"

# What is the same in every Qwen2 tokenizer's files. Text goes through NFC, Qwen2's split and bytes as characters; the
# ByteLevel parts bring their own defaults, which Qwen2 does not use, hence the flags. An added token is found in raw
# text, as it stands: no stripping, no normalising.
_LAYOUT: dict[str, Any] = json.loads((Path(__file__).parent / "layout.json").read_text(encoding="utf-8"))
_LAYOUT["tokenizer"]["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN


class Parts(NamedTuple):
    """What a tokenizer is made of, whatever kind of file it came from.

    vocabulary: the bytes of each regular token, by id. merges: pairs of ids, best rank first. control: their ids
    follow the regular ones. template: Jinja source. settings: entries of tokenizer_config.json that the other fields
    do not decide (eos_token, model_max_length ...). template_apart: it lies in chat_template.jinja.
    """

    vocabulary: list[bytes]
    merges: list[Pair]
    control: tuple[ControlToken, ...]
    template: str | None = None
    settings: Mapping[str, Any] = {}
    template_apart: bool = False


def write_tokenizer(folder: Path, parts: Parts) -> None:
    """Write the files into `folder`: tokenizer.json, tokenizer_config.json, vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [to_characters(token) for token in parts.vocabulary]
    ids = {name: i for i, name in enumerate(names)}
    pairs = [(names[left], names[right]) for left, right in parts.merges]
    write_json(folder / "tokenizer.json", _tokenizer_json(ids, pairs, _added(parts)))
    write_json(folder / "tokenizer_config.json", tokenizer_config(parts))
    write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in pairs)]))
    if parts.template is not None and parts.template_apart:
        write_text(folder / TEMPLATE_FILE, parts.template)
    else:  # one left by an earlier save would win over tokenizer_config.json
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)


def _tokenizer_json(ids: dict[str, int], pairs: list[tuple[str, str]], added: dict[int, Any]) -> dict[str, Any]:
    layout = _LAYOUT["tokenizer"]
    tokens = [{"id": i, **token} for i, token in added.items()]
    return layout | {"added_tokens": tokens, "model": layout["model"] | {"vocab": ids, "merges": pairs}}


def _added(parts: Parts) -> dict[int, Any]:
    first = len(parts.vocabulary)
    return {first + i: _LAYOUT["added_token"] | asdict(token) for i, token in enumerate(parts.control)}


def tokenizer_config(parts: Parts) -> dict[str, Any]:
    """What tokenizer_config.json holds."""
    hidden = [token.content for token in parts.control if token.special and token.content != DOCUMENT_END]
    defaults = _LAYOUT["tokenizer_config"] | {
        "additional_special_tokens": hidden,
        "eos_token": TURN_END if parts.template else DOCUMENT_END,
        "pad_token": DOCUMENT_END,
    }
    if "extra_special_tokens" in parts.settings:  # the newer name: both in one file would contradict each other
        del defaults["additional_special_tokens"]
    config = (
        defaults
        | dict(parts.settings)
        | {"added_tokens_decoder": {str(i): token for i, token in _added(parts).items()}}
    )
    if parts.template is not None and not parts.template_apart:
        config["chat_template"] = parts.template
    return dict(sorted(config.items()))


class AddedToken(BaseModel):
    """A control token as the files list it."""

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

    added_tokens: list[AddedToken]
    normalizer: dict[str, Any]
    pre_tokenizer: dict[str, Any]
    model: _Model


def read_tokenizer_json(path: Path) -> Parts:
    """A tokenizer.json, with what the files beside it say of the template and the settings.

    OpenQwenError where a file is missing or damaged, or where its rules are not Qwen2's.
    """
    try:
        file = _File.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise OpenQwenError(f"This tokenizer is damaged or of another kind: {name}: {first['msg']}", path) from None
    if file.normalizer != _LAYOUT["tokenizer"]["normalizer"] or _split_expression(file.pre_tokenizer) != PATTERN:
        raise OpenQwenError("This tokenizer cuts text by other rules than Qwen2's.", path, do="use a Qwen2 model")
    with naming(path):
        vocabulary, merges = checked_vocabulary(file.model.vocab, file.model.merges)
        control = checked_control(file.added_tokens, len(vocabulary))
    return Parts(vocabulary, merges, control, *read_settings(path.parent))


def read_vocabulary_and_merges(folder: Path) -> Parts:
    """vocab.json and merges.txt; the control tokens are those of tokenizer_config.json, else Qwen2's three."""
    vocab, lines = read_json(folder / "vocab.json"), read_lines(folder / "merges.txt")
    with naming(folder / "vocab.json"):
        if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
            raise DamagedError("it does not map tokens to ids")
        listed = read_added_tokens(folder)
        regular = {name: i for name, i in vocab.items() if i not in {token.id for token in listed or ()}}
    with naming(folder / "merges.txt"):
        merges: list[tuple[str, str] | str] = [line for line in lines if line and not line.startswith("#version")]
        vocabulary, pairs = checked_vocabulary(regular, merges)
    with naming(folder / "tokenizer_config.json"):
        control = QWEN2_CONTROL_TOKENS if listed is None else checked_control(listed, len(vocabulary))
    return Parts(vocabulary, pairs, control, *read_settings(folder))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, cut at newlines alone: str.splitlines() would also cut inside a token."""
    try:
        refuse_pointer(path)
        return path.read_bytes().decode().split("\n")
    except FileNotFoundError:
        raise OpenQwenError("A file is missing.", where=path, do="check the path") from None
    except UnicodeDecodeError as error:
        raise OpenQwenError(f"This file is not UTF-8: {error}", where=path) from None


class DamagedError(Exception):
    """What is wrong inside a file; `naming` adds which file."""


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Turns a DamagedError of the block into an OpenQwenError that names the file."""
    try:
        yield
    except DamagedError as error:
        raise OpenQwenError(f"This tokenizer is damaged: {error}", where=where) from None


def _split_expression(pre_tokenizer: dict[str, Any]) -> str | None:
    try:
        return pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"]
    except (KeyError, IndexError, TypeError):
        return None


def checked_vocabulary(vocab: Mapping[str, int], pairs: Iterable[Sequence[str]]) -> tuple[list[bytes], list[Pair]]:
    """(vocabulary, merges) from names of tokens in byte characters; a pair may be one string with a space inside."""
    names = sorted(vocab, key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        raise DamagedError("the ids of the vocabulary are not 0, 1, 2, ... without a gap")
    try:
        vocabulary = [to_bytes(name) for name in names]
    except KeyError as error:
        raise DamagedError(f"the character {error} in the vocabulary stands for no byte") from None
    if missing := set(BYTES_IN_ID_ORDER) - set(vocabulary):
        raise DamagedError(f"the vocabulary lacks {len(missing)} of the 256 bytes")
    if b"" in vocabulary:
        raise DamagedError("a token of the vocabulary is empty")
    merges = []
    for number, merge in enumerate(pairs):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or parts[0] not in vocab or parts[1] not in vocab or parts[0] + parts[1] not in vocab:
            raise DamagedError(f"merge {number}, {merge!r}, does not make a token of two tokens of the vocabulary")
        merges.append((vocab[parts[0]], vocab[parts[1]]))
    return vocabulary, merges


def checked_control(added: Sequence[AddedToken], first: int) -> tuple[ControlToken, ...]:
    """The control tokens in the order of their ids, which must be `first`, `first` + 1 and so on."""
    added = sorted(added, key=lambda token: token.id)
    if [token.id for token in added] != list(range(first, first + len(added))):
        raise DamagedError(f"the ids of the control tokens do not follow the vocabulary's, from {first} on")
    contents = {token.content for token in added}
    if len(contents) != len(added):
        raise DamagedError("a control token occurs twice")
    for name in (DOCUMENT_END, TURN_START, TURN_END):
        if name not in contents:
            raise DamagedError(f"the control token {name} is missing")
    return tuple(ControlToken(token.content, token.special) for token in added)


def read_added_tokens(folder: Path) -> list[AddedToken] | None:
    """The control tokens that tokenizer_config.json lists; None where it lists none or is not there."""
    listed = _read_config(folder).get("added_tokens_decoder")
    if listed is None:
        return None
    path = folder / "tokenizer_config.json"
    try:
        return [AddedToken.model_validate({"id": int(i), **token}) for i, token in listed.items()]
    except (ValidationError, ValueError, TypeError, AttributeError):
        raise OpenQwenError("This file's added_tokens_decoder does not map ids to tokens.", where=path) from None


def read_settings(folder: Path) -> tuple[str | None, dict[str, Any], bool]:
    """(template, the entries of tokenizer_config.json that are kept, whether the template lies in its own file)."""
    jinja, config = folder / TEMPLATE_FILE, _read_config(folder)
    template = config.pop("chat_template", None)
    config.pop("added_tokens_decoder", None)
    if jinja.exists():
        try:
            return jinja.read_bytes().decode(), config, True
        except UnicodeDecodeError as error:
            raise OpenQwenError(f"This chat template is not UTF-8: {error}", where=jinja) from None
    if template is not None and not isinstance(template, str):
        raise OpenQwenError("This file's chat_template is not text.", where=folder / "tokenizer_config.json")
    return template, config, False


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise OpenQwenError("This file is JSON but not an object.", where=path)
    return config
