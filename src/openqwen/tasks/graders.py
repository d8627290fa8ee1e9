"""Graders by name. A grader judges a batch of answers, so that costly ones can share their work.

A new grader is one function and one line of `GRADERS`. It gets whole tasks: a reward model or a
judge needs the prompt beside the reference.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.progress import Progress
from openqwen.tasks import (
    choice,
    code,
    contains,
    instructions,
    judge,
    mathematics,
    pairwise,
    reward,
    translation,
)
from openqwen.tasks.cache import GradeCache
from openqwen.tasks.models import GraderModel
from openqwen.tasks.task import Grade, Task

_LONGEST = 200  # characters of an answer that is read, or four times the reference's
_PART = 512  # answers graded at a time where grades are cached or progress is shown
_PART_ASKED = 64  # the same where a model is asked, which may be slow


@dataclass(frozen=True)
class Grader:
    """How one kind of answer is graded.

    Args:
        judge: (tasks, answers) -> one grade each. Every text must be safe to pass.
        fault: what is wrong with a reference, as the end of a sentence; "" where nothing is.
        asks: the method of a model that it needs; `judge` then gets a third argument, the
            `GraderModel` of each task. "": it needs no model.
        model: the name of that model where a reference names none; "": the grader's own name.
        version: another text whenever the same answer may get another grade.
    """

    judge: Callable[..., list[Grade]]
    fault: Callable[[dict[str, Any]], str]
    asks: Literal["", "generate", "score"] = ""
    model: str = ""
    version: Callable[[], str] = lambda: "1"


def grade(
    tasks: Sequence[Task],
    answers: Sequence[str],
    *,
    models: Mapping[str, GraderModel] | None = None,
    cache: GradeCache | None = None,
    progress: Progress | None = None,
) -> list[Grade]:
    """Grade one answer to each task, in order. Each grader is called once, with all its answers.

    An answer that occurs twice to the same prompt and reference is graded once.

    Args:
        models: the models that graders ask, by name. A task's reference["model"] names its model;
            without it the name is "judge" for `judge` and `pairwise`, and "reward" for `reward`.
        cache: grades that are known are taken from it, others are added, some hundred at a time.
        progress: advanced by 1 with each answer.

    Raises:
        OpenQwenError: a task's grader is unknown, its reference does not fit the grader, or its
            model is missing; nothing is graded.
        ValueError: there are not as many answers as tasks.
    """
    graders = _used(tasks)
    versions = {name: "" if cache is None else one.version() for name, one in graders.items()}
    keys: list[bytes] = []
    asked: dict[bytes, _Asked] = {}
    for task, answer in zip(tasks, answers, strict=True):
        one = _Asked(task, answer, _model_of(task, models or {}))
        keys.append(one.key(versions[task.grader]))
        asked.setdefault(keys[-1], one)
    grades = {} if cache is None else cache.find(asked)
    waiting: dict[str, list[bytes]] = {}  # by grader
    for key, one in asked.items():
        if key not in grades:
            waiting.setdefault(one.task.grader, []).append(key)
    if progress is not None:
        progress.advance(len(keys) - sum(map(len, waiting.values())))
    for name, new in waiting.items():
        size = _PART_ASKED if GRADERS[name].asks else _PART
        if cache is None and progress is None:
            size = len(new)
        for part in (new[start : start + size] for start in range(0, len(new), size)):
            batch = dict(zip(part, _judge(name, [asked[key] for key in part]), strict=True))
            grades |= batch
            if cache is not None:
                cache.keep({key: grade for key, grade in batch.items() if asked[key].lasts})
            if progress is not None:
                progress.advance(len(part))
    return [grades[key] for key in keys]


@dataclass(frozen=True)
class _Asked:
    """An answer to grade, with the model that its grader asks."""

    task: Task
    answer: str
    model: GraderModel | None

    def key(self, version: str) -> bytes:
        """What the grade depends on, in 16 bytes."""
        task, model = self.task, self.model
        by = [task.grader, version]
        if model:
            by += [model.identity or str(id(model)), repr(model.sampling)]
        content = json.dumps([by, task.prompt, task.reference, self.answer], sort_keys=True)
        return hashlib.sha256(content.encode()).digest()[:16]

    @property
    def lasts(self) -> bool:
        """False: the model has no identity, so it may be another one next time."""
        return self.model is None or bool(self.model.identity)


def _used(tasks: Sequence[Task]) -> dict[str, Grader]:
    """The graders of tasks, all of which are checked."""
    for task in tasks:
        check_task(task, f"task {task.id}")
    return {task.grader: GRADERS[task.grader] for task in tasks}


def _model_of(task: Task, models: Mapping[str, GraderModel]) -> GraderModel | None:
    method = GRADERS[task.grader].asks
    if not method:
        return None
    name = task.reference.get("model", GRADERS[task.grader].model or task.grader)
    if name not in models:
        what = f"The grader '{task.grader}' needs a model '{name}'.{suggestion(name, models)}"
        do = f"pass models={{'{name}': GraderModel(...)}} to grade"
        raise OpenQwenError(what, f"task {task.id}", do)
    if not hasattr(models[name].model, method):
        what = f"The model '{name}' has no method '{method}', which '{task.grader}' needs."
        raise OpenQwenError(what, f"task {task.id}", "give another model")
    return models[name]


def _judge(name: str, asked: Sequence[_Asked]) -> list[Grade]:
    given: list[Any] = [[one.task for one in asked], [one.answer for one in asked]]
    if GRADERS[name].asks:
        given.append([one.model for one in asked])
    return GRADERS[name].judge(*given)


def check_task(task: Task, where: str) -> None:
    """Raise OpenQwenError where a task's grader is unknown, or its reference does not fit it."""
    if task.grader not in GRADERS:
        what = f"There is no grader '{task.grader}'.{suggestion(task.grader, GRADERS)}"
        raise OpenQwenError(what, where, f"use one of: {', '.join(GRADERS)}")
    fault = GRADERS[task.grader].fault(task.reference)
    if not fault and not isinstance(task.reference.get("model", ""), str):
        fault = "'model' must be a text"
    if fault:
        what = f"The reference does not fit the grader '{task.grader}': {fault}."
        raise OpenQwenError(what, where, "correct the reference or the grader")


def _short(fault: Callable[[dict[str, Any], str], str]) -> Callable[..., list[Grade]]:
    """A grader of short answers, by a function (reference, answer) -> why it is wrong, or "".

    White space around an answer is forgiven, and so is reference["closing"] behind it. An answer
    that is far longer than the reference's is wrong unread: it could cost the parser any
    amount of time.
    """

    def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
        grades = []
        for task, answer in zip(tasks, answers, strict=True):
            longest = max(_LONGEST, 4 * len(task.reference["answer"]))
            text = answer.strip() if len(answer) <= 10 * longest else answer
            if closing := task.reference.get("closing"):
                text = _without(text, closing)
            if len(text) > longest:
                reason = f"longer than {longest} characters"
            else:
                reason = fault(task.reference, text)
            grades.append(Grade(not reason, float(not reason), reason))
        return grades

    return judge


def _short_version() -> str:
    """The version of the graders of short answers."""
    return "2"  # a closing may stand on the answer's own line


def _without(text: str, closing: str) -> str:
    """The text without a closing that white space separates from the rest."""
    rest = text.removesuffix(closing)
    return rest.rstrip() if rest[-1:].isspace() else text


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
    if not isinstance(reference.get("answer"), str):
        return "'answer' must be a text"
    return "" if isinstance(reference.get("closing", ""), str) else "'closing' must be a text"


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


# exact, json, regex compare the whole answer, without white space around it and without
# reference["closing"] at its end, where there is one, with reference["answer"].
# exact: the same text.
# json: an equal JSON value, no key twice.
# regex: reference["pattern"] matches all of it; `answer` is an example. Python's `re` has no time
# limit: a pattern must not backtrack without bounds.
# choice, code, contains, instructions, judge, math, pairwise, reward, translation: see their files.
GRADERS: dict[str, Grader] = {
    "choice": Grader(choice.judge, choice.fault),
    "code": Grader(code.judge, code.fault),
    "contains": Grader(contains.judge, contains.fault),
    "exact": Grader(_short(_exact), _answer_fault, version=_short_version),
    "instructions": Grader(instructions.judge, instructions.fault),
    "json": Grader(_short(_json), _json_fault, version=_short_version),
    "judge": Grader(judge.judge, judge.fault, asks="generate", version=judge.version),
    "math": Grader(mathematics.judge, _answer_fault, version=mathematics.version),
    "pairwise": Grader(
        pairwise.judge, pairwise.fault, asks="generate", model="judge", version=pairwise.version
    ),
    "regex": Grader(_short(_regex), _regex_fault, version=_short_version),
    "reward": Grader(reward.judge, reward.fault, asks="score"),
    "translation": Grader(translation.judge, translation.fault),
}
