"""The published filter rules.

Each is a function of the measured document and its thresholds. It returns None to keep the
document, or the number that decided and why. The first rule that fails decides; its name is the
reason in the report.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from openqwen.corpus.config import (
    C4,
    CodeRules,
    FilterConfig,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    UnspacedRules,
)
from openqwen.corpus.measure import Measured


class Failure(NamedTuple):
    """Why a rule drops a document, in words, and the number that decided."""

    why: str
    value: float


Rule = Callable[[Measured, Any], Failure | None]

_BULLETS = ("•", "‣", "▪", "◦", "●", "○", "- ", "* ", "+ ")
_ELLIPSIS = ("...", "…")
_END = (".", "?", "!", '"', "'", "”", "’", "…")
_SENTENCE = re.compile(r"[.!?](?:[\"')\]]*)(?=\s|$)|[。！？]")
_NOTE = ("#", "//", "/*", "*", '"', "'", "--", ";")  # starts of comments and docstrings
_GENERATED = re.compile(
    r"auto[- ]?generated|automatically generated|generated (?:by|from)\b|do not edit", re.I
)
# Runs of data inside programs: hex, base64, escapes, and lists of numbers.
_DATA = re.compile(
    r"[0-9a-fA-F]{32,}|[A-Za-z0-9+/]{72,}={0,2}|(?:\\x[0-9a-fA-F]{2}){8,}"
    r"|(?:[-+(\[]{0,3}(?:0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?)[)\]]{0,2}[,:]\s*){8,}"
)


def _outside(value: float, low: float, high: float) -> Failure | None:
    if low <= value <= high:
        return None
    return Failure(f"{round(value, 2):,}, wanted {low:,} to {high:,}", value)


def _over(value: float, limit: float) -> Failure | None:
    return None if value <= limit else Failure(f"{value:.3f}, limit {limit:g}", value)


def _under(value: float, limit: float) -> Failure | None:
    return None if value >= limit else Failure(f"{value:.3f}, at least {limit:g}", value)


def _fewer(count: int, least: int, what: str = "") -> Failure | None:
    return None if count >= least else Failure(f"{count}{what}, at least {least}", count)


# --- Gopher, quality (Rae et al. 2021, appendix A) ---


def word_count(m: Measured, t: GopherQuality) -> Failure | None:
    """Between `min_words` and `max_words` words."""
    return _outside(len(m.words), t.min_words, t.max_words)


def mean_word_length(m: Measured, t: GopherQuality) -> Failure | None:
    """Mean characters of a word."""
    return _outside(m.word_characters / len(m.words), t.min_word_length, t.max_word_length)


def symbols_per_word(m: Measured, t: GopherQuality) -> Failure | None:
    """Hash signs per word, and ellipses per word."""
    ellipses = sum(map(m.text.count, _ELLIPSIS))
    return _over(max(m.text.count("#"), ellipses) / len(m.words), t.max_symbols_per_word)


def bullet_lines(m: Measured, t: GopherQuality) -> Failure | None:
    """Share of lines that start with a bullet."""
    bullets = sum(line.startswith(_BULLETS) for line in m.lines)
    return _over(bullets / len(m.lines), t.max_bullet_lines)


def ellipsis_lines(m: Measured, t: GopherQuality) -> Failure | None:
    """Share of lines that end in an ellipsis."""
    ellipses = sum(line.endswith(_ELLIPSIS) for line in m.lines)
    return _over(ellipses / len(m.lines), t.max_ellipsis_lines)


def alphabetic_words(m: Measured, t: GopherQuality) -> Failure | None:
    """Share of words with at least one letter."""
    alphabetic = sum(word.isalpha() or any(map(str.isalpha, word)) for word in m.words)
    return _under(alphabetic / len(m.words), t.min_alphabetic_words)


def stop_words(m: Measured, t: GopherQuality) -> Failure | None:
    """Occurrences of stop words."""
    listed = set(t.stop_words)
    count = sum(word in listed for word in m.text.lower().split())
    return _fewer(count, t.min_stop_words)


# --- Gopher, repetition (table A1) ---


def duplicate_lines(m: Measured, t: GopherRepetition) -> Failure | None:
    """Lines that occurred before, by count and by characters."""
    count, characters = m.repeated(m.lines)
    return _over(count, t.max_duplicate_lines) or _over(characters, t.max_duplicate_line_characters)


def duplicate_paragraphs(m: Measured, t: GopherRepetition) -> Failure | None:
    """Paragraphs that occurred before, by count and by characters."""
    count, characters = m.repeated(m.paragraphs)
    return _over(count, t.max_duplicate_paragraphs) or _over(
        characters, t.max_duplicate_paragraph_characters
    )


def top_ngrams(m: Measured, t: GopherRepetition) -> Failure | None:
    """Characters in the most frequent 2-, 3- or 4-gram."""
    for n, limit in sorted(t.max_top_ngrams.items()):
        if failure := _over(m.top_ngram_share(n), limit):
            return Failure(f"{n}-grams: {failure.why}", failure.value)
    return None


def duplicate_ngrams(m: Measured, t: GopherRepetition) -> Failure | None:
    """Characters in 5- to 10-grams that occurred before."""
    for n, limit in sorted(t.max_duplicate_ngrams.items()):
        if failure := _over(m.duplicate_ngram_share(n), limit):
            return Failure(f"{n}-grams: {failure.why}", failure.value)
    return None


# --- C4 (Raffel et al. 2020, section 2.2); its line rules are `clean.c4_lines` ---


def lorem_ipsum(m: Measured, t: C4) -> Failure | None:
    """Placeholder text."""
    count = m.text.lower().count("lorem ipsum")
    return Failure("holds 'lorem ipsum'", count) if count else None


def curly_bracket(m: Measured, t: C4) -> Failure | None:
    """A curly bracket: a sign of code in what should be prose."""
    count = m.text.count("{")
    return Failure("holds '{'", count) if count else None


def sentence_count(m: Measured, t: C4) -> Failure | None:
    """At least `min_sentences` sentences."""
    return _fewer(len(_SENTENCE.findall(m.text)), t.min_sentences, " sentences")


# --- FineWeb (Penedo et al. 2024) ---


def punctuated_lines(m: Measured, t: FineWeb) -> Failure | None:
    """Share of lines that end in punctuation."""
    punctuated = sum(line.endswith(_END) for line in m.lines)
    return _under(punctuated / len(m.lines), t.min_punctuated_lines)


def short_lines(m: Measured, t: FineWeb) -> Failure | None:
    """Share of short lines."""
    short = sum(len(line) <= t.short_line for line in m.lines)
    return _over(short / len(m.lines), t.max_short_lines)


def repeated_line_characters(m: Measured, t: FineWeb) -> Failure | None:
    """Characters in lines that occurred before."""
    return _over(m.repeated(m.lines)[1], t.max_duplicate_line_characters)


def newlines_per_word(m: Measured, t: FineWeb) -> Failure | None:
    """Line ends per word: lists and tables have many."""
    return _over(max(len(m.lines) - 1, 0) / len(m.words), t.max_newlines_per_word)


# --- scripts without spaces (datajuicer/data-juicer#30) ---


def character_count(m: Measured, t: UnspacedRules) -> Failure | None:
    """Characters that are not white space."""
    return _outside(m.word_characters, t.min_characters, t.max_characters)


def duplicate_characters(m: Measured, t: UnspacedRules) -> Failure | None:
    """Characters in windows that occurred before: Gopher's n-gram rule on characters."""
    return _over(m.by_character().duplicate_ngram_share(t.ngram), t.max_duplicate_ngrams)


# --- code (line lengths, alphanumerics, generated files: Codex, Chen et al. 2021; else ours) ---


def file_length(m: Measured, t: CodeRules) -> Failure | None:
    """At least `min_characters` characters."""
    return _fewer(len(m.text), t.min_characters, " characters")


def line_length(m: Measured, t: CodeRules) -> Failure | None:
    """Mean and longest line, in characters, as they stand in the file."""
    lengths = [len(line) for line in m.text.split("\n")]
    return _over(sum(lengths) / len(lengths), t.max_mean_line) or _over(max(lengths), t.max_line)


def alphanumeric_characters(m: Measured, t: CodeRules) -> Failure | None:
    """Share of characters that are letters or digits."""
    return _under(sum(map(str.isalnum, m.text)) / len(m.text), t.min_alphanumeric)


def generated_code(m: Measured, t: CodeRules) -> Failure | None:
    """A note in the first five lines that a program wrote the file."""
    for line in m.text.split("\n", 5)[:5]:
        match = _GENERATED.search(line)
        if match and line.lstrip().startswith(_NOTE):
            return Failure(f"says '{match[0]}'", 1)
    return None


def embedded_data(m: Measured, t: CodeRules) -> Failure | None:
    """Share of characters in runs of data."""
    return _over(sum(len(run) for run in _DATA.findall(m.text)) / len(m.text), t.max_data)


# The cheap rules come first. The order does not change which documents stay.
_GOPHER: tuple[Rule, ...] = (
    word_count,
    mean_word_length,
    symbols_per_word,
    bullet_lines,
    ellipsis_lines,
    alphabetic_words,
    stop_words,
)
_REPETITION: tuple[Rule, ...] = (
    duplicate_lines,
    duplicate_paragraphs,
    top_ngrams,
    duplicate_ngrams,
)
_C4: tuple[Rule, ...] = (lorem_ipsum, curly_bracket, sentence_count)
_FINEWEB: tuple[Rule, ...] = (
    punctuated_lines,
    short_lines,
    repeated_line_characters,
    newlines_per_word,
)
_UNSPACED: tuple[Rule, ...] = (character_count, duplicate_characters)
_CODE: tuple[Rule, ...] = (
    file_length,
    line_length,
    generated_code,
    alphanumeric_characters,
    embedded_data,
)


def first_failure(text: str, profile: str, config: FilterConfig) -> tuple[str, Failure] | None:
    """(rule name, failure) of the first rule that a cleaned text of this profile fails, or None."""
    measured = Measured(text)
    if profile == "code":
        return _first(measured, _CODE, config.code)
    if measured.unspaced:
        return _first(measured, _UNSPACED, config.unspaced)
    rules = config.web if profile == "web" else config.text
    return (
        _first(measured, _GOPHER, rules.gopher)
        or (_first(measured, _C4, config.web.c4) if profile == "web" else None)
        or _first(measured, _FINEWEB, rules.fineweb)
        or _first(measured, _REPETITION, rules.repetition)
    )


def _first(
    measured: Measured, rules: tuple[Rule, ...], thresholds: Any
) -> tuple[str, Failure] | None:
    for rule in rules:
        if failure := rule(measured, thresholds):
            return rule.__name__.replace("_", " "), failure
    return None
