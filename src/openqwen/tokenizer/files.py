"""The tokenizer as files: Hugging Face's layout, which transformers, vLLM and llama.cpp's converter
read.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, refuse_pointer, write_json, write_text
from openqwen.tokenizer.control import (
    DOCUMENT_END,
    QWEN2_CONTROL_TOKENS,
    TURN_END,
    TURN_START,
    ControlToken,
)
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER, PATTERN, to_bytes, to_characters

Pair = tuple[int, int]
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # those that are not the default, by name
_FILE_NAME = re.compile(r"[^/\\]+")
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")

# What is the same in every Qwen2 tokenizer's files. Text goes through NFC, Qwen2's split and bytes
# as characters; the ByteLevel parts bring their own defaults, which Qwen2 does not use, hence the
# flags.
_LAYOUT: dict[str, Any] = json.loads(
    (Path(__file__).parent / "layout.json").read_text(encoding="utf-8")
)
_LAYOUT["tokenizer"]["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN


class Parts(NamedTuple):
    """What a tokenizer is made of, whatever kind of file it came from.

    vocabulary: the bytes of each regular token, by id. merges: pairs of ids, best rank first.
    control: the added tokens, in the order of their ids (`added_ids`). template: Jinja source, or
    several by name. settings: entries of tokenizer_config.json that the other fields do not decide
    (eos_token, model_max_length ...). template_apart: the templates lie in files of their own.
    """

    vocabulary: list[bytes]
    merges: list[Pair]
    control: tuple[ControlToken, ...]
    template: str | Mapping[str, str] | None = None
    settings: Mapping[str, Any] = {}
    template_apart: bool = False


def write_tokenizer(folder: Path, parts: Parts) -> None:
    """Write the files into `folder`: tokenizer.json, tokenizer_config.json, vocab.json and
    merges.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [to_characters(token) for token in parts.vocabulary]
    ids = {name: i for i, name in enumerate(names)}
    pairs = [(names[left], names[right]) for left, right in parts.merges]
    write_json(folder / "tokenizer.json", _tokenizer_json(ids, pairs, _added(parts)))
    write_json(folder / "tokenizer_config.json", tokenizer_config(parts))
    write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False) + "\n")
    write_text(
        folder / "merges.txt",
        "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in pairs)]),
    )
    apart = _by_name(parts.template) if parts.template_apart else {}
    for path in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
        path.unlink(missing_ok=True)  # an earlier save's would win over tokenizer_config.json
    for name, template in apart.items():
        if name == "default":
            write_text(folder / TEMPLATE_FILE, template)
        else:
            (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            write_text(folder / TEMPLATE_FOLDER / f"{name}.jinja", template)


def _by_name(template: str | Mapping[str, str] | None) -> Mapping[str, str]:
    return {"default": template} if isinstance(template, str) else template or {}


def _tokenizer_json(
    ids: dict[str, int], pairs: list[tuple[str, str]], added: dict[int, Any]
) -> dict[str, Any]:
    layout = _LAYOUT["tokenizer"]
    tokens = [{"id": i, **token} for i, token in added.items()]
    return layout | {
        "added_tokens": tokens,
        "model": layout["model"] | {"vocab": ids, "merges": pairs},
    }


def _added(parts: Parts) -> dict[int, Any]:
    places = added_ids(parts.vocabulary, [token.content for token in parts.control])
    layout = _LAYOUT["added_token"]
    added = {places[token.content]: layout | asdict(token) for token in parts.control}
    return dict(sorted(added.items()))


def tokenizer_config(parts: Parts) -> dict[str, Any]:
    """What tokenizer_config.json holds."""
    config = tokenizer_settings(parts)
    config["added_tokens_decoder"] = {str(i): token for i, token in _added(parts).items()}
    template = parts.template
    if template is not None and not parts.template_apart:
        several = [{"name": name, "template": text} for name, text in _by_name(template).items()]
        config["chat_template"] = template if isinstance(template, str) else several
    return dict(sorted(config.items()))


def tokenizer_settings(parts: Parts) -> dict[str, Any]:
    """The entries of tokenizer_config.json that `parts.settings` give or leave to Qwen2's own."""
    hidden = [
        token.content for token in parts.control if token.special and token.content != DOCUMENT_END
    ]
    defaults = _LAYOUT["tokenizer_config"] | {
        "additional_special_tokens": hidden,
        "eos_token": TURN_END if parts.template else DOCUMENT_END,
        "pad_token": DOCUMENT_END,
    }
    if (
        "extra_special_tokens" in parts.settings
    ):  # the newer name: both in one file would contradict each other
        del defaults["additional_special_tokens"]
    return defaults | dict(parts.settings)


def named_special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens with a name (`eos_token` ...), as transformers gives them to templates."""
    extra = settings.get("extra_special_tokens")
    entries: dict[str, Any] = dict.fromkeys(_NAMES)  # the order in which transformers adds them
    entries |= {key: value for key, value in settings.items() if key.endswith("_token")}
    entries |= extra if isinstance(extra, dict) else {}
    texts = zip(entries, _contents(entries.values()))
    return {name: text for name, text in texts if isinstance(text, str)}


def _contents(tokens: Iterable[Any]) -> list[Any]:
    return [token.get("content") if isinstance(token, dict) else token for token in tokens]


def added_ids(vocabulary: Sequence[bytes], contents: Iterable[str]) -> dict[str, int]:
    """The id of each added token: the vocabulary's where its name is there, else the next free
    one.
    """
    names = {to_characters(token): i for i, token in enumerate(vocabulary)}
    free = count(len(vocabulary))
    return {content: names[content] if content in names else next(free) for content in contents}


class AddedToken(BaseModel):
    """An added token as the files list it; what they leave out is as in `tokenizers`."""

    id: int
    content: str = Field(min_length=1)
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None

    @property
    def token(self) -> ControlToken:
        """Without its id."""
        normalized = not self.special if self.normalized is None else self.normalized
        return ControlToken(**self.model_dump(exclude={"id"}) | {"normalized": normalized})


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
        raise OpenQwenError(
            f"This tokenizer is damaged or of another kind: {name}: {first['msg']}", path
        ) from None
    if (
        file.normalizer != _LAYOUT["tokenizer"]["normalizer"]
        or _split_expression(file.pre_tokenizer) != PATTERN
    ):
        raise OpenQwenError(
            "This tokenizer cuts text by other rules than Qwen2's.", path, do="use a Qwen2 model"
        )
    with naming(path):
        vocab = without_added(file.model.vocab, file.added_tokens, file.model.merges)
        vocabulary, merges = checked_vocabulary(vocab, file.model.merges)
        control = checked_control(file.added_tokens, vocabulary)
    return with_settings(vocabulary, merges, control, path.parent)


def read_vocabulary_and_merges(folder: Path) -> Parts:
    """vocab.json and merges.txt; the control tokens are those of tokenizer_config.json, else
    Qwen2's three.
    """
    vocab, lines = read_json(folder / "vocab.json"), read_lines(folder / "merges.txt")
    with naming(folder / "vocab.json"):
        if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
            raise DamagedError("it does not map tokens to ids")
        listed = read_added_tokens(folder)
        merges: list[tuple[str, str] | str] = [
            line for line in lines if line and not line.startswith("#version")
        ]
        regular = without_added(vocab, listed or (), merges)
    with naming(folder / "merges.txt"):
        vocabulary, pairs = checked_vocabulary(regular, merges)
    with naming(folder / "tokenizer_config.json"):
        control = QWEN2_CONTROL_TOKENS if listed is None else checked_control(listed, vocabulary)
    return with_settings(vocabulary, pairs, control, folder)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, cut at newlines alone: str.splitlines() would also cut inside a
    token.
    """
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


def checked_vocabulary(
    vocab: Mapping[str, int], pairs: Iterable[Sequence[str]]
) -> tuple[list[bytes], list[Pair]]:
    """(vocabulary, merges) from names of tokens in byte characters; a pair may be one string with a
    space inside.
    """
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
        if (
            len(parts) != 2
            or parts[0] not in vocab
            or parts[1] not in vocab
            or parts[0] + parts[1] not in vocab
        ):
            raise DamagedError(
                f"merge {number}, {merge!r}, does not make a token of two tokens of the vocabulary"
            )
        merges.append((vocab[parts[0]], vocab[parts[1]]))
    return vocabulary, merges


def without_added(
    vocab: Mapping[str, int], added: Iterable[AddedToken], merges: Iterable[Sequence[str]]
) -> dict[str, int]:
    """`vocab` without the added tokens that some files list there too: no merge makes them."""
    made = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges}
    gone = {token.content for token in added if len(token.content) > 1} - made
    return {name: i for name, i in vocab.items() if name not in gone}


def checked_control(
    added: Sequence[AddedToken],
    vocabulary: Sequence[bytes],
) -> tuple[ControlToken, ...]:
    """The added tokens in the order of their ids, which must be those of `added_ids`."""
    added = sorted(added, key=lambda token: token.id)
    contents = [token.content for token in added]
    if len(set(contents)) != len(added):
        raise DamagedError("a control token occurs twice")
    if [token.id for token in added] != list(added_ids(vocabulary, contents).values()):
        first = len(vocabulary)
        raise DamagedError(
            f"the ids of the added tokens do not follow the vocabulary, from {first} on"
        )
    for name in (DOCUMENT_END, TURN_START, TURN_END):
        if name not in contents:
            raise DamagedError(f"the control token {name} is missing")
    return tuple(token.token for token in added)


def read_added_tokens(folder: Path) -> list[AddedToken] | None:
    """The control tokens that tokenizer_config.json lists; None where it lists none or is not
    there.
    """
    listed = _read_config(folder).get("added_tokens_decoder")
    if listed is None:
        return None
    path = folder / CONFIG_FILE
    try:
        return [AddedToken.model_validate({"id": int(i), **token}) for i, token in listed.items()]
    except (ValidationError, ValueError, TypeError, AttributeError):
        raise OpenQwenError(
            "This file's added_tokens_decoder does not map ids to tokens.", where=path
        ) from None


def with_settings(
    vocabulary: list[bytes], merges: list[Pair], control: tuple[ControlToken, ...], folder: Path
) -> Parts:
    """Parts with the templates and settings of `folder`.

    As in transformers, a token that these name is special, and is added where it is not listed.
    """
    template, settings, apart = read_settings(folder)
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    named = list(named_special_tokens(settings).values())
    named += _contents(listed) if isinstance(listed, list) else []
    tokens = {token.content: token for token in control}
    for content in named:
        tokens[content] = replace(tokens.get(content, ControlToken(content, True)), special=True)
    ids = added_ids(vocabulary, tokens)
    control = tuple(tokens[content] for content in sorted(tokens, key=ids.__getitem__))
    return Parts(vocabulary, merges, control, template, settings, apart)


def read_settings(folder: Path) -> tuple[str | dict[str, str] | None, dict[str, Any], bool]:
    """(template or templates, entries of tokenizer_config.json to keep, whether templates lie
    apart).
    """
    config = _read_config(folder)
    template = config.pop("chat_template", None)
    config.pop("added_tokens_decoder", None)
    if config.get("tokenizer_class", _CLASSES[0]) in _CLASSES and (folder / CONFIG_FILE).exists():
        own = dict.fromkeys(("eos_token", "pad_token", "unk_token"), DOCUMENT_END)
        config = own | config  # what the class says where the file says nothing
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).exists() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if files:
        templates = {name: _read_template(path) for name, path in files.items()}
        return templates["default"] if list(templates) == ["default"] else templates, config, True
    return _templates(template, folder / CONFIG_FILE), config, False


def _read_template(path: Path) -> str:
    refuse_pointer(path)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise OpenQwenError(f"This chat template is not UTF-8: {error}", where=path) from None


def _templates(template: Any, path: Path) -> str | dict[str, str] | None:
    """The `chat_template` of a configuration: one text, or a list of names and templates."""
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if template is None or isinstance(template, str):
            return template
        if all(_FILE_NAME.fullmatch(part) for part in template) and all(
            isinstance(text, str) for text in template.values()
        ):
            return dict(template)
    except (TypeError, KeyError, AttributeError):
        pass
    raise OpenQwenError(
        "This file's chat_template is not text, and not a list of templates with names.",
        where=path,
        do='write [{"name": "default", "template": "..."}, ...]',
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise OpenQwenError("This file is JSON but not an object.", where=path)
    return config
