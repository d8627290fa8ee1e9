"""The kinds of instructions that one language alone has: French, Spanish or Japanese (M-IFEval)."""

import re
import unicodedata
from collections.abc import Callable

from openqwen.tasks.instructions import japanese
from openqwen.tasks.instructions.kinds import RELATIONS, Check, Kind, Parameters
from openqwen.tasks.instructions.text import count_lines, spanish_words

_INFORMAL = re.compile(r"\b(?:tu|te|t'|toi|ton|ta|tes)\b", re.IGNORECASE)
_ACCENTED = re.compile("[àáâãäåçèéêëìíîïñòóôõöùúûüýÿ]", re.IGNORECASE)
_KANJI = "[\u4e00-\u9faf]"


def _lacks(pattern: str) -> Check:
    """A check that no part of the response matches."""
    return lambda text, parameters, language: not re.search(pattern, text)


def _finds(pattern: str) -> Check:
    """A check that a part of the response matches."""
    return lambda text, parameters, language: bool(re.search(pattern, text))


# French


def _forbidden_char(text: str, parameters: Parameters, language: str) -> bool:
    return not re.search(re.escape(parameters["forbidden_char"]), text, re.IGNORECASE)


def _no_accents(text: str, parameters: Parameters, language: str) -> bool:
    return not _ACCENTED.search(text)


def _informal(text: str, parameters: Parameters, language: str) -> bool:
    return bool(_INFORMAL.search(text))


def _accents(text: str, parameters: Parameters, language: str) -> bool:
    """Each word that is asked for is written with its accents wherever it stands."""
    wanted = parameters["word_to_accentuate"]
    words = re.findall(r"\w+", text.lower())
    return all(word == wanted.get(_plain(word), word) for word in words)


def _plain(word: str) -> str:
    parts = unicodedata.normalize("NFKD", word)
    return "".join(char for char in parts if not unicodedata.combining(char))


# Spanish


def _words_with(characters: str) -> Callable[[str], int]:
    def count(text: str) -> int:
        return sum(any(char in word for char in characters) for word in spanish_words(text))

    return count


def _enie(text: str, parameters: Parameters, language: str) -> bool:
    return _words_with("ñÑ")(text) == parameters["let_frequency"]


def _dieresis(text: str, parameters: Parameters, language: str) -> bool:
    return _words_with("üÜ")(text) == parameters["let_frequency"]


def _tildes(text: str, parameters: Parameters, language: str) -> bool:
    count = _words_with("áéíóúÁÉÍÓÚ")(text)
    return RELATIONS[parameters["relation"]](count, parameters["num_words"])


# Japanese


def _numbered(text: str, parameters: Parameters, language: str) -> bool:
    return count_lines(r"^\s*\d+\.\s.*$", text) == parameters["num_items"]


def _furigana(text: str, parameters: Parameters, language: str) -> bool:
    return len(re.findall(f"{_KANJI}+", text)) == len(re.findall(f"{_KANJI}+（[ぁ-ん]+）", text))


def _kanji(text: str, parameters: Parameters, language: str) -> bool:
    count = len(re.findall(_KANJI, text))
    return RELATIONS[parameters["relation"]](count, parameters["kanji_limit"])


def _only(letters: str) -> Check:
    """A check that all letters of the response match."""
    pattern = re.compile(letters)
    return lambda text, parameters, language: all(
        pattern.match(char) or not japanese.is_letter(char) for char in text
    )


def _unified_end(text: str, parameters: Parameters, language: str) -> bool:
    sentences = re.split("[。！？]", japanese.without_quotations(text))
    return all(not each or each.endswith(parameters["ending"]) for each in sentences)


def _nominal(text: str, parameters: Parameters, language: str) -> bool:
    """So many sentences end with a noun."""
    tokens = japanese.tokens(japanese.without_quotations(text))
    ends = [
        kind.startswith("名詞") and mark in "。！？"
        for (_, kind), (mark, _) in zip(tokens, tokens[1:])
    ]
    return sum(ends) >= parameters["count"]


NATIONAL_KINDS: dict[str, Kind] = {
    "special_character:ethel_or_cedilla": Kind(_forbidden_char, {"forbidden_char": "text"}, ("fr",)),
    "special_character:no_accents": Kind(_no_accents, languages=("fr",)),
    "special_character:accents": Kind(_accents, {"word_to_accentuate": "words"}, ("fr",)),
    "detectable_content:informal_address": Kind(_informal, languages=("fr",)),
    "detectable_content:no_digits": Kind(_lacks(r"\d"), languages=("fr",)),
    "special_character:enie": Kind(_enie, {"let_frequency": "count"}, ("es",)),
    "special_character:dieresis": Kind(_dieresis, {"let_frequency": "count"}, ("es",)),
    "special_character:tildes": Kind(
        _tildes, {"num_words": "count", "relation": "relation"}, ("es",)
    ),
    "punctuation:question_marks": Kind(_finds(r"¿[¿\s]*[^?¿\s][^?]*\?"), languages=("es",)),
    "punctuation:exclamation_marks": Kind(_finds(r"¡[¡\s]*[^!¡\s][^!]*!"), languages=("es",)),
    "detectable_format:number_numbered_lists": Kind(_numbered, {"num_items": "count"}, ("ja",)),
    "detectable_format:nominal_ending": Kind(_nominal, {"count": "count"}, ("ja",)),
    "startend:sentence_unified_end": Kind(_unified_end, {"ending": "text"}, ("ja",)),
    "letters:furigana": Kind(_furigana, languages=("ja",)),
    "letters:kansuuji": Kind(_lacks(r"\d"), languages=("ja",)),
    "letters:no_katakana": Kind(_lacks("[ァ-ヺｦ-ﾟ]"), languages=("ja",)),
    "letters:katakana_only": Kind(_only("[ァ-ンー・ｦ-ﾟ]"), languages=("ja",)),
    "letters:no_hiragana": Kind(_lacks("[ぁ-ゖ]"), languages=("ja",)),
    "letters:hiragana_only": Kind(_only("[ぁ-んー]"), languages=("ja",)),
    "letters:kanji": Kind(_kanji, {"kanji_limit": "count", "relation": "relation"}, ("ja",)),
    "punctuation:no_period": Kind(_lacks("。"), languages=("ja",)),
}
