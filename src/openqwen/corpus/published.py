"""The published filters, number for number as datatrove computes them.

Words are spaCy's English ones (english.py), lines are as they stand, and shares are of all
characters of a text. The rules of `filters.py` are the same ideas on unwrapped lines and words
between white space; these are for whoever wants the decisions that FineWeb was made by.

gopher: Rae et al. 2021, appendix A: repetition, then quality. c4: Raffel et al. 2020, section 2.2.
fineweb: gopher, C4 without its rule on ends of lines, and FineWeb's own rules, in the order of its
recipe (Penedo et al. 2024). refinedweb: gopher and the line rules of RefinedWeb (Penedo et al.
2023, appendix G.2).
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from openqwen.corpus.config import Preset, PublishedRules
from openqwen.corpus.counts import SENTENCE_END, CompiledCounts, EnglishCounter
from openqwen.corpus.filters import Failure

_PARAGRAPH_END = re.compile(r"\n{2,}")
_LINE_END = re.compile(r"\n+")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_QUOTED_END = (".", "?", "!", '"', "'")
_NOTICES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
# RefinedWeb's lines that are no text: counters, and what buttons say.
_COUNTER = re.compile(r"\W*\d[\d.,]*[kKmM]?\s+\w+\W*")
_BUTTON = re.compile(r"^sign-in|^(?:read|see) more|(?:read|see) more\W*$|items in cart", re.I)
_BUTTON_WORDS, _MAINLY_CAPITALS, _MOST_LOST = 10, 0.5, 0.05


class RuleFailure(NamedTuple):
    """The rule that drops a document, and why."""

    rule: str
    failure: Failure


class FilteredText(NamedTuple):
    """What a filter made of a text.

    text: what is left of it. cut: the lines that were cut out. failed: why it is dropped.
    """

    text: str
    cut: list[str]
    failed: RuleFailure | None


Check = Iterator[tuple[bool, str, float, float]]  # (fails, rule, value, limit), in order


class PublishedFilters:
    """Filters texts by a preset; one object for each process."""

    def __init__(self, rules: PublishedRules):
        self._rules = rules
        self._counter = EnglishCounter(rules.gopher.stop_words)
        self._read: tuple[str, CompiledCounts] | None = None
        presets: dict[Preset, list[Callable[[str], FilteredText]]] = {
            "gopher": [self._gopher],
            "c4": [lambda text: self._c4(text, end_punctuation=True)],
            "fineweb": [self._gopher, self._c4, self._fineweb],
            "refinedweb": [self._gopher, self._line_corrections],
        }
        self._presets = presets

    def apply(self, text: str, preset: Preset) -> FilteredText:
        """Take a text through the filters of a preset until one drops it."""
        cut: list[str] = []
        for step in self._presets[preset]:
            done = step(text)
            text, cut = done.text, cut + done.cut
            if done.failed:
                return FilteredText(text, cut, done.failed)
        return FilteredText(text, cut, None)

    def _counts(self, text: str) -> CompiledCounts:
        if self._read is None or self._read[0] is not text:
            self._read = text, self._counter.read(text)
        return self._read[1]

    def _gopher(self, text: str) -> FilteredText:
        failed = _first(self._repetition(text)) or _first(self._quality(text))
        return FilteredText(text, [], failed)

    def _repetition(self, text: str) -> Check:
        rules, size = self._rules.repetition, len(text)
        pieces = (
            ("paragraphs", _PARAGRAPH_END.split(text.strip())),
            ("lines", _LINE_END.split(text)),
        )
        limits = {
            "paragraphs": (
                rules.max_duplicate_paragraphs,
                rules.max_duplicate_paragraph_characters,
            ),
            "lines": (rules.max_duplicate_lines, rules.max_duplicate_line_characters),
        }
        for name, parts in pieces:
            count, characters = repeats(parts)
            most, most_characters = limits[name]
            yield _over(f"duplicate {name}", count / len(parts), most)
            yield _over(f"duplicate {name[:-1]} characters", characters / size, most_characters)
        self._counts(text)
        for n, limit in rules.max_top_ngrams.items():
            yield _over(f"top {n}-grams", self._counter.top_characters(n) / size, limit)
        for n, limit in rules.max_duplicate_ngrams.items():
            yield _over(f"duplicate {n}-grams", self._counter.repeated_characters(n) / size, limit)

    def _quality(self, text: str) -> Check:
        rules, counts = self._rules.gopher, self._counts(text)
        yield _under("word count", counts.plain, rules.min_words)
        yield _over("word count", counts.plain, rules.max_words)
        mean = counts.plain_characters / max(counts.plain, 1)
        yield _under("mean word length", mean, rules.min_word_length)
        yield _over("mean word length", mean, rules.max_word_length)
        words = max(counts.words, 1)
        for symbols in (text.count("#"), text.count("...") + text.count("…")):
            yield _over("symbols per word", symbols / words, rules.max_symbols_per_word)
        lines = text.splitlines() or [""]
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        yield _over("bullet lines", bullets / len(lines), rules.max_bullet_lines)
        open_ended = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        yield _over("ellipsis lines", open_ended / len(lines), rules.max_ellipsis_lines)
        yield _under("alphabetic words", counts.alphabetic / words, rules.min_alphabetic_words)
        yield _under("stop words", counts.stop_words, rules.min_stop_words)

    def _c4(self, text: str, end_punctuation: bool = False) -> FilteredText:
        rules = self._rules.c4
        kept: list[str] = []
        cut: list[str] = []
        for whole in text.splitlines():
            line = whole.strip()
            words = line.split()
            if len(line) > rules.max_word_characters and (
                max(map(len, words)) > rules.max_word_characters
            ):
                cut.append(whole)
                continue
            if "[" in line:
                line = _CITATION.sub("", line)
            if end_punctuation and (not line.endswith(_QUOTED_END) or line.endswith("...")):
                cut.append(whole)
                continue
            if len(words) < rules.min_line_words:
                cut.append(whole)
                continue
            lower = line.lower()
            if "lorem ipsum" in lower:
                return FilteredText(text, [], _failed("lorem ipsum", 1, 0))
            if "javascript" in lower:
                cut.append(whole)
                continue
            if "{" in line:
                return FilteredText(text, [], _failed("curly bracket", 1, 0))
            if any(notice in lower for notice in _NOTICES):
                cut.append(whole)
                continue
            kept.append(line)
        joined = "\n".join(kept)
        sentences = self._counts(joined).sentences if kept else 0
        if sentences < rules.min_sentences:
            failed = _failed("sentence count", sentences, rules.min_sentences)
            return FilteredText(text, [], failed)
        return FilteredText(joined.strip(), cut, None)

    def _fineweb(self, text: str) -> FilteredText:
        return FilteredText(text, [], _first(self._fineweb_rules(text)))

    def _fineweb_rules(self, text: str) -> Check:
        rules = self._rules.fineweb
        lines = [line for line in text.split("\n") if line.strip()]
        yield _under("line count", len(lines), 1)
        ended = sum(line[-1] in SENTENCE_END for line in lines)
        yield _under("punctuated lines", ended / len(lines), rules.min_punctuated_lines)
        short = sum(len(line) <= rules.short_line for line in lines)
        yield _over("short lines", short / len(lines), rules.max_short_lines)
        share = repeats(lines)[1] / len(text.replace("\n", ""))
        yield _over("repeated line characters", share, rules.max_duplicate_line_characters)
        per_word = text.count("\n") / max(self._counts(text).words, 1)
        yield _over("newlines per word", per_word, rules.max_newlines_per_word)

    def _line_corrections(self, text: str) -> FilteredText:
        lines = text.split("\n")
        kept = [line for line in lines if not line.strip() or not no_text(line)]
        if len(kept) == len(lines):
            return FilteredText(text, [], None)
        cut = [line for line in lines if line.strip() and no_text(line)]
        lost = sum(len(line.split()) for line in cut) / max(len(text.split()), 1)
        if lost > _MOST_LOST:
            return FilteredText(text, [], _failed("lines without text", lost, _MOST_LOST))
        return FilteredText("\n".join(kept).strip("\n"), cut, None)


@lru_cache(4096)
def no_text(line: str) -> bool:
    """Whether a line is of RefinedWeb's kinds: capitals, numbers, a counter, one word, a button."""
    words = line.split()
    letters = [character for character in line if character.isalpha()]
    if len(words) <= 1 or not letters or _COUNTER.fullmatch(line.strip()):
        return True
    if sum(map(str.isupper, letters)) > _MAINLY_CAPITALS * len(letters):
        return True
    return len(words) <= _BUTTON_WORDS and bool(_BUTTON.search(line.strip()))


def repeats(parts: list[str]) -> tuple[int, int]:
    """How many parts occurred before, and their characters."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0, 0
    characters = sum(map(len, parts)) - sum(map(len, unique))
    return len(parts) - len(unique), characters


def _over(rule: str, value: float, limit: float) -> tuple[bool, str, float, float]:
    return value > limit, rule, value, limit


def _under(rule: str, value: float, limit: float) -> tuple[bool, str, float, float]:
    return value < limit, rule, value, limit


def _first(checks: Check) -> RuleFailure | None:
    for fails, rule, value, limit in checks:
        if fails:
            return _failed(rule, value, limit)
    return None


def _failed(rule: str, value: float, limit: float) -> RuleFailure:
    return RuleFailure(rule, Failure(f"{round(value, 3):,}, limit {limit:,}", value))
