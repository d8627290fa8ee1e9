"""English words as datatrove's filters count them: spaCy's tokenizer, from its rules and tables.

The published filters of FineWeb were set for these words, where punctuation marks are words of
their own, and `don't` is two. A stretch between white space is split on its own, so the splits of
common ones are kept. spaCy's classes of letters are taken as Unicode's.
"""

import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import regex

_LOWER, _UPPER, _LETTER = r"\p{Ll}\p{Lo}", r"\p{Lu}\p{Lo}", r"\p{L}"
_ICON = r"\p{So}"
_HYPHEN = "(?:-|–|—|--|---|——|~)"
_LONGEST_ADDRESS = 2_000  # characters; longer stretches are not looked at as an address
_KEPT = 1 << 16  # splits that are kept
Words = tuple[str, ...]


class EnglishRules(NamedTuple):
    """How a stretch of text without white space is split.

    special: stretches with a split of their own. merged: words that are put together again to a
    special stretch, where the patterns had split it.
    """

    prefix: regex.Pattern[str]
    suffix: regex.Pattern[str]
    infix: regex.Pattern[str]
    address: regex.Pattern[str]
    special: Mapping[str, Words]
    merged: Mapping[Words, str]


@cache
def english_rules() -> EnglishRules:
    """The rules, built once."""
    tables = english_tables()
    marks = tables["characters"]
    patterns = (_prefix(marks), _suffix(marks), _infix(marks), regex.compile(_ADDRESS))
    special = _special_cases(tables)
    plain = EnglishRules(*patterns, special={}, merged={})
    prefix, suffix, infix, _ = patterns
    merged = {
        _split(text, plain): text
        for text in special
        if prefix.search(text) or suffix.search(text) or infix.search(text)
    }
    return EnglishRules(*patterns, special=special, merged=merged)


@cache
def english_tables() -> dict[str, dict[str, str]]:
    """What english.toml holds."""
    path = Path(__file__).with_name("english.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def english_words(text: str) -> list[str]:
    """The words of a text, in order, without white space."""
    return [word for stretch in text.split() for word in split_stretch(stretch)]


@lru_cache(_KEPT)
def split_stretch(stretch: str) -> Words:
    """The words of a stretch of text without white space."""
    rules = english_rules()
    return rules.special.get(stretch) or _joined(_split(stretch, rules), rules.merged)


def _split(stretch: str, rules: EnglishRules) -> Words:
    """Take affixes off until a special case or nothing to take off is left; then split inside."""
    before: list[str] = []
    behind: list[str] = []
    while stretch and stretch not in rules.special:
        found = rules.prefix.search(stretch)
        start = found.end() if found else 0
        if start and stretch[start:] in rules.special:
            before.append(stretch[:start])
            stretch = stretch[start:]
            break
        found = rules.suffix.search(stretch[start:])
        size = found.end() - found.start() if found else 0
        end = len(stretch) - size
        if size and stretch[:end] in rules.special:
            behind.append(stretch[end:])
            stretch = stretch[:end]
            break
        if not start and not size:
            break
        if start + size > len(stretch):  # both would take the same characters
            size, end = 0, len(stretch)
        if start:
            before.append(stretch[:start])
        if size:
            behind.append(stretch[end:])
        stretch = stretch[start:end]
    return (*before, *_split_inside(stretch, rules), *reversed(behind))


def _split_inside(stretch: str, rules: EnglishRules) -> Words:
    if not stretch:
        return ()
    if special := rules.special.get(stretch):
        return special
    if len(stretch) <= _LONGEST_ADDRESS and rules.address.match(stretch):
        return (stretch,)
    edges = [0]
    for match in rules.infix.finditer(stretch):
        if match.start() > 0:
            edges += match.span()
    words = (stretch[start:end] for start, end in pairwise([*edges, len(stretch)]))
    return tuple(filter(None, words))


def _joined(words: Words, merged: Mapping[Words, str]) -> Words:
    """Put special cases together again; of those that overlap the longest one, then the first."""
    spans = []
    taken: set[int] = set()
    for size in range(min(len(words), 12), 0, -1):
        for start in range(len(words) - size + 1):
            if words[start : start + size] in merged:
                if not {start, start + size - 1} & taken:
                    spans.append((start, start + size))
                taken.update(range(start, start + size))
    if not spans:
        return words
    joined: list[str] = []
    position = 0
    special = english_rules().special
    for start, end in sorted(spans):
        joined += (*words[position:start], *special[merged[words[start:end]]])
        position = end
    return (*joined, *words[position:])


def _special_cases(tables: Mapping[str, Mapping[str, str]]) -> dict[str, Words]:
    cases: dict[str, Words] = {}
    for rule in tables["contractions"]:
        for stem in rule["stems"].split():  # type: ignore[index]
            for ending in rule["endings"]:  # type: ignore[index]
                for form in (stem, stem.title()):
                    marked = (form, *ending.split())
                    bare = tuple(part.replace("'", "") for part in marked)
                    cases |= {"".join(parts): parts for parts in (marked, bare)}
    for hour in map(str, range(1, 13)):
        for half in ("a.m.", "am", "p.m.", "pm"):
            cases[hour + half] = (hour, half)
    words = tables["words"]
    for line in words["split"].replace("\n", "").split("|"):
        cases[line.replace(" ", "")] = tuple(line.split())
    dropped = words["dropped_g"].split()
    forms = [form for word in dropped for form in (word, word.title())]
    single = [*words["single"].split(), *words["emoticons"].split(), *forms]
    for word in [*single, *(f"{form}'" for form in forms)]:
        cases[word] = (word,)
    for text, parts in list(cases.items()):
        cases[text.replace("'", "’")] = tuple(part.replace("'", "’") for part in parts)
    return {text: parts for text, parts in cases.items() if text not in words["whole"].split()}


def _set(characters: str) -> str:
    return "".join(map(regex.escape, characters))


def _prefix(marks: Mapping[str, str]) -> regex.Pattern[str]:
    single = _set("§%=—–" + marks["punctuation"] + marks["quotes"])
    currency = _set(marks["currency"])
    parts = [rf"[{single}{_ICON}]", r"\+(?![0-9])", r"\.\.+", rf"(?:US\$|[CA]\$|[{currency}])"]
    return regex.compile(f"^(?:{'|'.join(parts)})")


def _suffix(marks: Mapping[str, str]) -> regex.Pattern[str]:
    single = _set("—–" + marks["punctuation"] + marks["quotes"])
    units = "|".join(map(regex.escape, sorted(marks["units"].split(), key=len, reverse=True)))
    before_stop = _set("%²-+|?:" + marks["punctuation"] + marks["quotes"])
    parts = [
        rf"[{single}{_ICON}]",
        "……",
        r"\.\.+",
        "['’][sS]",
        r"(?<=[0-9])\+",
        r"(?<=°[FfCcKk])\.",
        rf"(?<=[0-9])(?:US\$|[CA]\$|[{_set(marks['currency'])}]|{units})",
        rf"(?<=[0-9{_LOWER}{before_stop}])\.",
        rf"(?<=[{_UPPER}][{_UPPER}])\.",
    ]
    return regex.compile(f"(?:{'|'.join(parts)})$")


def _infix(marks: Mapping[str, str]) -> regex.Pattern[str]:
    quotes = _set(marks["quotes"])
    parts = [
        r"\.\.+",
        "…",
        rf"[{_ICON}]",
        r"(?<=[0-9])[+\-*^](?=[0-9-])",
        rf"(?<=[{_LOWER}{quotes}])\.(?=[{_UPPER}{quotes}])",
        rf"(?<=[{_LETTER}]),(?=[{_LETTER}])",
        rf"(?<=[{_LETTER}0-9]){_HYPHEN}(?=[{_LETTER}])",
        rf"(?<=[{_LETTER}0-9])[:<>=/](?=[{_LETTER}])",
    ]
    return regex.compile("|".join(parts))


# Web and mail addresses: a host with a top-level domain, or a public IP address, with what may
# stand around it.
_HOST_CHARACTER = "[A-Za-z0-9\u00a1-\uffff]"
_ADDRESS = (
    r"^(?:[\w+\-.]{2,}://)?(?:\S+(?::\S*)?@)?(?:"
    r"(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)(?:\.\d{1,3}){2})"
    r"(?!172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2})"
    r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}"
    r"\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4])"
    rf"|(?:(?:{_HOST_CHARACTER}[A-Za-z0-9\u00a1-\uffff_-]{{0,62}})?{_HOST_CHARACTER}\.)+"
    rf"[{_LOWER}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?$"
)
