"""Problems from files: tasks of ours, or GSM8K, MATH, HumanEval and MBPP as they are published.

A problem may lack an answer. A record that cannot be used becomes an item with a fault, so that one
bad line does not end a run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openqwen.instruct.synthesize.method import Item, Message
from openqwen.support.errors import OpenQwenError
from openqwen.support.records import read_records
from openqwen.tasks import READERS, Task, read_problems
from openqwen.tasks.graders import check_task
from openqwen.tasks.numbers import last_boxed

_QUESTIONS = ("question", "problem", "instruction", "query", "text")
_LONGEST = 100_000  # characters of a problem


def read_items(path: Path, form: str, grader: str) -> Iterator[Item]:
    """Yield an item with a `Task` for each problem.

    Args:
        path: a file of records.
        form: "tasks", or the name of a published form (`tasks.READERS`).
        grader: of problems that do not name theirs.
    """
    if form in READERS:
        for task in read_problems(form, path):
            yield Item(task.id, task)
        return
    seen: set[str] = set()
    for number, (where, record) in enumerate(read_records(path), 1):
        name = str(record.get("id", number))
        if name in seen:
            name = f"{name}/{number}"
        seen.add(name)
        try:
            yield Item(name, _task(name, record, grader, where))
        except OpenQwenError as error:
            yield Item(name, None, f"no problem: {error.what}")


def count_items(path: Path, form: str) -> int | None:
    """How many there are, None where that is not known; a damaged line is an error at once."""
    return None if form in READERS else sum(1 for _ in read_records(path))


def in_context(task: Task, asked: Sequence[Message]) -> list[Message]:
    """A prompt for the task's last message, behind the messages that come before it."""
    return [*task.prompt[:-1], asked[-1]] if len(task.prompt) > 1 else list(asked)


def _task(name: str, record: dict[str, Any], grader: str, where: str) -> Task:
    prompt = record.get("prompt")
    if prompt is None:
        question = next((record[key] for key in _QUESTIONS if record.get(key)), "")
        prompt = [{"role": "user", "content": question}]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    for message in prompt if isinstance(prompt, list) and prompt else [{}]:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not content.strip() or "role" not in message:
            raise OpenQwenError("the prompt is no list of messages with text", where)
        if len(content) > _LONGEST:
            raise OpenQwenError(f"it has more than {_LONGEST:,} characters", where)
    grader = str(record.get("grader", grader))
    reference = record.get("reference")
    if not isinstance(reference, dict):
        answer = _answer(record) if grader != "code" else ""
        reference = {"answer": answer} if answer else {}
    task = Task(name, prompt, grader, reference)
    if reference:
        check_task(task, where)
    return task


def _answer(record: dict[str, Any]) -> str:
    """The final answer of a problem in one of the usual forms; "" where there is none."""
    answer = record.get("answer")
    if isinstance(answer, str):
        return answer.rpartition("####")[2].strip()  # GSM8K has the solution before the mark
    if isinstance(answer, int | float):
        return str(answer)
    return last_boxed(str(record.get("solution", ""))) or ""
