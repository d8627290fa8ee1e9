"""The kinds of instructions that one language alone has: French, Spanish or Japanese (M-IFEval)."""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise

from openqwen.tasks.instructions import japanese
from openqwen.tasks.instructions.case import Case, Kind
from openqwen.tasks.instructions.text import count_lines, spanish_words

_KANJI = "[\u4e00-\u9faf]"
_WORDS = rf"(?<!{_KANJI}){_KANJI}+"


def _finds(pattern: str) -> Callable[[Case], bool]:
    return lambda case: bool(re.search(pattern, case.text))


def _lacks(pattern: str) -> Callable[[Case], bool]:
    return lambda case: not re.search(pattern, case.text)


def _no_char(case: Case) -> bool:
    return not re.search(re.escape(case["forbidden_char"]), case.text, re.IGNORECASE)


def _accents(case: Case) -> bool:
    """Each word that is asked for has its accents wherever it stands."""
    words = re.findall(r"\w+", case.text.lower())
    wanted = case["word_to_accentuate"]
    return all(word == wanted.get(_without_accents(word), word) for word in words)


def _without_accents(word: str) -> str:
    parts = unicodedata.normalize("NFKD", word)
    return "".join(char for char in parts if not unicodedata.combining(char))


def _encloses(opening: str, closing: str) -> Callable[[Case], bool]:
    """There is text between two marks. What is not closed is read to the end: in linear time."""
    pattern = re.compile(rf"{opening}([^{closing}]*)([{closing}])?")
    return lambda case: any(
        match[2] and match[1].lstrip(opening).strip() for match in pattern.finditer(case.text)
    )


def _words_with(case: Case, letters: str) -> int:
    return sum(any(char in letters for char in word) for word in spanish_words(case.text))


def _tildes(case: Case) -> bool:
    return case.compares(_words_with(case, "áéíóúÁÉÍÓÚ"), "num_words")


def _numbered(case: Case) -> bool:
    return count_lines(r"^\s*\d+\.\s.*$", case.text) == case["num_items"]


def _furigana(case: Case) -> bool:
    """Each run of kanji has its reading behind it, in wide parentheses."""
    read = re.findall(f"{_WORDS}（[ぁ-ん]+）", case.text)
    return len(re.findall(_WORDS, case.text)) == len(read)


def _kanji(case: Case) -> bool:
    return case.compares(len(re.findall(_KANJI, case.text)), "kanji_limit")


def _only(letters: str) -> Callable[[Case], bool]:
    """All letters match."""
    right = re.compile(letters)
    return lambda case: all(
        right.match(char) or unicodedata.category(char)[0] != "L" for char in case.text
    )


def _unified_end(case: Case) -> bool:
    sentences = re.split("[。！？]", japanese.without_quotations(case.text))
    return all(not each or each.endswith(case["ending"]) for each in sentences)


def _nominal(case: Case) -> bool:
    """So many sentences end with a noun."""
    tokens = japanese.tokens(japanese.without_quotations(case.text))
    nouns = [
        kind.startswith("名詞") and mark in "。！？" for (_, kind), (mark, _) in pairwise(tokens)
    ]
    return sum(nouns) >= case["count"]


NATIONAL_KINDS: dict[str, Kind] = {
    "special_character:ethel_or_cedilla": Kind(_no_char, "forbidden_char", ("fr",)),
    "special_character:no_accents": Kind(
        _lacks("(?i)[àáâãäåçèéêëìíîïñòóôõöùúûüýÿ]"), languages=("fr",)
    ),
    "special_character:accents": Kind(_accents, "word_to_accentuate", ("fr",)),
    "detectable_content:informal_address": Kind(
        _finds(r"(?i)\b(?:tu|te|t'|toi|ton|ta|tes)\b"), languages=("fr",)
    ),
    "detectable_content:no_digits": Kind(_lacks(r"\d"), languages=("fr",)),
    "special_character:enie": Kind(
        lambda case: _words_with(case, "ñÑ") == case["let_frequency"], "let_frequency", ("es",)
    ),
    "special_character:dieresis": Kind(
        lambda case: _words_with(case, "üÜ") == case["let_frequency"], "let_frequency", ("es",)
    ),
    "special_character:tildes": Kind(_tildes, "num_words relation", ("es",)),
    "punctuation:question_marks": Kind(_encloses("¿", "?"), languages=("es",)),
    "punctuation:exclamation_marks": Kind(_encloses("¡", "!"), languages=("es",)),
    "detectable_format:number_numbered_lists": Kind(_numbered, "num_items", ("ja",)),
    "detectable_format:nominal_ending": Kind(_nominal, "count", ("ja",)),
    "startend:sentence_unified_end": Kind(_unified_end, "ending", ("ja",)),
    "letters:furigana": Kind(_furigana, languages=("ja",)),
    "letters:kansuuji": Kind(_lacks(r"\d"), languages=("ja",)),
    "letters:no_katakana": Kind(_lacks("[ァ-ヺｦ-ﾟ]"), languages=("ja",)),
    "letters:katakana_only": Kind(_only("[ァ-ンー・ｦ-ﾟ]"), languages=("ja",)),
    "letters:no_hiragana": Kind(_lacks("[ぁ-ゖ]"), languages=("ja",)),
    "letters:hiragana_only": Kind(_only("[ぁ-んー]"), languages=("ja",)),
    "letters:kanji": Kind(_kanji, "kanji_limit relation", ("ja",)),
    "punctuation:no_period": Kind(_lacks("。"), languages=("ja",)),
}
