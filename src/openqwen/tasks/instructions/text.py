"""Sentences and words, counted as IFEval's and M-IFEval's reference implementations count them.

English and French sentences: the rules of NLTK's Punkt (Kiss and Strunk 2006), with short lists in
place of its trained tables. Spanish words: spaCy's tokens without punctuation. Spanish sentences:
the reference asks a trained parser, which is under the GPL; here marks and line ends decide.
"""

import re
import tomllib
import unicodedata
from functools import cache
from pathlib import Path

from openqwen.tasks.instructions import japanese

_BEHIND = ")\";}]*:@'({[?!"  # characters that may follow a mark, with no space between
_ALONE = '("`{[:;&#*@)}]-,'  # characters that begin no word
# Where spaCy divides a Spanish word: at hyphens between letters, and : < > = / before one.
_INSIDE = re.compile(r"(?<=[^\W\d_])[-–—~](?=[^\W\d_])|(?<=[^\W_])[:<>=/](?=[^\W\d_])")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")


@cache
def _words(language: str, name: str) -> frozenset[str]:
    text = Path(__file__).with_name("abbreviations.toml").read_text(encoding="utf-8")
    return frozenset(tomllib.loads(text)[language][name].split())


def count_sentences(text: str, language: str) -> int:
    """The number of sentences."""
    if language == "ja":
        return japanese.count_sentences(text)
    if language == "es":
        pieces = re.split(r"(?<=[.?!…])[\"'»”)\]*_]*\s+|\n+", _without_list_marks(text))
        return sum(any(map(str.isalnum, piece)) for piece in pieces)
    words = text.split()
    count = 0
    rest = ""  # what stands behind the last end of a sentence
    for word, following in zip(words, [*words[1:], ""]):
        end = _last_mark(word, bool(following))
        if end is not None and _ends(word[:end], word[end:] or following, language):
            count += 1
            rest = word[end:]
        else:
            rest += f" {word}"
    # Closing marks belong to the sentence before them.
    return count + bool(re.sub(r"^[\"')\]}]+(?=\s|$)", "", rest.strip()).strip())


def _last_mark(word: str, more: bool) -> int | None:
    """Behind the last mark of a word that may end a sentence; None where there is none."""
    for end in range(len(word), 0, -1):
        if word[end - 1] in ".?!" and (more if end == len(word) else word[end] in _BEHIND):
            return end
    return None


def _ends(word: str, following: str, language: str) -> bool:
    """Whether a word that ends with a mark ends a sentence before `following`."""
    if re.search(r"[?!]", word):
        return True
    last = re.split(r"[)\";}\]*:@'({\[]|--+", word)[-1].lstrip(_ALONE)
    bare, next_word = last[:-1].lower(), _first_word(following)
    starts = next_word[:1].isupper() and next_word.lower() in _words(language, "starters")
    if last.endswith(".."):
        return starts
    inside = following[:1] in tuple(";:,.!?")  # the sentence goes on
    if len(bare) == 1 and bare.isalpha():  # an initial
        known = bare in _words(language, "short")
        return not known and (starts or not (inside or next_word[:1].isalpha()))
    if {bare, bare.rpartition("-")[2]} & _words(language, "short"):
        return starts
    if _NUMBER.fullmatch(bare):
        return not (inside or next_word[:1].islower())
    return True


def _first_word(text: str) -> str:
    """The word that a text begins with; "" where it begins with punctuation."""
    if text[:1] in tuple(_ALONE):
        return ""
    return re.split(r"[)\";}\]*:@'({\[?!]|--+|\.\.+|,$", text, maxsplit=1)[0].rstrip(".")


def count_words(text: str, language: str) -> int:
    """The number of words."""
    if language == "es":
        return len(spanish_words(_without_list_marks(text).replace("\n", " ")))
    return len(re.findall(r"\w+", text))


def capital_words(text: str, language: str) -> int:
    """The number of words in capital letters, as NLTK's or, for Spanish, spaCy's tokens."""
    if language == "es":
        return sum(word.isupper() for word in spanish_words(text))
    spaced = re.sub(r"[][(){}<>;@#$%&?!*\"“”«»‘’`‒–—―]|\.\.+|--+|[:,](?!\d)", " ", text)
    spaced = re.sub(r"(?i)\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b", r"\1\3\5 \2\4\6", spaced)
    spaced = re.sub(r"(?i)([^\s'])('(?:[smd]|ll|re|ve)|n't)(?=\s|$)", r"\1 \2", spaced)
    return sum(word.isupper() for word in spaced.split())


def _without_list_marks(text: str) -> str:
    """The text without the numbers and signs before the items of lists."""
    return re.sub(r"(^\s*\d+\.\s*)|(^\s*[-*]\s*)", "", _short_gaps(text), flags=re.MULTILINE)


def _short_gaps(text: str) -> str:
    """The text with no gap of more than 50 characters: expressions would need its square's time."""
    return re.sub(r"(\s{50})\s+", r"\1", text)


def count_lines(pattern: str, text: str) -> int:
    """How often an expression, which begins with ^\\s*, matches."""
    return len(re.findall(pattern, _short_gaps(text), flags=re.MULTILINE))


def spanish_words(text: str) -> list[str]:
    """The tokens of a Spanish text that are no punctuation, as spaCy's tokenizer makes them.

    A symbol, such as $ or +, is a token, and so is a gap that is not a single space.
    """
    tokens: list[str] = []
    for gap, chunk in re.findall(r"(\s*)(\S+)", text):
        if gap not in ("", " "):
            tokens.append(gap)
        parts = [chunk] if chunk.isalnum() else _INSIDE.split(chunk)
        for part in parts:
            tokens += [part] if part.isalnum() else _without_punctuation(part)
    return tokens


def _without_punctuation(part: str) -> list[str]:
    kinds = [unicodedata.category(char)[0] for char in part]
    symbols = [char for char, kind in zip(part, kinds) if kind == "S"]
    spaced = "".join(" " if kind == "S" else char for char, kind in zip(part, kinds))
    marks = "".join({char for char, kind in zip(part, kinds) if kind == "P"})
    return [*symbols, *filter(None, (piece.strip(marks) for piece in spaced.split()))]
