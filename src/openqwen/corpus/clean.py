"""What is done to every text before it is judged, and the two edits that cut parts out of
documents.

Nothing is unwrapped, re-indented or reworded: code stays code.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

import xxhash

from openqwen.corpus.config import C4

# Controls other than tab and newline; the byte-order mark and other invisible specials; private
# noncharacters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_BLANK_RUN = re.compile(r"\n{4,}")
_PARAGRAPH = re.compile(r"\n{2,}")
# Whole lines only: a comment behind a statement stays with it. A block comment counts at the top of
# the file.
_COMMENT = re.compile(r"^(?:[ \t]*#[^\n]*\n){3,}|\A/\*.*?\*/", re.MULTILINE | re.DOTALL)
_CITATION = re.compile(r"\[\d{1,3}\]|\[edit\]|\[citation needed\]")
_POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_BULLET = re.compile(r"\s*(?:[-*+•‣▪◦●○]|\d{1,3}[.)])\s")
_WRAP = (60, 100)  # a line of so many characters may have been ended by a wrap


def normalize(text: str) -> str:
    """NFC, newlines as \\n, no control characters, no trailing white space, at most two blank lines
    in a row.
    """
    text = (
        text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0b", "\n").replace("\x0c", "\n")
    )
    text = _CONTROL.sub("", text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    return _BLANK_RUN.sub("\n\n\n", text).strip("\n") + "\n"


def logical_lines(text: str) -> list[list[str]]:
    """Lines grouped as they were before someone wrapped them at a column.

    The line rules of Gopher, C4 and FineWeb were set for web pages, where a line is a paragraph; on
    hard-wrapped text they would judge the column width. A group goes on while the line is long
    enough to have been wrapped and the next one starts neither blank, nor as a list item, nor at a
    deeper indentation than a hanging one.
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
    """C4's line rules (section 2.2): the text that stays, and the lines cut.

    Lines of few words, with an endless word, about JavaScript or cookies, go; so do `[1]`, `[edit]`
    and `[citation needed]`. A wrapped paragraph counts as one line. Scripts without spaces should
    not come here.
    """
    paragraphs, cut = [], []
    for paragraph in _PARAGRAPH.split(text):
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
    lower = line.lower()
    return "javascript" not in lower and not any(phrase in lower for phrase in _POLICY)


class RepeatedParagraphs:
    """Cuts a long paragraph wherever an earlier document already had it, word for word.

    In code only comment blocks count (licence headers): cutting a repeated statement would break
    the program.
    Memory: 8 bytes and a set entry for each long paragraph of the corpus.
    """

    def __init__(self, min_characters: int):
        self.min_characters = min_characters
        self._seen: set[int] = set()

    def cut(self, text: str, code: bool) -> tuple[str, list[str]]:
        """The text without what was seen before, and the pieces that were cut."""
        gone: list[tuple[int, int]] = []
        here = set()
        for start, end in _comments(text) if code else _paragraphs(text):
            piece = " ".join(text[start:end].split())
            if len(piece) < self.min_characters:
                continue
            key = xxhash.xxh3_64_intdigest(piece.encode("utf-8"))
            if key in self._seen:
                gone.append((start, end))
            here.add(key)
        self._seen |= here
        kept, position = [], 0
        for start, end in gone:
            kept.append(text[position:start])
            position = end
        remaining = "".join([*kept, text[position:]]) if gone else text
        return (normalize(remaining) if gone else text), [text[start:end] for start, end in gone]


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in _PARAGRAPH.finditer(text):
        yield start, gap.end()
        start = gap.end()
    yield start, len(text)


def _comments(text: str) -> Iterable[tuple[int, int]]:
    return (match.span() for match in _COMMENT.finditer(text))
