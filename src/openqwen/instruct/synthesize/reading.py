"""Reads what a method asked for out of a model's answer, which may be anything.

Each function returns None (or an empty list) where the answer does not hold it.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from openqwen.engine import Output
from openqwen.support.files import parse_json

_LONGEST = 200_000  # characters of an answer that are read
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_ITEM = re.compile(r"^[ \t]*(?:[-*•–]|\d{1,4}[.)、])[ \t]*(\S.*)$", re.M)
_SCORE = re.compile(
    r"(?:\bscore\b|\brating\b|得分|评分|分数)[\s*_:：=]{0,6}(\d+(?:\.\d+)?)(?![\d.]*\d)", re.I
)
_BARE_SCORE = re.compile(r"[\s*_]*(\d+(?:\.\d+)?)\s*(?:/\s*10)?[\s*_.。]*")
_SHINGLE = 12  # characters; what repeats or copies longer stretches than this is measured
_LEAST = 10 * _SHINGLE  # characters below which nothing is measured


def fault(output: Output, sources: tuple[str, ...] = ()) -> str:
    """Why an answer cannot be used, or "".

    Args:
        sources: texts that a good answer does not repeat, such as the question.

    Returns:
        "empty", "not ended" (the length limit cut it), "repeats itself" (less than a third of its
        stretches of 12 characters are different ones), or "copied" (four fifths of them occur in
        one of the sources, or the answer is one of them).
    """
    if not (text := output.text.strip()):
        return "empty"
    if output.finish_reason != "stop":
        return "not ended"
    if _repeats(text):
        return "repeats itself"
    return "copied" if any(copied(text, source) for source in sources) else ""


def copied(text: str, source: str) -> bool:
    """Whether most of a text stands in a source; see `fault`."""
    text, source = " ".join(text.split()), " ".join(source.split())
    if len(text) < _LEAST:
        return text.casefold() == source.casefold()
    shingles = _shingles(text)
    return sum(s in source for s in shingles) >= 0.8 * len(shingles)


def _repeats(text: str) -> bool:
    if len(text) < _LEAST:
        return False
    return len(set(_shingles(text, 1))) < (len(text) - _SHINGLE) / 3


def _shingles(text: str, step: int = 4) -> list[str]:
    return [text[n : n + _SHINGLE] for n in range(0, len(text) - _SHINGLE + 1, step)]


def items(text: str) -> list[str]:
    """The different items of a list, one a line, marked by "-", "*", "•" or a number."""
    found = (match.strip().strip('"“”').strip() for match in _ITEM.findall(text[:_LONGEST]))
    return list(dict.fromkeys(item for item in found if item))


def score(text: str) -> float | None:
    """The score, 0 to 10, behind the last "Score:"; or of an answer that is a number alone."""
    found = _SCORE.findall(text[-_LONGEST:])
    bare = _BARE_SCORE.fullmatch(text) if not found and len(text) < 40 else None
    value = float(found[-1]) if found else float(bare[1]) if bare else None
    return value if value is not None and value <= 10 else None


def label(text: str, labels: Mapping[str, str], mark: str = "") -> str | None:
    """The value of the last of the given words in an answer.

    Args:
        labels: word -> value; a word of Latin letters counts only as a whole word.
        mark: a regular expression of what stands before the word, such as "verdict:"; with it,
            words elsewhere do not count.
    """
    words = "|".join(rf"\b{word}\b" if word.isascii() else word for word in labels)
    before = rf"{mark}[\s*_:：]{{0,6}}" if mark else ""
    found = re.findall(f"{before}({words})", text[-_LONGEST:], re.I)
    return labels[found[-1].casefold()] if found else None


def blocks(text: str) -> list[str]:
    """What stands in the fenced blocks of an answer, in order."""
    return [body for _, body in _BLOCK.findall(text[:_LONGEST])]


def json_value(text: str) -> Any | None:
    """The JSON value in an answer: that of the last block of JSON, else of the first bracket on.

    What models often get wrong is accepted: line ends inside of strings, a comma before a closing
    bracket, and Python's notation of a value.
    """
    text = text[:_LONGEST]
    blocks = [body for kind, body in _BLOCK.findall(text) if kind.lower() in ("json", "")]
    start = re.search(r"[\[{]", text)
    for source in [*reversed(blocks), *([text[start.start() :]] if start else [])]:
        value = _value(source.strip())
        if value is not None:
            return value
    return None


def _value(source: str) -> Any | None:
    for text in (source, re.sub(r",(\s*[\]}])", r"\1", source)):
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(text)
            return parse_json(json.dumps(value))  # refuses NaN, lone surrogates, deep nesting
        except (ValueError, RecursionError):
            continue
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(source)
        return parse_json(json.dumps(value)) if isinstance(value, list | dict) else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


class Novelty:
    """Knows texts, and says whether another is new, as Self-Instruct does by ROUGE-L.

    Args:
        similarity: share of the words (of Chinese text: the characters) that a text has in common,
            in order, with a known one, from which on it is not new; difflib's ratio.
        known: texts that are known from the start.
    """

    def __init__(self, similarity: float, known: Sequence[str] = ()):
        self._similarity = similarity
        self._known = [words(text) for text in known]

    def add(self, text: str) -> bool:
        """Whether a text is new; it is known from then on."""
        found = words(text)
        if not found or any(self._alike(found, other) for other in self._known):
            return False
        self._known.append(found)
        return True

    def _alike(self, first: list[str], second: list[str]) -> bool:
        match = SequenceMatcher(None, first, second, autojunk=False)
        least = self._similarity
        return match.quick_ratio() >= least and match.ratio() >= least  # the first costs less


def words(text: str) -> list[str]:
    """The words of a text in lower case; each Chinese character and each kana is one."""
    return re.findall(r"[\u2e80-\u9fff]|[^\W\u2e80-\u9fff]+", text.casefold())
