"""The kinds of instructions that several languages share, and how each is checked.

A check is a function (response, parameters, language) -> whether the response follows. The verdicts
are those of the reference implementations, google-research/instruction_following_eval (Zhou et al.
2023) and, for French, Spanish and Japanese, M-IFEval (Dussolle et al. 2025). Keywords are plain text
here, where the reference reads regular expressions: no data set uses one.
"""

import json
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openqwen.tasks.instructions import japanese
from openqwen.tasks.instructions.languages import language_of
from openqwen.tasks.instructions.text import (
    capital_words,
    count_lines,
    count_sentences,
    spanish_words,
    without_list_marks,
)

Parameters = Mapping[str, Any]
Check = Callable[[str, Parameters, str], bool]

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "less than": operator.lt,
    "at least": operator.ge,
    "moins de": operator.lt,
    "au moins": operator.ge,
    "al menos": operator.ge,
    "como máximo": operator.le,
    "未満": operator.lt,
    "以上": operator.ge,
}
_OPTIONS = {
    "en": ("My answer is yes.", "My answer is no.", "My answer is maybe."),
    "fr": ("Oui.", "Non.", "Peut-être."),
    "es": ("Sí.", "No.", "Quizás."),
    "ja": ("はい、そうです。", "いいえ、違います。", "どちらとも言えません。"),
}
_TITLES = {"fr": ("##", "##"), "ja": ("『", "』")}  # all others: << and >>
_QUOTES = {"fr": ('""', "''", "«»"), "ja": ("「」",)}
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s", "P.D.": r"p\.\s?d\."}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FORMS = {"es": r"^\s*\*[^*].*$", "ja": r"^\s*・[^・].*$"}  # of bullets; all others: * and -


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Args:
        follows: whether a response follows it, as the reference decides.
        needs: its parameters with their types, see `PARAMETER_TYPES`; those that end with "?" may
            be absent.
        languages: in which it exists.
        mended: the check without the reference's defect, where it has one.
    """

    follows: Check
    needs: Mapping[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ("en", "fr", "es", "ja")
    mended: Check | None = None


def _compare(number: float, parameters: Parameters, name: str, relation: str = "relation") -> bool:
    return RELATIONS[parameters[relation]](number, parameters[name])


# keywords


def _existence(text: str, parameters: Parameters, language: str) -> bool:
    if language == "ja":
        return set(parameters["keywords"]) <= set(japanese.words(text))
    return all(_times(keyword, text) for keyword in parameters["keywords"])


def _frequency(text: str, parameters: Parameters, language: str) -> bool:
    keyword = parameters["keyword"].strip()
    count = japanese.words(text).count(keyword) if language == "ja" else _times(keyword, text)
    return _compare(count, parameters, "frequency")


def _times(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, flags=re.IGNORECASE))


def _forbidden(text: str, parameters: Parameters, language: str) -> bool:
    words = parameters["forbidden_words"]
    if language == "ja":
        return not set(words) & set(japanese.words(text))
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in words)


def _existence_mended(text: str, parameters: Parameters, language: str) -> bool:
    if language != "ja":
        return _existence(text, parameters, language)
    return all(keyword in text for keyword in parameters["keywords"])


def _frequency_mended(text: str, parameters: Parameters, language: str) -> bool:
    if language != "ja":
        return _frequency(text, parameters, language)
    return _compare(text.count(parameters["keyword"].strip()), parameters, "frequency")


def _forbidden_mended(text: str, parameters: Parameters, language: str) -> bool:
    if language != "ja":
        return _forbidden(text, parameters, language)
    return not any(word in text for word in parameters["forbidden_words"])


def _letters(text: str, parameters: Parameters, language: str) -> bool:
    """The reference draws a letter by chance where it does not know the given one, such as "#".

    Here most letters decide in that case.
    """
    letter = parameters["letter"].strip().lower()
    if language == "ja":
        alphabet = [chr(code) for code in range(ord("ぁ"), ord("ん") + 1)]
    else:
        alphabet = list(string.ascii_lowercase)
    counts = _letter_counts(text, language)
    verdicts = [
        _compare(counts[one], parameters, "let_frequency", "let_relation")
        for one in ([letter] if letter in alphabet else alphabet)
    ]
    return 2 * sum(verdicts) > len(verdicts)


def _letters_mended(text: str, parameters: Parameters, language: str) -> bool:
    letter = parameters["letter"].strip().lower()
    count = _letter_counts(text, language)[letter]
    return _compare(count, parameters, "let_frequency", "let_relation")


def _letter_counts(text: str, language: str) -> Counter[str]:
    """How often each letter stands in the text; hiragana count katakana of the same sound too."""
    if language != "ja":
        return Counter(text.lower())
    return Counter(chr(ord(c) - 96) if "ァ" <= c <= "ン" else c for c in text.lower())


# language, case


def _language(text: str, parameters: Parameters, language: str) -> bool:
    """The reference calls Chinese zh-cn or zh-tw; a text without letters follows."""
    detected = language_of(text)
    return detected is None or ("zh-cn" if detected == "zh" else detected) == parameters["language"]


def _language_mended(text: str, parameters: Parameters, language: str) -> bool:
    detected = language_of(text)
    return detected is None or detected == parameters["language"].partition("-")[0]


def _capitals(text: str, parameters: Parameters, language: str) -> bool:
    if language == "es":
        upper = all(char.isupper() or not char.isalpha() for char in text)
    else:
        upper = text.isupper()
    return upper and language_of(text) in (language, None)


def _lowercase(text: str, parameters: Parameters, language: str) -> bool:
    return text.islower() and language_of(text) in (language, None)


def _capital_words(text: str, parameters: Parameters, language: str) -> bool:
    count = capital_words(text, language)
    return _compare(count, parameters, "capital_frequency", "capital_relation")


# length


def _sentences(text: str, parameters: Parameters, language: str) -> bool:
    if language == "ja":
        count = japanese.count_sentences(text)
    else:
        count = count_sentences(without_list_marks(text) if language == "es" else text, language)
    return _compare(count, parameters, "num_sentences")


def _words(text: str, parameters: Parameters, language: str) -> bool:
    if language == "es":
        count = len(spanish_words(without_list_marks(text).replace("\n", " ")))
    else:
        count = len(re.findall(r"\w+", text))
    return _compare(count, parameters, "num_words")


def _characters(text: str, parameters: Parameters, language: str) -> bool:
    return _compare(len(text), parameters, "num_letters")


def _paragraphs(text: str, parameters: Parameters, language: str) -> bool:
    parts = text.split("***")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == parameters["num_paragraphs"]


def _nth_paragraph(text: str, parameters: Parameters, language: str) -> bool:
    """The reference counts paragraphs that are not empty, but takes the nth of all."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    return _begins(parts, count, parameters, language)


def _nth_paragraph_mended(text: str, parameters: Parameters, language: str) -> bool:
    parts = [part for part in text.split("\n\n") if part.strip()]
    if language == "ja":
        parts = [japanese.without_marks(part) for part in parts]
    return _begins(parts, len(parts), parameters, language)


def _begins(parts: list[str], count: int, parameters: Parameters, language: str) -> bool:
    number = parameters["nth_paragraph"]
    if count != parameters["num_paragraphs"] or not 1 <= number <= count:
        return False
    paragraph, word = parts[number - 1].strip(), parameters["first_word"].lower()
    if not paragraph:
        return False
    if language == "ja":
        return paragraph.lstrip("「").lstrip("『").startswith(parameters["first_word"])
    if language == "es":
        expected = word.split()
        words = paragraph.lower().split()[: len(expected)]
        return [each.translate(_NO_PUNCTUATION) for each in words] == expected
    first = paragraph.split()[0].lstrip("'").lstrip('"').lower()
    return re.split(r"[.,?!'\"]", first)[0] == word


# content and format


def _placeholders(text: str, parameters: Parameters, language: str) -> bool:
    # What is not closed is read to the end of its line, so that the search takes linear time.
    found = re.findall(r"\[[^\]\n]*(\])?", text)
    return sum(map(bool, found)) >= parameters["num_placeholders"]


def _postscript(text: str, parameters: Parameters, language: str) -> bool:
    marker = parameters["postscript_marker"].strip()
    plain = re.escape(marker.lower())
    if language != "ja":
        plain = plain.replace(r"\.", ".")  # as in the reference, where a period is any character
    return bool(re.search(_POSTSCRIPTS.get(marker, plain), text.lower()))


def _bullets(text: str, parameters: Parameters, language: str) -> bool:
    count = count_lines(_FORMS.get(language, _FORMS["es"]), text)
    if language not in _FORMS:
        count += count_lines(r"^\s*-.*$", text)
    return count == parameters["num_bullets"]


def _bullets_mended(text: str, parameters: Parameters, language: str) -> bool:
    if language != "ja":
        return _bullets(text, parameters, language)
    forms = (r"^\s*・.*$", r"^\s*\*[^*].*$", r"^\s*-\s+.*$")
    return sum(count_lines(form, text) for form in forms) == parameters["num_bullets"]


def _options(text: str, parameters: Parameters, language: str) -> bool:
    return any(option in text for option in _OPTIONS[language])


def _highlights(text: str, parameters: Parameters, language: str) -> bool:
    if language == "ja":
        found = re.findall(r"《([^\n《》]*)》", text)
    else:
        found = [each.strip("*") for each in re.findall(r"\*[^\n*]*\*", text)]
        found += re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(each.strip()) for each in found) >= parameters["num_highlights"]


def _sections(text: str, parameters: Parameters, language: str) -> bool:
    mark = re.escape(parameters["section_spliter"].strip())
    pattern = rf"第[\d０-９]+{mark}" if language == "ja" else rf"{mark}\s?\d+"
    return len(re.findall(pattern, text)) >= parameters["num_sections"]


def _json(text: str, parameters: Parameters, language: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, parameters: Parameters, language: str) -> bool:
    opening, closing = _TITLES.get(language, ("<<", ">>"))
    for line in text.split("\n"):
        start, end = line.find(opening), line.rfind(closing)
        if start >= 0 and end > start + len(opening):
            if line[start:end].lstrip(opening[0]).rstrip(closing[0]).strip():
                return True
    return False


def _two_responses(text: str, parameters: Parameters, language: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    responses = [part for part in parts if part]
    return len(responses) == 2 and responses[0] != responses[1]


def _repeat(text: str, parameters: Parameters, language: str) -> bool:
    text, prompt = text.strip(), parameters["prompt_to_repeat"].strip()
    if language == "ja":
        return text.startswith(prompt)
    return text.lower().startswith(prompt.lower())


def _end(text: str, parameters: Parameters, language: str) -> bool:
    phrase = parameters["end_phrase"].strip()
    if language == "ja":
        return text.strip().strip("」』").endswith(phrase.strip("」』"))
    text = text.strip().strip('"').lower()
    if language == "es":
        text = text.removesuffix(".")
    return text.endswith(phrase.lower())


def _end_mended(text: str, parameters: Parameters, language: str) -> bool:
    if language == "ja":
        text = text.rstrip("*_` \n")
    return _end(text, parameters, language)


def _quotation(text: str, parameters: Parameters, language: str) -> bool:
    text = text.strip()
    pairs = _QUOTES.get(language, ('""',))
    return len(text) > 1 and any((text[0], text[-1]) == tuple(pair) for pair in pairs)


def _no_comma(text: str, parameters: Parameters, language: str) -> bool:
    return ("、" if language == "ja" else ",") not in text


_WESTERN = ("en", "fr", "es")
SHARED_KINDS: dict[str, Kind] = {
    "keywords:existence": Kind(_existence, {"keywords": "texts"}, mended=_existence_mended),
    "keywords:frequency": Kind(
        _frequency,
        {"keyword": "text", "frequency": "count", "relation": "relation"},
        mended=_frequency_mended,
    ),
    "keywords:forbidden_words": Kind(
        _forbidden, {"forbidden_words": "texts"}, mended=_forbidden_mended
    ),
    "keywords:letter_frequency": Kind(
        _letters,
        {"letter": "letter", "let_frequency": "count", "let_relation": "relation"},
        mended=_letters_mended,
    ),
    "language:response_language": Kind(
        _language, {"language": "text"}, mended=_language_mended
    ),
    "length_constraints:number_sentences": Kind(
        _sentences, {"num_sentences": "count", "relation": "relation"}
    ),
    "length_constraints:number_paragraphs": Kind(_paragraphs, {"num_paragraphs": "count"}),
    "length_constraints:number_words": Kind(
        _words, {"num_words": "count", "relation": "relation"}, _WESTERN
    ),
    "length_constraints:number_letters": Kind(
        _characters, {"num_letters": "count", "relation": "relation"}, ("ja",)
    ),
    "length_constraints:nth_paragraph_first_word": Kind(
        _nth_paragraph,
        {"num_paragraphs": "count", "nth_paragraph": "count", "first_word": "text"},
        mended=_nth_paragraph_mended,
    ),
    "detectable_content:number_placeholders": Kind(
        _placeholders, {"num_placeholders": "count", "relation?": "relation"}
    ),
    "detectable_content:postscript": Kind(_postscript, {"postscript_marker": "text"}),
    "detectable_format:number_bullet_lists": Kind(
        _bullets, {"num_bullets": "count"}, mended=_bullets_mended
    ),
    "detectable_format:constrained_response": Kind(_options),
    "detectable_format:number_highlighted_sections": Kind(
        _highlights, {"num_highlights": "count", "relation?": "relation"}
    ),
    "detectable_format:multiple_sections": Kind(
        _sections, {"section_spliter": "text", "num_sections": "count", "relation?": "relation"}
    ),
    "detectable_format:json_format": Kind(_json),
    "detectable_format:title": Kind(_title),
    "combination:two_responses": Kind(_two_responses),
    "combination:repeat_prompt": Kind(_repeat, {"prompt_to_repeat": "text"}),
    "startend:end_checker": Kind(_end, {"end_phrase": "text"}, mended=_end_mended),
    "startend:quotation": Kind(_quotation),
    "change_case:capital_word_frequency": Kind(
        _capital_words, {"capital_frequency": "count", "capital_relation": "relation"}, _WESTERN
    ),
    "change_case:english_capital": Kind(_capitals, languages=("en",)),
    "change_case:english_lowercase": Kind(_lowercase, languages=("en",)),
    "change_case:french_capital": Kind(_capitals, languages=("fr",)),
    "change_case:french_lowercase": Kind(_lowercase, languages=("fr",)),
    "change_case:spanish_capital": Kind(_capitals, languages=("es",)),
    "change_case:spanish_lowercase": Kind(_lowercase, languages=("es",)),
    "punctuation:no_comma": Kind(_no_comma),
}
