"""Programs, run in the sandbox against tests or against cases of input and output.

reference, one of:
    {"tests": asserts, or a definition of check(candidate), "entry"?: the function that they are
     for, "setup"?: statements that run behind the program}: Python alone. The tests run in another
     process than the program (sandbox/checker.py).
    {"inputs": [...], "outputs"?: [...]}: the program reads each text from standard input and must
     write the output beside it; white space at the ends of lines and of the text is forgiven.
     Without outputs it must end with status 0, as programs with tests in other languages do.
and in both:
    "prefix"?: text before the program, such as HumanEval's prompt. The answer may go on with it or
        define the function anew.
    "block"?: "first" or "last" of the fenced blocks is the program; without it the first for tests
        and the last for cases. Blocks that define `entry` go before those that do not.
    "language"?: "python", or another of sandbox/languages.py. "limits"?: fields of Limits.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from openqwen.sandbox import Limits, Program, Verdict, open_pool
from openqwen.sandbox.languages import TABLE
from openqwen.tasks.task import Grade, Task

_LONGEST = 200_000  # characters of an answer that is read
_FENCE = re.compile(r"^[ \t]*```[^\n`]*$\n?", re.MULTILINE)
_LIMITS = {field.name for field in fields(Limits)}
_RIGHT = Grade(True, 1.0, "")


def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Run the program of each answer. A program that fails one case does not see the next.

    Raises:
        OpenQwenError: the sandbox cannot be built here, or a language is not installed.
    """
    grades: dict[int, Grade] = {}
    sources: dict[int, str] = {}
    for index, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
        source = program_of(answer, task.reference) if len(answer) <= _LONGEST else ""
        if source.strip():
            sources[index] = source
        else:
            grades[index] = Grade(False, 0.0, "no program", "no_answer")
    case = 0
    with open_pool() as pool:
        while sources:
            programs = [_program(tasks[index].reference, sources[index], case) for index in sources]
            for index, verdict in zip(list(sources), pool.run(programs), strict=True):
                grade = _grade(tasks[index].reference, verdict, case)
                if not grade.passed or case + 1 >= len(tasks[index].reference.get("inputs", [0])):
                    grades[index] = grade
                    del sources[index]
            case += 1
    return [grades[index] for index in range(len(tasks))]


def program_of(answer: str, reference: dict[str, Any]) -> str:
    """The program in an answer, with the prefix and the set-up around it; "" where there is none.

    Without a fence the whole answer is the program. Text before a closing fence alone is one too:
    the opening fence was part of the prompt.
    """
    entry = reference.get("entry")
    blocks = _blocks(answer)
    if entry:
        defines = re.compile(
            rf"\b(?:def|class)\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*=", re.M
        )
        blocks = [block for block in blocks if defines.search(block)] or blocks
    first = reference.get("block", "last" if "inputs" in reference else "first") == "first"
    code = blocks[0 if first else -1] if blocks else ""
    if not code.strip():
        return ""
    return f"{reference.get('prefix', '')}{code}\n{reference.get('setup', '')}"


def _blocks(answer: str) -> list[str]:
    fences = list(_FENCE.finditer(answer))
    if not fences:
        return [answer]
    before = answer[: fences[0].start()]
    if before.strip() and fences[0].group().strip() == "```" and len(fences) % 2:
        return [before]
    opening, closing = fences[::2], [fence.start() for fence in fences[1::2]]
    ends = [*closing, len(answer)]  # the last block may have been cut off
    return [answer[fence.end() : end] for fence, end in zip(opening, ends)]


def _program(reference: dict[str, Any], source: str, case: int) -> Program:
    limits = Limits(**reference.get("limits", {}))
    if "tests" in reference:
        return Program(
            source, tests=reference["tests"], entry=reference.get("entry"), limits=limits
        )
    language = reference.get("language", "python")
    return Program(source, reference["inputs"][case], language=language, limits=limits)


def _grade(reference: dict[str, Any], verdict: Verdict, case: int) -> Grade:
    if verdict.status == "infra":
        return Grade(False, 0.0, f"the sandbox failed: {verdict.reason}", "infra")
    where = f"case {case + 1}: " if "inputs" in reference else ""
    if not verdict.passed:
        return Grade(False, 0.0, f"{where}{verdict.status}: {verdict.reason}")
    if "outputs" in reference and _lines(verdict.stdout) != _lines(reference["outputs"][case]):
        return Grade(False, 0.0, f"{where}another output")
    return _RIGHT


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def fault(reference: dict[str, Any]) -> str:
    """What is wrong with a reference, or ""."""
    for key in ("tests", "entry", "setup", "prefix"):
        if not isinstance(reference.get(key, ""), str):
            return f"'{key}' must be a text"
    if reference.get("block", "first") not in ("first", "last"):
        return '\'block\' must be "first" or "last"'
    language = reference.get("language", "python")
    if language != "python" and language not in TABLE:
        return f"'language' must be one of {', '.join(['python', *TABLE])}"
    limits = reference.get("limits", {})
    if not isinstance(limits, dict) or not limits.keys() <= _LIMITS:
        return f"'limits' must be an object with some of {', '.join(sorted(_LIMITS))}"
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            return f"'limits.{name}' must be a positive number"
    if "tests" in reference:
        if "inputs" in reference or language != "python":
            return "'tests' are for Python, and without 'inputs'"
        return ""
    inputs = reference.get("inputs")
    outputs = reference.get("outputs", inputs)
    if not (_texts(inputs) and _texts(outputs)) or len(inputs or []) != len(outputs or []):
        return "give 'tests', or as many texts in 'inputs' as in 'outputs'"
    return ""


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
