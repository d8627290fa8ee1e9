"""Translations, by BLEU (Papineni et al. 2002) as sacrebleu computes it.

reference: {"translation": text, "tokenizer"?: one of sacrebleu's that need no download; "13a" is
the default, "zh" is for Chinese, "char" for text without spaces between words}
    The score is the sentence's own BLEU from 0 to 1. BLEU of a whole corpus is not the mean of
    these: the counts of its sentences are added up first.
An answer passes if it is the reference. It needs sacrebleu (`pip install openqwen[translation]`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.tasks.task import Grade, Task

TOKENIZERS = ("13a", "zh", "char", "intl", "none")
_LONGEST = 20_000  # characters of an answer that are read
_ORDERS = 4  # n-grams of 1 to 4 words


def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Compare each answer with its reference."""
    grades = []
    for task, answer in zip(tasks, answers, strict=True):
        wanted, text = task.reference["translation"].strip(), answer.strip()
        score = bleu(counts(text, task.reference), sentence=True)
        grades.append(Grade(text == wanted, score, f"BLEU {100 * score:.1f}"))
    return grades


def counts(answer: str, reference: dict[str, Any]) -> np.ndarray:
    """What BLEU needs of one sentence, [10]: matches and n-grams of 1 to 4 words, both lengths."""
    metric = _metric(reference.get("tokenizer", "13a"))
    found = metric.sentence_score(answer[:_LONGEST], [reference["translation"]])
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len])


def bleu(counted: np.ndarray, sentence: bool = False) -> float:
    """BLEU from 0 to 1 of `counts`, or of their sum. sentence: no n-gram longer than the text."""
    total = counted.tolist()
    found = _metric("13a").compute_bleu(
        total[:_ORDERS],
        total[_ORDERS : 2 * _ORDERS],
        *total[2 * _ORDERS :],
        smooth_method="exp",
        effective_order=sentence,
    )
    return min(1.0, float(found.score) / 100)


@cache
def _metric(tokenizer: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        what = "Translations are graded by sacrebleu, which is not installed."
        raise OpenQwenError(what, do="pip install 'openqwen[translation]'") from None
    return BLEU(tokenize=tokenizer, effective_order=True)


def fault(reference: dict[str, Any]) -> str:
    """What is wrong with a reference, or ""."""
    text = reference.get("translation")
    if not isinstance(text, str) or not text.strip():
        return "'translation' must be a text that is not empty"
    if reference.get("tokenizer", "13a") not in TOKENIZERS:
        return f"'tokenizer' must be one of {', '.join(TOKENIZERS)}"
    return ""
