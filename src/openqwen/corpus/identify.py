"""What a document is: its language, programming language, licence and kind.

Languages come from py3langid, whose model is part of its package. Of a text only a part is read:
its answer does not get better after a few hundred characters, and whole texts would make it the
slowest step of all.
"""

import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath

from openqwen.corpus.documents import Document
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

_READ = 500  # characters that the language is found by
_HEAD = 4_000  # characters at the beginning in which a licence is looked for
_LEAST = 20  # letters; shorter texts have no language that can be told
_BOOK = 100_000  # characters
_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_COUNTED = {code: re.compile(f"[{span}]") for code, span in _TABLES["scripts"].items()}
_LETTERS = re.compile(r"[^\W\d_]")
_ASCII = re.compile(r"[\x00-\x7f]*")
_MIXED_SHARE = {"ja": 0.05}  # of letters that kana are in Japanese; all others need half

_ENGLISH = frozenset(_TABLES["english"]["words"].split())
_ENGLISH_SHARE = 0.25
# A text without any of these names no licence.
_LICENCE_WORDS = ("licen", "permission", "redistribution", "creativecommons", "cc0")
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+-]+(?: (?:OR|AND|WITH) [\w.+-]+)*)")
_LICENCES = [(re.compile(row["pattern"], re.I), row["name"]) for row in _TABLES["licences"]]
_CREATIVE = re.compile(r"creativecommons\.org/licenses/(by(?:-nc)?(?:-nd|-sa)?)/(\d\.\d)", re.I)

_PROGRAMMING = {
    suffix: name for name, suffixes in _TABLES["programming"].items() for suffix in suffixes.split()
}
_SHEBANG = re.compile(r"#!.{0,80}?\b(python|bash|sh|perl|ruby|node|lua|php)[\d.]*\s")
_SHEBANGS = {"bash": "shell", "sh": "shell", "node": "javascript"}
_MANUAL = (".rst", ".md", ".markdown")
_LIST_LINE = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)])\s")
_TURN = re.compile(r"^(?:[A-Z][\w .'-]{0,30}|[QA]):\s", re.MULTILINE)


def identify(document: Document) -> Document:
    """The document with what could be found out; what it came with stays.

    `language`: ISO 639-1, empty for code and where it cannot be told. In `meta`:
    `programming_language` of code; `license`, an SPDX identifier, where its text names one; `kind`:
    code, manual, book, dialogue, list or text.
    """
    text, meta = document["text"], dict(document["meta"])
    is_code = meta["profile"] == "code"
    name = PurePosixPath(document["id"].partition("#")[0].removesuffix(".gz").removesuffix(".zst"))
    language = document["language"]
    if is_code:
        if found := programming_language(name.suffix.lower(), text):
            meta.setdefault("programming_language", found)
    elif not language:
        language = language_of(text)
    if licence := licence_of(text):
        meta.setdefault("license", licence)
    meta.setdefault("kind", "code" if is_code else kind_of(text, name.suffix.lower()))
    return {**document, "language": language, "meta": meta}


def language_of(text: str) -> str:
    """The language of a text by its beginning, behind what may be a heading; "" if too short."""
    start = len(text) // 10 if len(text) > 4 * _READ else 0
    part = text[start : start + _READ]
    letters = len(_LETTERS.findall(part))
    if letters < _LEAST:
        return ""
    if not _ASCII.fullmatch(part):
        for code, pattern in _COUNTED.items():
            if len(pattern.findall(part)) > _MIXED_SHARE.get(code, 0.5) * letters:
                return code
    words = part.lower().split()
    if sum(word in _ENGLISH for word in words) > _ENGLISH_SHARE * len(words):
        return "en"
    return _classifier()(part)


@cache
def _classifier() -> Callable[[str], str]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        what = "The package py3langid, which finds the language of documents, is not installed."
        do = f"{pip_install('py3langid')}, or set identify to false"
        raise OpenQwenError(what, "identify", do) from None
    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    return lambda text: str(model.classify(text.lower())[0])


def programming_language(suffix: str, text: str) -> str:
    """The language of a program by its file's ending, or by its first line; "" if unknown."""
    if found := _PROGRAMMING.get(suffix.removeprefix(".")):
        return found
    match = _SHEBANG.match(text)
    return _SHEBANGS.get(match[1], match[1]) if match else ""


def licence_of(text: str) -> str:
    """The licence that the beginning of a text names, as an SPDX identifier; "" if none."""
    beginning = text[:_HEAD].lower()
    if not any(word in beginning for word in _LICENCE_WORDS):
        return ""
    head = " ".join(re.sub(r"(?m)^\s*(?:#|//|\*|--|;|%|/\*)+", " ", text[:_HEAD]).split())
    if match := _SPDX.search(head):
        return match[1]
    if match := _CREATIVE.search(head):
        return f"CC-{match[1].upper()}-{match[2]}"
    return next((name for pattern, name in _LICENCES if pattern.search(head)), "")


def kind_of(text: str, suffix: str) -> str:
    """What sort of text this is, by its form alone."""
    if suffix in _MANUAL and len(text) < _BOOK:
        return "manual"
    if len(text) >= _BOOK:
        return "book"
    lines = [line for line in text.split("\n") if line.strip()]
    if len(_TURN.findall(text)) > 0.4 * len(lines) and len(lines) > 3:
        return "dialogue"
    if sum(bool(_LIST_LINE.match(line)) for line in lines) > 0.5 * len(lines):
        return "list"
    return "text"
