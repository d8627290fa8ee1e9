"""Multiple-choice questions: which letter an answer chooses.

The first rule that matches decides, by its last match in the answer:
1. a box: \\boxed{B}, \\boxed{\\text{(B)}}, \\boxed{B. Paris};
2. a phrase: "answer is (B)", "answer: B", "correct option is B", "答案是B" (MMLU-Pro's two rules
   and their Chinese forms);
3. a first line that begins with the letter: "B", "(B)", "**B**", "B. Paris", not "(A) is wrong";
4. a letter in parentheses, brackets or bold: "(B)", "[[B]]", "**B**";
5. a letter alone, as a word. "A" and "I" before a small letter are words of English.
An answer that offers two letters at once, as "A or B", chooses none.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from openqwen.tasks.numbers import last_boxed
from openqwen.tasks.task import Grade, Task

_LONGEST = 20_000  # characters at the end of an answer that are read
_LETTERS = "ABCD"


def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Compare the letter that each answer chooses with reference["answer"]."""
    grades = []
    for task, answer in zip(tasks, answers, strict=True):
        letter = chosen_letter(answer, task.reference.get("letters", _LETTERS))
        if letter is None:
            grades.append(Grade(False, 0.0, "no letter is chosen", "no_answer"))
        else:
            right = letter == task.reference["answer"]
            grades.append(Grade(right, float(right), "" if right else f"{letter} is chosen"))
    return grades


def chosen_letter(answer: str, letters: str = _LETTERS) -> str | None:
    """The letter that an answer chooses by the rules above; None where it chooses none."""
    text = answer.strip()[-_LONGEST:]
    boxed = last_boxed(text)
    if boxed is not None:
        text = re.sub(r"\\\w+|[{}$]", " ", boxed).strip()
        return _last(_rules(letters)[1:], text)
    return _last(_rules(letters), text)


def _last(rules: Sequence[re.Pattern[str]], text: str) -> str | None:
    for rule in rules:
        matches = list(rule.finditer(text))
        if matches:
            letter, second = matches[-1]["letter"], matches[-1].groupdict().get("second")
            return None if second and second != letter else str(letter).upper()
    return None


@cache
def _rules(letters: str) -> list[re.Pattern[str]]:
    upper, lower = f"[{re.escape(letters)}]", f"[{re.escape(letters.lower())}]"
    opened, closed = r"[\s*_$(\[{:：]*", r"(?![A-Za-z0-9'’])"
    second = rf"(?:[)\]*]*\s*(?:or|and|or else|,|/|或|和)\s*[(\[*]*(?P<second>{upper}){closed})?"
    letter = rf"(?P<letter>{upper}{closed}|{lower}(?=[).:\]]|\s*$))"
    noun = r"(?:answer|option|choice)"
    phrases = rf"(?i:{noun}(?:\s+is|\s*[:=：]))|答案(?:是|为|选)?[:：]?|[应故]?选(?:择)?[:：]?"
    word = rf"(?<![A-Za-z0-9'’\\])(?P<letter>{upper}){closed}"
    article = r"(?!(?<=[AI])\s+[a-z])"
    return [
        re.compile(rf"(?:{phrases}){opened}(?:(?i:option|choice|the)\s+)*{opened}{letter}{second}"),
        re.compile(
            rf"\A[\s*(\[]*{letter}(?!\W{{0,3}}(?:is|are|was)\b)(?:(?=[).:\]*,]|\s*(?:\n|\Z))){second}"
        ),
        re.compile(rf"(?:\(|\[|\*\*)(?P<letter>{upper})(?:\)|\]|\*\*|[.:])"),
        re.compile(rf"{word}{article}{second}"),
    ]


def fault(reference: dict[str, Any]) -> str:
    """What is wrong with a reference, or ""."""
    letters = reference.get("letters", _LETTERS)
    if not isinstance(letters, str) or not re.fullmatch("[A-Z]+", letters):
        return "'letters' must be capital letters, such as \"ABCD\""
    answer = reference.get("answer")
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        return f"'answer' must be one letter of {letters}"
    return ""
