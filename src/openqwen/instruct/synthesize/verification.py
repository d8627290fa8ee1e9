"""Verification functions: model-written Python that says whether a text meets a constraint.

A function is the source of `evaluate(response) -> bool` with whatever it needs. It is untrusted: it
runs in the sandbox alone. Functions and test cases are cross-validated as in AutoIF (Dong et al.
2024, section 3.1): each is judged by the others.
"""

import ast
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openqwen.instruct.synthesize.method import Steps, Work
from openqwen.instruct.synthesize.reading import json_value
from openqwen.sandbox import Limits, Program
from openqwen.support.errors import OpenQwenError
from openqwen.tasks.code import program_of

Outcome = bool | None  # what a function said of a text; None: neither True nor False

_LONGEST = 20_000  # characters of a function
_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
_HANGS = 3  # texts on which a function may end its process before it is given up
# The function is a module of its own, so that code for `__main__` does not run. One character a
# text is written as soon as it is known: where the function ends the process, the others stand.
_DRIVER = """
import json, os, random
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
from verification import evaluate
for response in json.load(open("responses.json", encoding="utf-8")):
    random.seed(0)
    try:
        value = evaluate(response)
    except Exception:
        value = None
    out.write("1" if value is True else "0" if value is False else "-")
    out.flush()
"""


@dataclass(frozen=True)
class VerifierCase:
    """A test case of a verification function: a text, and whether it meets the constraint."""

    response: str
    expected: bool


def read_function(answer: str) -> str | None:
    """The source of `evaluate` in an answer; None where there is none, or it does not compile.

    Imports, definitions and assignments are kept. Other statements, such as examples of a call that
    models like to add, could fail before the function is defined.
    """
    source = program_of(answer, {"entry": "evaluate"}).strip()
    if not source or len(source) > _LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    tree.body = [node for node in tree.body if isinstance(node, _KEPT)]
    return ast.unparse(tree) if "evaluate" in defined else None


def read_cases(answer: str) -> list[VerifierCase]:
    """The test cases in an answer; anything that is none is left out."""
    value = json_value(answer)
    found = []
    for item in value if isinstance(value, list) else []:
        text = item.get("response") if isinstance(item, dict) else None
        expected = _truth(item.get("expected")) if isinstance(item, dict) else None
        if isinstance(text, str) and expected is not None and len(text) <= _LONGEST:
            found.append(VerifierCase(text, expected))
    return list(dict.fromkeys(found))


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def outcomes(
    work: Work, functions: Sequence[str], responses: Sequence[str], seconds: float
) -> Steps[list[list[Outcome]]]:
    """Ask each function about each text, in the sandbox: one row a function.

    A function that hangs, crashes or floods on a text says nothing of it (None), and is given up
    after three such texts, or at once if it does so before its first word.

    Args:
        seconds: CPU time that a function has for all the texts.

    Raises:
        OpenQwenError: the sandbox failed, which says nothing of a function.
    """
    rows: list[list[Outcome]] = [[] for _ in functions]
    failures = [0] * len(functions)
    limits = Limits(seconds=seconds)
    while waiting := [n for n, row in enumerate(rows) if len(row) < len(responses)]:
        programs = [_program(functions[n], responses[len(rows[n]) :], limits) for n in waiting]
        verdicts = yield from work.run(programs)
        for n, verdict in zip(waiting, verdicts, strict=True):
            if verdict.status == "infra":
                raise OpenQwenError(f"The sandbox failed: {verdict.reason}")
            left = len(responses) - len(rows[n])
            marks = verdict.stdout[:left] if set(verdict.stdout) <= set("10-") else ""
            rows[n] += [None if mark == "-" else mark == "1" for mark in marks]
            if len(marks) < left:
                failures[n] += 1
                given_up = failures[n] == _HANGS or not (marks or verdict.status == "timeout")
                rows[n] += [None] * (left - len(marks) if given_up else 1)
    return rows


def _program(function: str, responses: Sequence[str], limits: Limits) -> Program:
    files = {"verification.py": function, "responses.json": json.dumps(list(responses))}
    return Program(_DRIVER, files=files, limits=limits)


def cross_validate(
    table: Sequence[Sequence[Outcome]],
    expected: Sequence[bool],
    case_accuracy: float,
    function_accuracy: float,
) -> tuple[list[int], list[int]]:
    """Keep the cases and the functions that agree with each other.

    A case is kept if more than `case_accuracy` of all functions say what it expects; then a
    function is kept if it is right on more than `function_accuracy` of the kept cases.

    Args:
        table: what each function says of each case, one row a function.

    Returns:
        The indices of the kept functions and of the kept cases.
    """
    cases = [
        n
        for n, truth in enumerate(expected)
        if share([row[n] is truth for row in table]) > case_accuracy
    ]
    functions = [
        n
        for n, row in enumerate(table)
        if share([row[case] is expected[case] for case in cases]) > function_accuracy
    ]
    return functions, cases


def share(hits: Sequence[bool]) -> float:
    """The share of hits; 0 where there is nothing to count."""
    return sum(hits) / len(hits) if hits else 0.0
