"""Numbers in answers: which one is the final answer, and when two numbers are equal."""

import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 100  # characters of a number with its unit
_TOLERANCE = Fraction(1, 10**6)  # of a decimal that stands for a fraction, as 0.333333 for 1/3

_PLAIN = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_FRACTION = r"\\frac\s*(?:\{\s*(?P<top>[-+]?\d+)\s*\}|(?P<top1>\d)\s*)" + (
    r"(?:\{\s*(?P<bottom>\d+)\s*\}|(?P<bottom1>\d))"
)
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*[$€£¥]?\s*(?P<sign2>-?)"
    rf"(?:(?P<whole>\d+)?\s*{_FRACTION}"
    r"|(?:(?P<whole2>\d+)\s+)?(?P<top2>\d+)\s*/\s*(?P<bottom2>\d+)(?!\d|\.\d)"
    rf"|(?P<plain>{_PLAIN}))"
    r"(?:\s*(?P<percent>%|percent(?:age)?\b|pct\b))?"
)
# Words behind a number that are its unit. "2 pi" and "5 or 6" are no numbers with a unit.
_UNIT = re.compile(r"(?:\s*[$€£¥])?(?:\s+(?!(?:pi|sqrt|or|and|to)\b)[A-Za-z]{2}[A-Za-z ./²³]*)?")
_LATEX_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{(?!\s*[ei]\s*\})[^{}\d]*\}(?:\^\{?\d\}?)?$")
_VARIABLE = re.compile(r"\d[A-Za-z]\b|\b[x-z]\b")
# What shows that a number is the first part of a formula, of a list or of a decimal with a comma.
_GOES_ON = re.compile(r",\d|\s*[+*/^(]|\s*-\s*\d|[A-Za-z]\b|\s*(?:pi|sqrt)\b|\s*[π√]")
_NAME = re.compile(r"[A-Za-z](?:_?\w)?\s*=\s*")
_PHRASE = re.compile(r"(?:[Aa]nswer|ANSWER)\s*(?:is|are|[:=：])\s*:?|答案(?:是|为|[:：])")
# In a text, digits that are a part of a word are no number.
_INSIDE = re.compile(rf"(?<![A-Za-z0-9.]){_NUMBER.pattern}")


@dataclass(frozen=True)
class Number:
    """A number as it is written. decimal: with a decimal point. percent: with a percent sign."""

    value: Fraction
    decimal: bool
    percent: bool


def parse_number(text: str) -> Number | None:
    """The number that a text is, with its currency or unit; None where it is anything else.

    Read are 1,234.5, 1/2, 1 1/2, \\frac{1}{2} and 5%, also behind "x =". "1,5" is None: it may be
    a list or a decimal comma.
    """
    text = text.strip().strip("$*` \n").rstrip(".")
    if len(text) > _LONGEST:
        return None
    text = _NAME.sub("", _without_latex(text), count=1)
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text)
    match = _NUMBER.match(text)
    if match is None or not _UNIT.fullmatch(text, match.end()):
        return None
    return _value(match)


def last_number(text: str) -> Number | None:
    """The last number in a text: GSM8K's rule for an answer without a mark.

    None also where it stands behind a comma and a digit, as in "1000,99": that may be one number.
    """
    text = _without_latex(text)
    matches = list(_INSIDE.finditer(text))
    if not matches or re.search(r"\d,$", text[: matches[-1].start()]):
        return None
    return _value(matches[-1])


def marked_answer(text: str) -> str | None:
    """The final answer where a text marks it.

    It is the content of the last \\boxed{…}; else the line of the first "####" with a number, as
    GSM8K reads it; else what follows the last "answer is" or "answer:". Such a phrase with a number
    goes before a box that stands earlier.
    """
    phrase = ""
    if starts := [match.end() for match in _PHRASE.finditer(text)]:
        line = text[starts[-1] :].strip().partition("\n")[0]
        phrase = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip("* ")
    boxed = last_boxed(text)
    if boxed is not None:
        later = starts and starts[-1] > text.rindex("boxed") and re.search(r"\d", phrase)
        return phrase if later else boxed
    if mark := re.search(r"####[ \t]*([-+$\\\d.].*)", text):
        return mark[1].strip()
    return phrase or None


def phrase_number(phrase: str) -> Number | None:
    """The number of a phrase such as "3 + 4 = 7 apples in all": the first after the last "="."""
    if number := parse_number(phrase):
        return number
    left, _, right = _without_latex(phrase).rpartition("=")
    match = None if "\\" in right or _VARIABLE.search(left) else _INSIDE.search(right)
    return None if match is None or _GOES_ON.match(right, match.end()) else _value(match)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} whose braces are balanced."""
    opened: list[re.Match[str]] = []
    last = (0, "")  # where the content starts, and the content
    for token in re.finditer(r"\\boxed\s*\{|\{|\}", text):
        if token[0] != "}":
            opened.append(token)
        elif opened:
            start = opened.pop()
            if start[0] != "{":
                last = max(last, (start.end(), text[start.end() : token.start()]))
    return last[1].strip() if last[0] else None


def equal_numbers(reference: Number, answer: Number) -> bool:
    """Whether two numbers are equal. 50% equals both 50 and 0.5; a decimal equals a fraction that
    it gives to six digits.
    """
    values = [answer.value]
    if reference.percent and not answer.percent:
        values.append(answer.value * 100)
    elif answer.percent and not reference.percent:
        values.append(answer.value / 100)
    tolerance = Fraction(0)
    for exact, other in ((reference, answer), (answer, reference)):
        if other.decimal and exact.value.denominator > 1 and not exact.decimal:
            tolerance = abs(exact.value) * _TOLERANCE
    return any(abs(reference.value - value) <= tolerance for value in values)


def _without_latex(text: str) -> str:
    text = re.sub(r"\\[!,;:] ?|\\left|\\right", "", text).replace("\\ ", " ").replace("~", " ")
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("−", "-")
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _LATEX_UNIT.sub("", text.rstrip())
    return text.strip()


def _value(match: re.Match[str]) -> Number | None:
    parts = match.groupdict()
    try:
        if parts["plain"]:
            value = Fraction(parts["plain"].replace(",", "").rstrip("."))
        else:
            top = parts["top"] or parts["top1"] or parts["top2"]
            bottom = parts["bottom"] or parts["bottom1"] or parts["bottom2"]
            value = Fraction(int(top), int(bottom)) + int(parts["whole"] or parts["whole2"] or 0)
    except (ValueError, ZeroDivisionError):  # thousands of digits, or no fraction
        return None
    negative = "-" in (parts["sign"], parts["sign2"])
    decimal = "." in (parts["plain"] or "").rstrip(".")
    return Number(-value if negative else value, decimal, bool(parts["percent"]))
