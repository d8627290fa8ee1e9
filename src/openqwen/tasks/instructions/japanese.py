"""Japanese text: words, sentences, marks."""

import re
from functools import cache, lru_cache
from typing import Any

from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

_QUOTED = re.compile(r"「[^「」]*」|\([^()]*\)")  # marks in there end no sentence
_MARK = re.compile(r"[。!?]")
_WIDE = str.maketrans({"！": "!", "？": "?", "｡": "。", "（": "(", "）": ")", "｢": "「", "｣": "」"})


def count_sentences(text: str) -> int:
    """The number of sentences, as ja_sentence_segmenter, which the reference uses, counts them.

    A line ends a sentence, unless it ends with の; so does each 。, ! or ? outside of quotations
    and parentheses.
    """
    lines: list[str] = []
    for line in text.strip().translate(_WIDE).splitlines():
        line = re.sub("[ 　]+", " ", line)
        if lines and re.search(".の$", lines[-1]):
            lines[-1] += line
        else:
            lines.append(line)
    count = 0
    for line in lines:
        line = _QUOTED.sub(lambda quoted: _MARK.sub("_", quoted[0]), line)
        pieces = _MARK.split(line)
        count += len(pieces) - 1 + bool(pieces[-1])
    return count


def words(text: str) -> tuple[str, ...]:
    """The words of a text, as janome divides it (dictionary IPADIC)."""
    return tuple(surface for surface, _ in tokens(text))


@lru_cache(maxsize=64)
def tokens(text: str) -> tuple[tuple[str, str], ...]:
    """The words of a text, each with its part of speech."""
    return tuple((token.surface, token.part_of_speech) for token in _tokenizer().tokenize(text))


@cache
def _tokenizer() -> Any:
    try:
        from janome.tokenizer import Tokenizer
    except ImportError:
        what = "Instructions about the words of a Japanese answer need janome."
        raise OpenQwenError(what, do=pip_install("openqwen[instructions]")) from None
    return Tokenizer()


def without_quotations(text: str) -> str:
    """The text without what stands in 「」 or 『』 on one line."""
    for opening, closing in ("「」", "『』"):
        pattern = rf"{opening}[^{closing}\n]*({closing})?"
        text = re.sub(pattern, lambda match: "" if match[1] else match[0], text)
    return text


def without_marks(paragraph: str) -> str:
    """A paragraph without the marks of Markdown and the quotation marks at its beginning."""
    mark = r">\s*|#{1,6}\s*|[-*+]\s+|・\s*|\d+[.)]\s+|[*_`]+|[「『（(《〈]+"
    return re.sub(rf"^(?:\s*(?:{mark}))+", "", paragraph.strip())
