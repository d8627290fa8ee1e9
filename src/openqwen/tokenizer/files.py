"""The tokenizer as files in Hugging Face's layout, for transformers, vLLM and llama.cpp."""

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
TEMPLATE_FOLDER = "additional_chat_templates"  # all but the default, by name
_FILE_NAME = re.compile(r"[^/\\]+")
# In the order in which transformers adds them.
_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")

# What all Qwen2 tokenizers' files have in common. Text goes through NFC, Qwen2's split and bytes as
# characters. The flags of the ByteLevel parts switch off defaults that Qwen2 does not use.
_LAYOUT: dict[str, Any] = json.loads(
    (Path(__file__).parent / "layout.json").read_text(encoding="utf-8")
)
_LAYOUT["tokenizer"]["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN


class Parts(NamedTuple):
    """What a tokenizer consists of, whatever kind of file it came from.

    vocabulary: the bytes of each regular token, by id. merges: pairs of ids, best rank first.
    control: the added tokens, in the order of their ids (`added_ids`). template: Jinja source, or
    several by name. settings: the other entries of tokenizer_config.json (eos_token,
    model_max_length ...). template_apart: the templates are in separate files.
    """

    vocabulary: list[bytes]
    merges: list[Pair]
    control: tuple[ControlToken, ...]
    template: str | Mapping[str, str] | None = None
    settings: Mapping[str, Any] = {}
    template_apart: bool = False


def write_tokenizer(folder: Path, parts: Parts) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [to_characters(token) for token in parts.vocabulary]
    ids = {name: i for i, name in enumerate(names)}
    pairs = [(names[left], names[right]) for left, right in parts.merges]
    write_json(folder / "tokenizer.json", _tokenizer_json(ids, pairs, _added(parts)))
    write_json(folder / "tokenizer_config.json", tokenizer_config(parts))
    write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False) + "\n")
    lines = [f"{left} {right}\n" for left, right in pairs]
    write_text(folder / "merges.txt", "".join(["#version: 0.2\n", *lines]))
    for path in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
        path.unlink(missing_ok=True)  # of an earlier save: it would overrule tokenizer_config.json
    separate = _by_name(parts.template) if parts.template_apart else {}
    for name, template in separate.items():
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
    model = layout["model"] | {"vocab": ids, "merges": pairs}
    return layout | {"added_tokens": tokens, "model": model}


def _added(parts: Parts) -> dict[int, Any]:
    ids = added_ids(parts.vocabulary, [token.content for token in parts.control])
    layout = _LAYOUT["added_token"]
    added = {ids[token.content]: layout | asdict(token) for token in parts.control}
    return dict(sorted(added.items()))


def tokenizer_config(parts: Parts) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    config = tokenizer_settings(parts)
    config["added_tokens_decoder"] = {str(i): token for i, token in _added(parts).items()}
    template = parts.template
    if template is not None and not parts.template_apart:
        several = [{"name": name, "template": text} for name, text in _by_name(template).items()]
        config["chat_template"] = template if isinstance(template, str) else several
    return dict(sorted(config.items()))


def tokenizer_settings(parts: Parts) -> dict[str, Any]:
    """`parts.settings`, with Qwen2's defaults for the entries that they lack."""
    special = [token.content for token in parts.control if token.special]
    defaults = _LAYOUT["tokenizer_config"] | {
        "eos_token": TURN_END if parts.template else DOCUMENT_END,
        "pad_token": DOCUMENT_END,
    }
    if "extra_special_tokens" not in parts.settings:  # the newer name of the same list
        listed = [content for content in special if content != DOCUMENT_END]
        defaults["additional_special_tokens"] = listed
    return defaults | dict(parts.settings)


def named_special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens with a name (`eos_token` ...), as transformers gives them to templates."""
    extra = settings.get("extra_special_tokens")
    entries: dict[str, Any] = dict.fromkeys(_NAMES)
    entries |= {key: value for key, value in settings.items() if key.endswith("_token")}
    entries |= extra if isinstance(extra, dict) else {}
    texts = zip(entries, _contents(entries.values()))
    return {name: text for name, text in texts if isinstance(text, str)}


def _contents(tokens: Iterable[Any]) -> list[Any]:
    return [token.get("content") if isinstance(token, dict) else token for token in tokens]


def added_ids(vocabulary: Sequence[bytes], contents: Iterable[str]) -> dict[str, int]:
    """The id of each added token: that in the vocabulary if it is there, else the next free id."""
    names = {to_characters(token): i for i, token in enumerate(vocabulary)}
    free = count(len(vocabulary))
    return {content: names[content] if content in names else next(free) for content in contents}


class AddedToken(BaseModel):
    """An added token as the files list it, with the defaults of `tokenizers`."""

    id: int
    content: str = Field(min_length=1)
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None

    @property
    def token(self) -> ControlToken:
        """The token without its id."""
        normalized = not self.special if self.normalized is None else self.normalized
        return ControlToken(**self.model_dump(exclude={"id"}) | {"normalized": normalized})


class _Model(BaseModel):
    """The model in tokenizer.json: BPE without the options that would change ids."""

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
    """A tokenizer.json, with the template and the settings from the files beside it.

    Raises OpenQwenError if a file is missing or damaged, or if its rules are not Qwen2's.
    """
    try:
        file = _File.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        what = f"This tokenizer is damaged or of another kind: {name}: {first['msg']}"
        raise OpenQwenError(what, path) from None
    same_form = file.normalizer == _LAYOUT["tokenizer"]["normalizer"]
    if not same_form or _split_expression(file.pre_tokenizer) != PATTERN:
        what = "This tokenizer splits text by other rules than Qwen2's."
        raise OpenQwenError(what, path, do="use a Qwen2 model")
    with naming(path):
        vocab = without_added(file.model.vocab, file.added_tokens, file.model.merges)
        vocabulary, merges = checked_vocabulary(vocab, file.model.merges)
        control = checked_control(file.added_tokens, vocabulary)
    return with_settings(vocabulary, merges, control, path.parent)


def read_vocabulary_and_merges(folder: Path) -> Parts:
    """vocab.json and merges.txt; the control tokens are as in `listed_control`."""
    vocab, lines = read_json(folder / "vocab.json"), read_lines(folder / "merges.txt")
    with naming(folder / "vocab.json"):
        if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
            raise DamagedError("it does not map tokens to ids")
        listed = read_added_tokens(folder)
        merges = [line for line in lines if line and not line.startswith("#version")]
        regular = without_added(vocab, listed or (), merges)
    with naming(folder / "merges.txt"):
        vocabulary, pairs = checked_vocabulary(regular, merges)
    return with_settings(vocabulary, pairs, listed_control(listed, vocabulary, folder), folder)


def listed_control(
    listed: list[AddedToken] | None, vocabulary: Sequence[bytes], folder: Path
) -> tuple[ControlToken, ...]:
    """The control tokens that tokenizer_config.json lists, or Qwen2's three if it lists none."""
    with naming(folder / CONFIG_FILE):
        return QWEN2_CONTROL_TOKENS if listed is None else checked_control(listed, vocabulary)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, which end at newlines only.

    str.splitlines() would also cut at other characters, inside a token.
    """
    try:
        refuse_pointer(path)
        return path.read_bytes().decode().split("\n")
    except FileNotFoundError:
        raise OpenQwenError("A file is missing.", where=path, do="check the path") from None
    except UnicodeDecodeError as error:
        raise OpenQwenError(f"This file is not UTF-8: {error}", where=path) from None


class DamagedError(Exception):
    """A fault inside a tokenizer's file; `naming` adds the file's name."""


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
    """(vocabulary, merges as pairs of ids) from tokens in byte characters.

    A pair of names may be one string with a space between them.
    """
    names = sorted(vocab, key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        raise DamagedError("the ids of the vocabulary are not 0, 1, 2, ... without a gap")
    try:
        vocabulary = [to_bytes(name) for name in names]
    except KeyError as error:
        raise DamagedError(f"the character {error} in the vocabulary stands for no byte") from None
    check_bytes(vocabulary)
    if b"" in vocabulary:
        raise DamagedError("a token of the vocabulary is empty")
    merges = []
    for number, merge in enumerate(pairs):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or not vocab.keys() >= {*parts, "".join(parts)}:
            raise DamagedError(
                f"merge {number}, {merge!r}, does not make a token of two tokens of the vocabulary"
            )
        merges.append((vocab[parts[0]], vocab[parts[1]]))
    return vocabulary, merges


def check_bytes(vocabulary: Iterable[bytes]) -> None:
    """Raise DamagedError if a byte is not a token: then some text would have no ids."""
    if missing := set(BYTES_IN_ID_ORDER) - set(vocabulary):
        raise DamagedError(f"the vocabulary lacks {len(missing)} of the 256 bytes")


def without_added(
    vocab: Mapping[str, int], added: Iterable[AddedToken], merges: Iterable[Sequence[str]]
) -> dict[str, int]:
    """`vocab` without the added tokens, which some files list in it: those that no merge makes."""
    made = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges}
    not_made = {token.content for token in added if len(token.content) > 1} - made
    return {name: i for name, i in vocab.items() if name not in not_made}


def checked_control(
    added: Sequence[AddedToken], vocabulary: Sequence[bytes]
) -> tuple[ControlToken, ...]:
    """The added tokens in the order of their ids, which must be as `added_ids` would give them."""
    added = sorted(added, key=lambda token: token.id)
    contents = [token.content for token in added]
    if len(set(contents)) != len(added):
        raise DamagedError("a control token occurs twice")
    if [token.id for token in added] != list(added_ids(vocabulary, contents).values()):
        raise DamagedError(
            f"the ids of the added tokens do not follow the vocabulary, from {len(vocabulary)} on"
        )
    for name in (DOCUMENT_END, TURN_START, TURN_END):
        if name not in contents:
            raise DamagedError(f"the control token {name} is missing")
    return tuple(token.token for token in added)


def read_added_tokens(folder: Path) -> list[AddedToken] | None:
    """The added tokens that tokenizer_config.json lists; None if it has no list or is missing."""
    listed = _read_config(folder).get("added_tokens_decoder")
    if listed is None:
        return None
    try:
        return [AddedToken.model_validate({"id": int(i), **token}) for i, token in listed.items()]
    except (ValidationError, ValueError, TypeError, AttributeError):
        what = "This file's added_tokens_decoder does not map ids to tokens."
        raise OpenQwenError(what, folder / CONFIG_FILE) from None


def with_settings(
    vocabulary: list[bytes], merges: list[Pair], control: tuple[ControlToken, ...], folder: Path
) -> Parts:
    """Parts with the templates and settings of `folder`.

    As in transformers, a token that the settings name is special, and is added if it is not listed.
    """
    template, settings, template_apart = read_settings(folder)
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    named = list(named_special_tokens(settings).values())
    named += _contents(listed) if isinstance(listed, list) else []
    tokens = {token.content: token for token in control}
    for content in named:
        tokens[content] = replace(tokens.get(content, ControlToken(content, True)), special=True)
    ids = added_ids(vocabulary, tokens)
    control = tuple(tokens[content] for content in sorted(tokens, key=ids.__getitem__))
    return Parts(vocabulary, merges, control, template, settings, template_apart)


def read_settings(folder: Path) -> tuple[str | dict[str, str] | None, dict[str, Any], bool]:
    """(template or templates, entries of tokenizer_config.json to keep, template_apart)."""
    config = _read_config(folder)
    template = config.pop("chat_template", None)
    config.pop("added_tokens_decoder", None)
    if config.get("tokenizer_class", _CLASSES[0]) in _CLASSES and (folder / CONFIG_FILE).exists():
        of_class = dict.fromkeys(("eos_token", "pad_token", "unk_token"), DOCUMENT_END)
        config = of_class | config
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).exists() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if not files:
        return _templates(template, folder / CONFIG_FILE), config, False
    templates = {name: _read_template(path) for name, path in files.items()}
    return templates["default"] if list(templates) == ["default"] else templates, config, True


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
        are_texts = all(isinstance(text, str) for text in template.values())
        if are_texts and all(map(_FILE_NAME.fullmatch, template)):
            return dict(template)
    except (TypeError, KeyError, AttributeError):
        pass
    raise OpenQwenError(
        "This file's chat_template is not text and not a list of templates with names.",
        where=path,
        do='write [{"name": "default", "template": "..."}, ...]',
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise OpenQwenError("This file is JSON but not an object.", where=path)
    return config
