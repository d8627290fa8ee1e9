"""Answers to mathematical problems: numbers first, then math-verify in the sandbox.

reference["answer"] is a number or LaTeX, as GSM8K and MATH have it. The rules in order:
1. A numeric reference is compared with the number that the answer gives (numbers.py). Their exact
   values decide: math-verify's tolerance is absolute, and to it 1/2^99 equals 1/2^98.
2. The same text, but for white space, is right.
3. math-verify parses both and compares them. It may hang, raise or ask for all the memory, so it
   runs in the sandbox (math_check.py): that costs a verdict, and no worker of the caller's.
Without math-verify (`pip install openqwen[math]`) what the first two rules do not accept is wrong.
"""

import functools
import json
import re
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from openqwen.sandbox import Limits, Pool, Program, Verdict, best_tier
from openqwen.support.command import command, pip_install
from openqwen.tasks.numbers import (
    Number,
    equal_numbers,
    last_boxed,
    last_number,
    marked_answer,
    parse_number,
    phrase_number,
)
from openqwen.tasks.task import Grade, Task

_LONGEST = 20_000  # characters at the end of an answer that are read
_TAIL = 4_000  # of them, for math-verify
_PACKAGES = ("mpmath", "sympy", "antlr4", "latex2sympy2_extended", "math_verify")
_CHUNK = 16  # pairs that one run of the sandbox compares, one after another
_SECONDS = 6  # CPU time of a pair; math-verify ends what it can after 3
_RIGHT = Grade(True, 1.0, "")


def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Grade each answer by the rules above."""
    grades: list[Grade] = []
    unclear: dict[int, tuple[str, str]] = {}  # index -> (reference, answer)
    for index, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
        reference, text = task.reference["answer"], answer[-_LONGEST:]
        grade = _quick_grade(reference, text)
        if grade is None:
            unclear[index] = (reference, text[-_TAIL:])
        grades.append(
            grade or Grade(False, 0.0, "not the same text; math-verify cannot be used here")
        )
    if unclear and has_math_verify():
        grades_of_unclear = _verify(list(unclear.values()))
        for index, grade in zip(unclear, grades_of_unclear, strict=True):
            grades[index] = grade
    return grades


def version() -> str:
    """Grades of formulas are other ones where math-verify cannot be used."""
    return "1 with math-verify" if has_math_verify() else "1"


@functools.cache
def has_math_verify() -> bool:
    """Whether math-verify can be used; warns once where it cannot."""
    missing = ""
    if find_spec("math_verify") is None:
        missing = f"math-verify is not installed ({pip_install('openqwen[math]')})"
    elif best_tier() == "none":
        missing = f"this machine has no sandbox for math-verify ({command('sandbox', '--check')})"
    if missing:
        warnings.warn(
            f"The grader 'math' compares only numbers and texts: {missing}.", stacklevel=2
        )
    return not missing


def _quick_grade(reference: str, answer: str) -> Grade | None:
    """The grade by the first two rules; None where they do not decide."""
    marked = marked_answer(answer)
    final = answer if marked is None else marked
    if expected := parse_number(reference):
        number = _number(answer, marked)
        if number:
            right = equal_numbers(expected, number)
            return _RIGHT if right else Grade(False, 0.0, f"{str(number.value)[:40]} is not right")
    if _plain(final) == _plain(reference):
        return _RIGHT
    if not final.strip() or (expected and not re.search(r"\\|\d", final)):
        return Grade(False, 0.0, "no answer", "no_answer")
    return None


def _number(answer: str, marked: str | None) -> Number | None:
    if marked is not None:
        return parse_number(marked) if marked == last_boxed(answer) else phrase_number(marked)
    if number := parse_number(answer):
        return number
    # LaTeX without a mark: its last number may be a part of a formula.
    latex = "\\" in answer or re.search(r"\$[^$\n]+\$[.\s]*\Z", answer)
    return None if latex and has_math_verify() else last_number(answer)


def _plain(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text.strip())
    return re.sub(r"\s+|\\[,;!]|\\left|\\right|^\$|\$$|\.$", "", text)


def _verify(pairs: Sequence[tuple[str, str]]) -> list[Grade]:
    """Grades of pairs (reference, answer) by math-verify.

    A run prints one line for each pair. Where it ends early, the pair that it was at is lost, and
    the pairs behind it go into the next round.
    """
    source = Path(__file__).with_name("math_check.py").read_text(encoding="utf-8")
    grades: dict[int, Grade] = {}
    with Pool(tier=best_tier(), packages=_PACKAGES) as pool:
        remaining = list(range(len(pairs)))
        while remaining:
            chunks = [remaining[i : i + _CHUNK] for i in range(0, len(remaining), _CHUNK)]
            programs = [_program(source, [pairs[index] for index in chunk]) for chunk in chunks]
            remaining = []
            for chunk, verdict in zip(chunks, pool.run(programs), strict=True):
                lines = verdict.stdout.splitlines()[: len(chunk)]
                grades.update(zip(chunk, map(_grade, lines)))
                if len(lines) < len(chunk):
                    grades[chunk[len(lines)]] = _lost(verdict)
                    remaining += chunk[len(lines) + 1 :]
    return [grades[index] for index in range(len(pairs))]


def _program(source: str, pairs: Sequence[tuple[str, str]]) -> Program:
    limits = Limits(seconds=_SECONDS * (len(pairs) + 1), memory_mb=1024)
    return Program(source, json.dumps({"pairs": pairs, "seconds": _SECONDS}), limits=limits)


def _grade(line: str) -> Grade:
    if line == "equal":
        return _RIGHT
    if line == "no answer":
        return Grade(False, 0.0, line, "no_answer")
    return Grade(False, 0.0, f"math-verify: {line}")


def _lost(verdict: Verdict) -> Grade:
    if verdict.status == "infra":
        return Grade(False, 0.0, f"the sandbox failed: {verdict.reason}", "infra")
    return Grade(False, 0.0, f"math-verify did not end ({verdict.status})")
