"""Answers that must contain texts, as in needles in a haystack, RULER and LV-Eval.

reference: {"answers": [texts], "match"?: "all", "any" or "keywords"}
    all: the score is the share of the texts that stand in the answer (RULER, `string_match_all`).
    any: it is 1 if one of them does (RULER, `string_match_part`).
    keywords: it is the share of the words of the first text that the answer has too (LV-Eval's
        recall of keywords). Articles and punctuation are left out; stop words count as missing, as
        in LV-Eval's code. Chinese is compared by characters, in place of the words of jieba.
An answer passes with a score of 1. Case does not matter, nor do spaces in Chinese.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from openqwen.tasks.task import Grade, Task

_LONGEST = 100_000  # characters of an answer that are read
_ARTICLES = {"a", "an", "the"}
# LV-Eval's ABANDON_WORDS_EN: such words in an answer prove nothing.
_STOP = {
    "and", "to", "of", "in", "her", "was", "with", "for", "it", "from", "is", "that", "his", "he",
    "by", "she", "they", "or", "at", "because", "be", "on", "are", "their", "what", "as", "had",
    "were", "about", "being", "this", "who", "but", "have", "has", "when", "which", "does",
}  # fmt: skip
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # a Chinese character, or a word


def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Look for the texts of each reference in its answer."""
    grades = []
    for task, answer in zip(tasks, answers, strict=True):
        wanted, text = task.reference["answers"], answer[:_LONGEST]
        if task.reference.get("match", "all") == "keywords":
            score, missing = keyword_recall(wanted[0], text)
        else:
            found = [_plain(one) in _plain(text) for one in wanted]
            missing = [one for one, there in zip(wanted, found) if not there]
            score = sum(found) / len(found)
            if task.reference.get("match") == "any":
                score, missing = float(any(found)), [] if any(found) else missing
        reason = f"missing: {', '.join(missing)[:200]}" if missing else ""
        grades.append(Grade(score >= 1, score, reason))
    return grades


def keyword_recall(keywords: str, answer: str) -> tuple[float, list[str]]:
    """The share of the keywords' words that the answer has, and those that are missing."""
    wanted, given = Counter(_words(keywords)), Counter(_words(answer))
    common = Counter({word: n for word, n in (wanted & given).items() if word not in _STOP})
    missing = wanted - common
    return common.total() / max(1, wanted.total()), list(missing)


def _words(text: str) -> list[str]:
    bare = re.sub(r"[^\w\s]|_", "", text.lower())
    return [word for word in _WORD.findall(bare) if word not in _ARTICLES]


def _plain(text: str) -> str:
    """Small letters, one space in place of white space, none beside Chinese characters."""
    text = " ".join(text.lower().split())
    return re.sub(r"(?<=[\u3400-\u9fff]) | (?=[\u3400-\u9fff])", "", text)


def fault(reference: dict[str, Any]) -> str:
    """What is wrong with a reference, or ""."""
    answers = reference.get("answers")
    if not isinstance(answers, list) or not answers:
        return "'answers' must be a list of texts"
    for one in answers:
        if not isinstance(one, str) or not one.strip():
            return "each of 'answers' must be a text that is not empty"
    if reference.get("match", "all") not in ("all", "any", "keywords"):
        return '\'match\' must be "all", "any" or "keywords"'
    return ""
