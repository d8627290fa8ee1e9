"""Normalisation of every text, and the two edits that cut parts out of documents.

Nothing is unwrapped, indented anew or reworded: code stays code.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import xxhash

from openqwen.corpus.config import C4

Span = tuple[int, int]  # where a part of a text begins and ends

# Controls other than tab and newline, the byte-order mark and other invisible specials,
# noncharacters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_BLANK_RUN = re.compile(r"\n{4,}")
PARAGRAPH_END = re.compile(r"\n{2,}")
# Runs of whole-line comments (one behind a statement stays), and a block comment at the top of a
# file.
_COMMENT = re.compile(r"^(?:[ \t]*#[^\n]*\n){3,}|\A/\*.*?\*/", re.MULTILINE | re.DOTALL)
_CITATION = re.compile(r"\[\d{1,3}\]|\[edit\]|\[citation needed\]")
_NOTICE = re.compile(
    "javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_BULLET = re.compile(r"\s*(?:[-*+•‣▪◦●○]|\d{1,3}[.)])\s")
_WRAP = (60, 100)  # a line of so many characters may end at a wrap column


def normalize(text: str) -> str:
    """The text in NFC, with every line end as \\n and without control characters.

    Lines lose white space at their end; at most two blank lines follow each other.
    """
    for line_end in ("\r\n", "\r", "\x0b", "\x0c"):
        text = text.replace(line_end, "\n")
    text = _CONTROL.sub("", text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    return _BLANK_RUN.sub("\n\n\n", text).strip("\n") + "\n"


def logical_lines(text: str) -> list[list[str]]:
    """Lines grouped as they were before someone wrapped them at a column.

    The line rules of Gopher, C4 and FineWeb were set for web pages, where a line is a paragraph; on
    hard-wrapped text they would judge the column width. A group goes on as long as a line is long
    enough to have been wrapped and the next one is neither blank nor a list item.
    """
    groups: list[list[str]] = []
    open_group = False
    for line in text.split("\n"):
        if not line.strip():
            open_group = False
            continue
        if open_group and not _BULLET.match(line):
            groups[-1].append(line)
        else:
            groups.append([line])
        open_group = _WRAP[0] <= len(line) <= _WRAP[1]
    return groups


def c4_lines(text: str, limits: C4) -> tuple[str, list[str]]:
    """C4's line rules (section 2.2): the text that stays, and the lines that were cut.

    Lines of few words, with an endless word, and about JavaScript or cookies are cut; so are `[1]`,
    `[edit]` and `[citation needed]`. A wrapped paragraph counts as one line. Texts in scripts
    without spaces must not be passed: all their lines have few words.
    """
    paragraphs, cut = [], []
    for paragraph in PARAGRAPH_END.split(text):
        kept = []
        for group in logical_lines(paragraph):
            if _c4_keeps(" ".join(group), limits):
                kept += group
            else:
                cut += group
        if kept:
            paragraphs.append(_CITATION.sub("", "\n".join(kept)))
    return "\n\n".join(paragraphs) + "\n", cut


def _c4_keeps(line: str, limits: C4) -> bool:
    words = line.split()
    if len(words) < limits.min_line_words or max(map(len, words)) > limits.max_word_characters:
        return False
    return not _NOTICE.search(line.lower())


def long_pieces(text: str, code: bool, min_characters: int) -> list[tuple[Span, int]]:
    """(span, hash) of each paragraph of at least `min_characters`; of code, each comment block.

    Of code only comments count (licence headers): cutting a repeated statement would break the
    program. Equal hashes mean equal words, wherever the lines are broken.
    """
    pieces = []
    for start, end in _comments(text) if code else _paragraphs(text):
        words = " ".join(text[start:end].split())
        if len(words) >= min_characters:
            pieces.append(((start, end), xxhash.xxh3_64_intdigest(words.encode("utf-8"))))
    return pieces


def without(text: str, spans: Sequence[Span]) -> str:
    """The normalised text without these parts, which are in order."""
    kept, position = [], 0
    for start, end in spans:
        kept.append(text[position:start])
        position = end
    return normalize("".join([*kept, text[position:]]))


def _paragraphs(text: str) -> Iterator[Span]:
    start = 0
    for gap in PARAGRAPH_END.finditer(text):
        yield start, gap.end()
        start = gap.end()
    yield start, len(text)


def _comments(text: str) -> Iterable[Span]:
    return (match.span() for match in _COMMENT.finditer(text))
