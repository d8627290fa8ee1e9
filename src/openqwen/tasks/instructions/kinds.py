"""The kinds of instructions that several languages share.

Verdicts are those of the reference implementations: google-research/instruction_following_eval
(Zhou et al. 2023) and, for French, Spanish and Japanese, M-IFEval (Dussolle et al. 2025). Keywords
are plain text here, where the reference reads regular expressions: no data set uses one.
"""

import json
import re
import string
from collections import Counter

from openqwen.tasks.instructions import japanese, text
from openqwen.tasks.instructions.case import Case, Kind
from openqwen.tasks.instructions.languages import language_of

_OPTIONS = {
    "en": ("My answer is yes.", "My answer is no.", "My answer is maybe."),
    "fr": ("Oui.", "Non.", "Peut-être."),
    "es": ("Sí.", "No.", "Quizás."),
    "ja": ("はい、そうです。", "いいえ、違います。", "どちらとも言えません。"),
}
_TITLES = {"fr": ("##", "##"), "ja": ("『", "』")}  # other languages: << and >>
_QUOTES = {"fr": ('""', "''", "«»"), "ja": ("「」",)}
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s", "P.D.": r"p\.\s?d\."}
_BULLETS = {"es": [r"^\s*\*[^*].*$"], "ja": [r"^\s*・[^・].*$"]}
_JAPANESE_BULLETS = [r"^\s*・.*$", r"^\s*\*[^*].*$", r"^\s*-\s+.*$"]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _times(keyword: str, case: Case) -> int:
    """How often a keyword stands in the text. The reference looks among janome's Japanese words."""
    if case.language != "ja":
        return len(re.findall(re.escape(keyword), case.text, re.IGNORECASE))
    return case.text.count(keyword) if case.mended else japanese.words(case.text).count(keyword)


def _existence(case: Case) -> bool:
    return all(_times(keyword, case) for keyword in case["keywords"])


def _frequency(case: Case) -> bool:
    return case.compares(_times(case["keyword"], case), "frequency")


def _forbidden(case: Case) -> bool:
    if case.language == "ja":
        return not any(_times(word, case) for word in case["forbidden_words"])
    words = [rf"\b{re.escape(word)}\b" for word in case["forbidden_words"]]
    return not any(re.search(word, case.text, re.IGNORECASE) for word in words)


def _letters(case: Case) -> bool:
    """The reference draws a letter where it does not know the given one ("#"); here most decide."""
    first, last = "ぁん" if case.language == "ja" else "az"
    alphabet = [chr(code) for code in range(ord(first), ord(last) + 1)]
    asked = case["letter"].lower()
    letters = [asked] if asked in alphabet or case.mended else alphabet
    counts = Counter(case.text.lower())
    if case.language == "ja":  # katakana of the same sound count too
        counts += Counter(chr(ord(char) - 96) for char in case.text if "ァ" <= char <= "ン")
    verdicts = [case.compares(counts[one], "let_frequency", "let_relation") for one in letters]
    return 2 * sum(verdicts) > len(verdicts)


def _language(case: Case) -> bool:
    """A text without letters follows. The reference finds zh-cn where it asks for zh."""
    asked, found = case["language"], language_of(case.text)
    if case.mended:
        return found in (asked.partition("-")[0], None)
    return found is None or asked == ("zh-cn" if found == "zh" else found)


def _capitals(case: Case) -> bool:
    """The reference's detector skips words in capitals; here it reads them in lower case."""
    if case.language == "es":
        upper = all(char.isupper() or not char.isalpha() for char in case.text)
    else:
        upper = case.text.isupper()
    return upper and language_of(case.text) in (case.language, None)


def _lowercase(case: Case) -> bool:
    return case.text.islower() and language_of(case.text) in (case.language, None)


def _capital_words(case: Case) -> bool:
    count = text.capital_words(case.text, case.language)
    return case.compares(count, "capital_frequency", "capital_relation")


def _sentences(case: Case) -> bool:
    return case.compares(text.count_sentences(case.text, case.language), "num_sentences")


def _words(case: Case) -> bool:
    return case.compares(text.count_words(case.text, case.language), "num_words")


def _characters(case: Case) -> bool:
    return case.compares(len(case.text), "num_letters")


def _paragraphs(case: Case) -> bool:
    parts = [part.strip() for part in case.text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == case["num_paragraphs"]


def _nth_paragraph(case: Case) -> bool:
    """The reference counts paragraphs that are not empty, but takes the nth of all."""
    parts = [part.strip() for part in case.text.split("\n\n")]
    count = sum(map(bool, parts))
    if case.mended:
        parts = list(filter(None, parts))
    if count != case["num_paragraphs"] or not 1 <= case["nth_paragraph"] <= count:
        return False
    paragraph, word = parts[case["nth_paragraph"] - 1], case["first_word"]
    if case.language == "ja":
        marked = paragraph.lstrip("「").lstrip("『")
        return (japanese.without_marks(paragraph) if case.mended else marked).startswith(word)
    words = paragraph.lower().split()
    if case.language == "es":
        expected = word.lower().split()
        return [each.translate(_NO_PUNCTUATION) for each in words[: len(expected)]] == expected
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return re.split(r"[.,?!'\"]", first)[0] == word.lower()


def _placeholders(case: Case) -> bool:
    # What is not closed is read to the end of its line, so that the search takes linear time.
    closed = re.findall(r"\[[^\]\n]*(\])?", case.text)
    return sum(map(bool, closed)) >= case["num_placeholders"]


def _postscript(case: Case) -> bool:
    marker = case["postscript_marker"]
    pattern = re.escape(marker.lower())
    if case.language != "ja":
        pattern = pattern.replace(r"\.", ".")  # any character, as in the reference
    return bool(re.search(_POSTSCRIPTS.get(marker, pattern), case.text.lower()))


def _bullets(case: Case) -> bool:
    forms = _BULLETS.get(case.language, [r"^\s*\*[^*].*$", r"^\s*-.*$"])
    if case.language == "ja" and case.mended:
        forms = _JAPANESE_BULLETS
    return sum(text.count_lines(form, case.text) for form in forms) == case["num_bullets"]


def _options(case: Case) -> bool:
    return any(option in case.text for option in _OPTIONS[case.language])


def _highlights(case: Case) -> bool:
    if case.language == "ja":
        found = re.findall(r"《([^\n《》]*)》", case.text)
    else:
        found = [each.strip("*") for each in re.findall(r"\*[^\n*]*\*", case.text)]
        found += re.findall(r"\*\*([^\n*]*)\*\*", case.text)
    return sum(bool(each.strip()) for each in found) >= case["num_highlights"]


def _sections(case: Case) -> bool:
    mark = re.escape(case["section_spliter"])
    pattern = rf"第[\d０-９]+{mark}" if case.language == "ja" else rf"{mark}\s?\d+"
    return len(re.findall(pattern, case.text)) >= case["num_sections"]


def _json(case: Case) -> bool:
    content = case.text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        content = content.removeprefix(fence)
    try:
        json.loads(content.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(case: Case) -> bool:
    opening, closing = _TITLES.get(case.language, ("<<", ">>"))
    for line in case.text.split("\n"):
        start, end = line.find(opening), line.rfind(closing)
        if 0 <= start < end and line[start:end].lstrip(opening[0]).rstrip(closing[0]).strip():
            return True
    return False


def _two_responses(case: Case) -> bool:
    parts = [part.strip() for part in case.text.split("******")]
    responses = [part for part in parts if part]
    return all(parts[1:-1]) and len(responses) == 2 and responses[0] != responses[1]


def _repeat(case: Case) -> bool:
    content, prompt = case.text.strip(), case["prompt_to_repeat"]
    if case.language != "ja":
        content, prompt = content.lower(), prompt.lower()
    return content.startswith(prompt)


def _end(case: Case) -> bool:
    content, phrase = case.text.strip(), case["end_phrase"]
    if case.language == "ja":
        content = content.rstrip("*_` \n") if case.mended else content
        return content.strip("」』").endswith(phrase.strip("」』"))
    content = content.strip('"').lower()
    if case.language == "es":
        content = content.removesuffix(".")
    return content.endswith(phrase.lower())


def _quotation(case: Case) -> bool:
    content = case.text.strip()
    pairs = _QUOTES.get(case.language, ('""',))
    return len(content) > 1 and content[0] + content[-1] in pairs


def _no_comma(case: Case) -> bool:
    return ("、" if case.language == "ja" else ",") not in case.text


_WESTERN = ("en", "fr", "es")
SHARED_KINDS: dict[str, Kind] = {
    "keywords:existence": Kind(_existence, "keywords"),
    "keywords:frequency": Kind(_frequency, "keyword frequency relation"),
    "keywords:forbidden_words": Kind(_forbidden, "forbidden_words"),
    "keywords:letter_frequency": Kind(_letters, "letter let_frequency let_relation"),
    "language:response_language": Kind(_language, "language"),
    "length_constraints:number_sentences": Kind(_sentences, "num_sentences relation"),
    "length_constraints:number_paragraphs": Kind(_paragraphs, "num_paragraphs"),
    "length_constraints:number_words": Kind(_words, "num_words relation", _WESTERN),
    "length_constraints:number_letters": Kind(_characters, "num_letters relation", ("ja",)),
    "length_constraints:nth_paragraph_first_word": Kind(
        _nth_paragraph, "num_paragraphs nth_paragraph first_word"
    ),
    # An optional relation is "at least", whatever is given.
    "detectable_content:number_placeholders": Kind(_placeholders, "num_placeholders relation?"),
    "detectable_content:postscript": Kind(_postscript, "postscript_marker"),
    "detectable_format:number_bullet_lists": Kind(_bullets, "num_bullets"),
    "detectable_format:constrained_response": Kind(_options),
    "detectable_format:number_highlighted_sections": Kind(_highlights, "num_highlights relation?"),
    "detectable_format:multiple_sections": Kind(
        _sections, "section_spliter num_sections relation?"
    ),
    "detectable_format:json_format": Kind(_json),
    "detectable_format:title": Kind(_title),
    "combination:two_responses": Kind(_two_responses),
    "combination:repeat_prompt": Kind(_repeat, "prompt_to_repeat"),
    "startend:end_checker": Kind(_end, "end_phrase"),
    "startend:quotation": Kind(_quotation),
    "change_case:capital_word_frequency": Kind(
        _capital_words, "capital_frequency capital_relation", _WESTERN
    ),
    "change_case:english_capital": Kind(_capitals, languages=("en",)),
    "change_case:english_lowercase": Kind(_lowercase, languages=("en",)),
    "change_case:french_capital": Kind(_capitals, languages=("fr",)),
    "change_case:french_lowercase": Kind(_lowercase, languages=("fr",)),
    "change_case:spanish_capital": Kind(_capitals, languages=("es",)),
    "change_case:spanish_lowercase": Kind(_lowercase, languages=("es",)),
    "punctuation:no_comma": Kind(_no_comma),
}
