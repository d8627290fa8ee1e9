"""Files of tasks: JSON Lines, one task a line, each checked when it is read and written."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import numbered_jsonl, write_jsonl
from openqwen.tasks.graders import check_task
from openqwen.tasks.task import Task

_FIELDS = {
    "id": (str, "a text that is not empty"),
    "prompt": (list, "a list of one or more messages"),
    "grader": (str, "the name of a grader"),
    "reference": (dict, "an object"),
    "origin": (dict, "an object"),
}


def read_tasks(path: Path) -> list[Task]:
    """Read a file of tasks.

    Raises:
        OpenQwenError: a line is no task, or two tasks have one id; names the file and the line.
    """
    return list(_checked(numbered_jsonl(path)))


def write_tasks(path: Path, tasks: Iterable[Task]) -> int:
    """Write tasks atomically, one a line; returns how many.

    Raises:
        OpenQwenError: `read_tasks` would refuse a line; no file is written.
    """
    lines = ((f"{path}:{number}", asdict(task)) for number, task in enumerate(tasks, 1))
    return write_jsonl(path, (asdict(task) for task in _checked(lines)))


def _checked(records: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Task]:
    seen: set[str] = set()
    for where, record in records:
        task = _task(record, where)
        if task.id in seen:
            what = f"Another task has the id '{task.id}' too."
            raise OpenQwenError(what, where, "give each task a different id")
        seen.add(task.id)
        yield task


def _task(record: dict[str, Any], where: str) -> Task:
    for key in record:
        if key not in _FIELDS:
            what = f"A task has no field '{key}'.{suggestion(key, _FIELDS)}"
            raise OpenQwenError(what, where, f"use these fields: {', '.join(_FIELDS)}")
    optional: dict[str, Any] = {"reference": {}, "origin": {}}
    record = optional | record
    for key, (kind, said) in _FIELDS.items():
        if not isinstance(record.get(key), kind) or not (record[key] or key in optional):
            raise OpenQwenError(f"The field '{key}' must be {said}.", where, "correct the task")
    for number, message in enumerate(record["prompt"]):
        if not _is_message(message):
            what = f"prompt[{number}] is not a message."
            raise OpenQwenError(what, where, 'give {"role": "user", "content": "..."}')
    task = Task(**record)
    check_task(task, where)
    return task


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    return all(isinstance(message.get(key), str) for key in ("role", "content"))
