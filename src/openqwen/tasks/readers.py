"""Readers of published files of problems: GSM8K, MATH, HumanEval, MBPP and IFEval become tasks."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import numbered_jsonl, read_json
from openqwen.tasks.graders import check_task
from openqwen.tasks.numbers import last_boxed
from openqwen.tasks.task import Task

# (id, text of the prompt, grader, reference, more of the origin). ValueError says what is wrong.
_Parts = tuple[str, str, str, dict[str, Any], dict[str, Any]]


def read_problems(name: str, path: Path) -> list[Task]:
    """Read a file of problems in the form in which it was published; .gz and .zst too.

    Args:
        name: one of `READERS`.
        path: the file, or for MATH also the folder of its JSON files.

    Returns:
        The tasks in the file's order. origin: "method" and "kind" (the name), "file", "record"
        (counted from 1), and "split" where the publication defines splits by number (MBPP).

    Raises:
        OpenQwenError: a record has not the form; names the file and the line.
    """
    if name not in READERS:
        what = f"There is no reader '{name}'.{suggestion(name, READERS)}"
        raise OpenQwenError(what, do=f"use one of: {', '.join(READERS)}")
    tasks = []
    for number, (where, record) in enumerate(_records(path), 1):
        origin = {"method": name, "kind": name, "file": path.name, "record": number}
        ending, text, grader, reference, more = read_problem(name, record, where)
        identity = ending or f"{name}/{number}"
        task = Task(identity, [{"role": "user", "content": text}], grader, reference, origin | more)
        check_task(task, where)
        tasks.append(task)
    if not tasks:
        raise OpenQwenError("There are no problems here.", path, "check the path")
    return tasks


def read_problem(name: str, record: dict[str, Any], where: str) -> _Parts:
    """The parts of a task, from one published record; where: its file and line, for errors."""
    try:
        return READERS[name](record)
    except KeyError as error:
        what = f"A record of {name} needs the field {error}."
    except (ValueError, TypeError, AttributeError, SyntaxError) as error:
        what = f"This is not a record of {name}: {error}."
    raise OpenQwenError(what, where, f"give a file of {name} as published")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_dir():
        yield from numbered_jsonl(path)
        return
    for file in sorted(path.rglob("*.json")):
        record = read_json(file)
        if not isinstance(record, dict):
            raise OpenQwenError("This file is JSON but not an object.", file, "check the folder")
        yield str(file), {"unique_id": str(file.relative_to(path)), **record}


def _gsm8k(record: dict[str, Any]) -> _Parts:
    solution, mark, answer = record["answer"].rpartition("####")
    if not mark:
        raise ValueError("'answer' has no line #### with the number")
    reference = {"answer": answer.strip(), "solution": solution.strip()}
    return "", record["question"], "math", reference, {}


def _math(record: dict[str, Any]) -> _Parts:
    answer = record.get("answer") or last_boxed(record["solution"])
    if answer is None:
        raise ValueError("'solution' has no \\boxed{…}")
    reference = {"answer": answer, "solution": record["solution"]}
    ending = record.get("unique_id", "")
    return (f"math/{ending}" if ending else ""), record["problem"], "math", reference, {}


def _humaneval(record: dict[str, Any]) -> _Parts:
    reference = {
        "tests": record["test"],
        "entry": record["entry_point"],
        "prefix": record["prompt"],
        "solution": record["canonical_solution"],
    }
    return record["task_id"], record["prompt"], "code", reference, {}


def _mbpp(record: dict[str, Any]) -> _Parts:
    tests = "\n".join(record["test_list"])
    text = f"{record['text']} Your code should pass these tests:\n\n{tests}"
    reference = {
        "tests": tests,
        "entry": _mbpp_entry(record["code"], tests),
        "setup": record["test_setup_code"],
        "solution": record["code"],
    }
    more = {"split": _mbpp_split(record["task_id"])}
    return f"mbpp/{record['task_id']}", text, "code", reference, more


def _mbpp_entry(code: str, tests: str) -> str:
    """The function that the tests call and the solution defines. It may be named as a built-in."""
    called = [
        node.func.id
        for node in ast.walk(ast.parse(tests))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    for name in called:
        if name in defined:
            return name
    raise ValueError("the tests call no function of 'code'")


def _mbpp_split(number: int) -> str:
    """The split of a problem as the authors define it (Austin et al. 2021)."""
    for last, split in ((10, "prompt"), (510, "test"), (600, "validation")):
        if number <= last:
            return split
    return "train"


def _ifeval(record: dict[str, Any]) -> _Parts:
    """IFEval's form, and M-IFEval's, whose ids begin with the language: "fr:keywords:existence"."""
    ids = record["instruction_id_list"]
    languages = {id.partition(":")[0] for id in ids if id.count(":") == 2} or {"en"}
    if len(languages) > 1:
        raise ValueError(f"its instructions are of several languages: {', '.join(languages)}")
    language = languages.pop()
    asked = [
        # Hugging Face's copy has all parameters of all kinds, most of them null.
        {"id": id, "parameters": {key: value for key, value in given.items() if value is not None}}
        for id, given in zip(
            (id.removeprefix(f"{language}:") for id in ids), record["kwargs"], strict=True
        )
    ]
    reference = {"instructions": asked, "language": language}
    more = {"language": language}
    return f"ifeval/{language}/{record['key']}", record["prompt"], "instructions", reference, more


READERS: dict[str, Callable[[dict[str, Any]], _Parts]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "ifeval": _ifeval,
}
