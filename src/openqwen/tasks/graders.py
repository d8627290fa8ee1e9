"""Graders by name. A grader judges a batch of answers, so that costly ones can share their work.

A new grader is one function and one line of `GRADERS`. It gets whole tasks: a reward model or a
judge needs the prompt beside the reference.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.tasks import choice, code, mathematics
from openqwen.tasks.task import Grade, Task

_LONGEST = 200  # characters of an answer that is read, or four times the reference's


@dataclass(frozen=True)
class Grader:
    """How one kind of answer is graded.

    Args:
        judge: (tasks, answers) -> one grade each. Every text must be safe to pass.
        fault: what is wrong with a reference, as the end of a sentence; "" where nothing is.
    """

    judge: Callable[[Sequence[Task], Sequence[str]], list[Grade]]
    fault: Callable[[dict[str, Any]], str]


def grade(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Grade one answer to each task, in order. Each grader is called once, with all its answers.

    An answer that occurs twice to the same prompt and reference is graded once.

    Raises:
        OpenQwenError: a task's grader is unknown, or its reference does not fit the grader.
        ValueError: there are not as many answers as tasks.
    """
    keys = []
    index_of: dict[str, dict[str, int]] = {}  # grader -> content -> where it occurs first
    for index, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
        check_task(task, f"task {task.id}")
        key = json.dumps([task.prompt, task.reference, answer])
        index_of.setdefault(task.grader, {}).setdefault(key, index)
        keys.append((task.grader, key))
    grades: dict[tuple[str, str], Grade] = {}
    for name, indices in index_of.items():
        batch = GRADERS[name].judge(
            [tasks[i] for i in indices.values()], [answers[i] for i in indices.values()]
        )
        grades.update(zip(((name, key) for key in indices), batch, strict=True))
    return [grades[key] for key in keys]


def check_task(task: Task, where: str) -> None:
    """Raise OpenQwenError where a task's grader is unknown, or its reference does not fit it."""
    if task.grader not in GRADERS:
        what = f"There is no grader '{task.grader}'.{suggestion(task.grader, GRADERS)}"
        raise OpenQwenError(what, where, f"use one of: {', '.join(GRADERS)}")
    if fault := GRADERS[task.grader].fault(task.reference):
        what = f"The reference does not fit the grader '{task.grader}': {fault}."
        raise OpenQwenError(what, where, "correct the reference or the grader")


def _short(fault: Callable[[dict[str, Any], str], str]) -> Callable[..., list[Grade]]:
    """A grader of short answers, by a function (reference, answer) -> why it is wrong, or "".

    White space around an answer is forgiven. An answer that is far longer than the reference's is
    wrong unread: it could cost the parser any amount of time.
    """

    def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
        grades = []
        for task, answer in zip(tasks, answers, strict=True):
            longest = max(_LONGEST, 4 * len(task.reference["answer"]))
            text = answer.strip() if len(answer) <= 10 * longest else answer
            if len(text) > longest:
                reason = f"longer than {longest} characters"
            else:
                reason = fault(task.reference, text)
            grades.append(Grade(not reason, float(not reason), reason))
        return grades

    return judge


def _exact(reference: dict[str, Any], answer: str) -> str:
    return "" if answer == reference["answer"].strip() else "not the right answer"


def _json(reference: dict[str, Any], answer: str) -> str:
    try:
        equal = _canonical(answer) == _canonical(reference["answer"])
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return "" if equal else "another JSON value"


def _canonical(text: str) -> str:
    """JSON in one form: the same text for values that are equal, types too (1 is not 1.0)."""
    return json.dumps(json.loads(text, object_pairs_hook=_unique), sort_keys=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _regex(reference: dict[str, Any], answer: str) -> str:
    return "" if re.fullmatch(reference["pattern"], answer) else "does not match the pattern"


def _answer_fault(reference: dict[str, Any]) -> str:
    return "" if isinstance(reference.get("answer"), str) else "'answer' must be a text"


def _json_fault(reference: dict[str, Any]) -> str:
    if fault := _answer_fault(reference):
        return fault
    try:
        _canonical(reference["answer"])
    except (ValueError, RecursionError) as error:
        return f"'answer' must be JSON: {error}"
    return ""


def _regex_fault(reference: dict[str, Any]) -> str:
    pattern = reference.get("pattern")
    if not isinstance(pattern, str):
        return "'pattern' must be a text"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"'pattern' must be a regular expression: {error}"
    return _answer_fault(reference)


# exact, json, regex compare the whole answer, without white space around it, with
# reference["answer"]. exact: the same text. json: an equal JSON value, no key twice.
# regex: reference["pattern"] matches all of it; `answer` is an example. Python's `re` has no time
# limit: a pattern must not backtrack without bounds.
# choice, math, code: see their files.
GRADERS: dict[str, Grader] = {
    "choice": Grader(choice.judge, choice.fault),
    "code": Grader(code.judge, code.fault),
    "exact": Grader(_short(_exact), _answer_fault),
    "json": Grader(_short(_json), _json_fault),
    "math": Grader(mathematics.judge, _answer_fault),
    "regex": Grader(_short(_regex), _regex_fault),
}
