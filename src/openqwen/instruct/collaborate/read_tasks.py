"""Import: tasks, and answers where there are some, from our files and those of other programs.

Forms: a prompt with responses (our own, UltraFeedback's), TRL's preferences, records of Argilla,
exports of Label Studio (rankers and pairs), and our own export of events.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, select

from openqwen.http.json_body import dump_json
from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.answers import SLOTS, Answer, as_mapping, check_ranks
from openqwen.instruct.collaborate.database import Database
from openqwen.instruct.collaborate.events import (
    LogEvent,
    loads,
    record,
    record_all,
)
from openqwen.instruct.collaborate.queue import free_slot, work_of
from openqwen.instruct.collaborate.settings import LEVELS, ProjectConfig
from openqwen.instruct.collaborate.tables import contents, people, tasks
from openqwen.instruct.collaborate.tables import events as events_table
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import progress
from openqwen.support.records import Record, count_records, read_records
from openqwen.tokenizer.messages import as_messages, preference, prompt

_BLOCK = 500  # tasks of one transaction
_MOST_FAULTS = 20  # that are listed
_LONGEST = 1_000_000  # characters of a task
_ID = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f/\\]{1,200}")  # what a URL's path can hold
_RESPONSES = ("responses", "completions", "candidates", "generations", "answers")
_TEXTS = ("text", "content", "response", "completion", "answer", "output", "body", "html")
_MODELS = ("model", "model_name", "generator", "source")
_NUMBERED = re.compile(r"(?i)(response|answer|completion|output|generation|candidate)[-_ ]?\w{0,3}")


@dataclass(frozen=True)
class ImportedTask:
    """A task of a file. rankings: (who, ranks, comment) of people who have answered already."""

    id: str
    body: Record
    priority: int = 0
    gold: list[list[int]] | None = None
    rankings: list[tuple[str, list[list[int]], str]] = field(default_factory=list)


@dataclass
class ImportReport:
    """What an import did. changed: tasks whose content is another one than before."""

    added: int = 0
    changed: int = 0
    same: int = 0
    answers: int = 0
    refused: int = 0
    faults: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, where: str, error: OpenQwenError | ValueError) -> None:
        """Count a record that cannot be read."""
        self.refused += 1
        if len(self.faults) < _MOST_FAULTS:
            what = error.what if isinstance(error, OpenQwenError) else str(error)
            self.faults.append({"where": where, "message": what})


def import_file(
    database: Database,
    project: ProjectConfig,
    path: Path,
    name: str | None = None,
    by: str | None = None,
) -> ImportReport:
    """Add the tasks of a file. What is known already is left as it is, however often it is added.

    Each block of tasks is one transaction, so an import that was interrupted is repeated.

    Args:
        name: the file's name for the report. by: the person who imports.

    Raises:
        OpenQwenError: the file cannot be read, or holds no task.
    """
    report, block = ImportReport(), list[ImportedTask]()
    if _holds_events(path):
        return _restore(database, path)
    with progress("import", count_records(path), "tasks") as bar:
        for where, record_ in read_records(path):
            where = where.replace(str(path), name) if name else where
            try:
                block.append(read_task(record_))
            except (OpenQwenError, ValueError) as error:
                report.refuse(where, error)
            if len(block) == _BLOCK:
                _add(database, project, block, by, report)
                block = []
            bar.advance()
        _add(database, project, block, by, report)
    if not report.added + report.changed + report.same:
        first = f": {report.faults[0]['message']}" if report.faults else ""
        do = 'give JSON Lines such as {"prompt": "...", "responses": ["...", "..."]}'
        raise OpenQwenError(f"This file holds no task{first}", name or path, do)
    return report


def read_task(record: Record) -> ImportedTask:
    """The task of one record in any of the forms; OpenQwenError where it is none."""
    if isinstance(record.get("data"), Mapping):
        return _label_studio(record)
    if isinstance(record.get("fields"), Mapping):
        return _argilla(record)
    if record.get("chosen") is not None and record.get("rejected") is not None:
        pair = preference(record)
        texts = [pair.chosen["content"], pair.rejected["content"]]
        origin = as_mapping(record.get("origin"))
        sides = [as_mapping(origin.get(side)) for side in ("chosen", "rejected")]
        models = [record.get(f"{side}_model") for side in ("chosen", "rejected")]
        responses = [
            {"text": text, "origin": _named(dict(side), model)}
            for text, side, model in zip(texts, sides, models)
        ]
        return _task(record, pair.prompt, responses)
    for name in _RESPONSES:
        if isinstance(record.get(name), list):
            responses = [_response(value) for value in record[name]]
            return _task(record, prompt(record)[0], responses)
    names = [key for key, value in record.items() if _is_response(key, value)]
    if len(names) > 1:
        rest = {key: value for key, value in record.items() if key not in names}
        texts = [{"text": record[key], "origin": {}} for key in names]
        return _task(rest, prompt(rest)[0], texts)
    do = "give prompt and responses, or chosen and rejected"
    raise OpenQwenError("This record has no responses to rank.", do=do)


def _task(
    record: Record,
    asked: Iterable[Mapping[str, Any]],
    responses: list[Record],
    rankings: list[tuple[str, list[list[int]], str]] | None = None,
) -> ImportedTask:
    messages = [{"role": m["role"], "content": m["content"]} for m in asked]
    if not any(message["content"].strip() for message in messages):
        raise OpenQwenError("The prompt is empty.")
    if not 2 <= len(responses) <= len(SLOTS):
        raise OpenQwenError(f"A task has 2 to {len(SLOTS)} responses, not {len(responses)}.")
    texts = [response["text"] for response in responses]
    if not all(text.strip() for text in texts):
        raise OpenQwenError("A response is empty.")
    if len(set(texts)) < len(texts):
        raise OpenQwenError("Two responses are the same.")
    origin = dict(as_mapping(record.get("origin")))
    body: Record = {"prompt": messages, "responses": responses, "origin": origin}
    raw = dump_json(body)
    if len(raw) > _LONGEST:
        raise OpenQwenError(f"The task has more than {_LONGEST:,} bytes.")
    given = record.get("id")
    name = str(given) if isinstance(given, str | int) and not isinstance(given, bool) else ""
    if not _ID.fullmatch(name):
        if name:
            body["origin"] = {**origin, "id": name}
            raw += name.encode("utf-8", "replace")
        name = hashlib.sha256(raw).hexdigest()[:16]
    priority = record.get("priority") or 0
    if type(priority) is not int or not 0 <= priority < LEVELS:
        raise OpenQwenError(f"priority is {priority!r}, not 0 to {LEVELS - 1}.")
    gold = record.get("gold")
    gold = None if gold is None else check_ranks(gold, len(responses))
    return ImportedTask(name, body, priority, gold, rankings or [])


def _response(value: Any) -> Record:
    """A response: a text, an object with one, or the messages of an answer."""
    if isinstance(value, str):
        return {"text": value, "origin": {}}
    if isinstance(value, list):
        return {"text": _last(value), "origin": {}}
    if not isinstance(value, Mapping):
        raise OpenQwenError("A response is neither a text nor an object.")
    origin = dict(as_mapping(value.get("origin")))
    for name in _MODELS:
        if isinstance(value.get(name), str):
            origin.setdefault("model", value[name])
    if isinstance(value.get("messages"), list):
        return {"text": _last(value["messages"]), "origin": origin}
    text = next((value[name] for name in _TEXTS if isinstance(value.get(name), str)), None)
    if text is None:
        raise OpenQwenError(f"A response has no text; its fields are {', '.join(value)[:200]}.")
    return {"text": text, "origin": origin}


def _last(messages: Any) -> str:
    return str(as_messages(messages, "responses", "assistant")[-1]["content"])


def _is_response(name: str, value: Any) -> bool:
    return isinstance(value, str) and _NUMBERED.fullmatch(name) is not None


def _named(origin: Record, model: Any) -> Record:
    return origin | {"model": model} if isinstance(model, str) else origin


def _argilla(record: Record) -> ImportedTask:
    """A record of Argilla 2: fields, and for each question the responses of its users."""
    given = record["fields"]
    names = [key for key, value in given.items() if _is_response(key, value)]
    rest = {key: value for key, value in given.items() if key not in names}
    if isinstance(next(iter(rest.values()), None), list) and len(rest) == 1:  # a chat field
        asked = as_messages(next(iter(rest.values())))
    else:
        try:
            asked = prompt(rest)[0]
        except OpenQwenError:
            asked = [{"role": "user", "content": "\n\n".join(map(str, rest.values()))}]
    metadata = as_mapping(record.get("metadata"))
    responses = [
        {"text": given[key], "origin": _named({}, metadata.get(f"{key}_model"))} for key in names
    ]
    rankings = []
    for answers in as_mapping(record.get("responses")).values():
        for answer in answers if isinstance(answers, list) else []:
            value = as_mapping(answer).get("value")
            if ranks := _named_ranks(value, names):
                rankings.append((str(answer.get("user_id") or "argilla"), ranks, ""))
    return _task(record, asked, responses, rankings)


def _named_ranks(value: Any, names: list[str]) -> list[list[int]] | None:
    """Ranks from names in order, or from [{"value": name, "rank": n}] with ties; else None."""
    if not isinstance(value, list) or not value:
        return None
    ranked: dict[float, list[int]] = {}
    for place, entry in enumerate(value):
        name, rank = entry, float(place)
        if isinstance(entry, Mapping):
            name, rank = entry.get("value"), entry.get("rank", place)
        if name not in names or not isinstance(rank, int | float):
            return None
        ranked.setdefault(rank, []).append(names.index(name))
    return check_ranks([ranked[rank] for rank in sorted(ranked)], len(names))


def _label_studio(record: Record) -> ImportedTask:
    """A task of Label Studio: data, and annotations whose results are rankers or pairs."""
    data = record["data"]
    lists = [value for value in data.values() if isinstance(value, list) and len(value) > 1]
    items = next((v for v in lists if all(isinstance(i, str | Mapping) for i in v)), None)
    if items is not None and not all(isinstance(i, Mapping) and "role" in i for i in items):
        names = [str(as_mapping(item).get("id", n)) for n, item in enumerate(items)]
        responses = [_response(item) for item in items]
        rest = {key: value for key, value in data.items() if value is not items}
    else:
        names = [key for key, value in data.items() if _is_response(key, value)]
        responses = [{"text": data[key], "origin": {}} for key in names]
        rest = {key: value for key, value in data.items() if key not in names}
    try:
        asked = prompt(rest)[0]
    except OpenQwenError:
        texts = [value for value in rest.values() if isinstance(value, str)]
        asked = [{"role": "user", "content": "\n\n".join(texts)}]
    rankings = []
    annotations = record.get("annotations") or record.get("completions") or []
    for annotation in annotations if isinstance(annotations, list) else []:
        if as_mapping(annotation).get("was_cancelled"):
            continue
        who = annotation.get("completed_by") or "label-studio"
        who = who.get("email") or who.get("id") if isinstance(who, Mapping) else who
        for result in annotation.get("result") or []:
            if ranks := _result_ranks(as_mapping(as_mapping(result).get("value")), names):
                rankings.append((str(who), ranks, ""))
    return _task(record, asked, responses, rankings)


def _result_ranks(value: Mapping[str, Any], names: list[str]) -> list[list[int]] | None:
    """Ranks of a ranker's result, or of a pair's ("left", "right").

    A ranker with buckets says by its buckets' names only which one is better: it gives no ranks.
    """
    ranker = value.get("ranker")
    if isinstance(ranker, Mapping):
        ranker = next(iter(ranker.values())) if len(ranker) == 1 else None
    if isinstance(ranker, list):
        return _named_ranks([str(name) for name in ranker], names)
    if value.get("selected") in ("left", "right") and len(names) == 2:
        return [[0], [1]] if value["selected"] == "left" else [[1], [0]]
    return None


def _add(
    database: Database,
    project: ProjectConfig,
    block: list[ImportedTask],
    by: str | None,
    report: ImportReport,
) -> None:
    """Record a block of tasks and their answers in one transaction."""
    unique = {task.id: task for task in block}
    report.same += len(block) - len(unique)
    with database.write() as connection:
        here = (contents.c.task == tasks.c.id) & (contents.c.version == tasks.c.version)
        chosen = select(tasks, contents.c.body).join(contents, here)
        rows = connection.execute(chosen.where(tasks.c.id.in_(list(unique)))).all()
        known = {row.id: row for row in rows}
        events = []
        for task in unique.values():
            new = {"body": task.body, "wanted": project.overlap}
            new |= {"priority": task.priority, "gold": task.gold}
            row = known.get(task.id)
            if row is None:
                report.added += 1
                events.append(LogEvent("imported", by, task.id, 1, new=new))
            elif loads(row.body) == task.body:
                report.same += 1
            else:
                report.changed += 1
                old = {"body": loads(row.body)}
                events.append(LogEvent("changed", by, task.id, row.version + 1, old=old, new=new))
        record_all(connection, events)
        for task in unique.values():
            for who, ranks, comment in task.rankings:
                report.answers += _add_answer(connection, project, task, who, ranks, comment)


def _add_answer(
    connection: Connection,
    project: ProjectConfig,
    task: ImportedTask,
    who: str,
    ranks: list[list[int]],
    comment: str,
) -> bool:
    """Record somebody's earlier answer; False where it is known. It takes a place of the task."""
    name = f"{' '.join(who.split())[:40]} (imported)"
    person = connection.execute(select(people.c.id).where(people.c.name == name)).scalar()
    if person is None:
        person = accounts.add_person(connection, name, "annotator", "imported")
    version = connection.execute(select(tasks.c.version).where(tasks.c.id == task.id)).scalar_one()
    if work_of(connection, person, task.id, version) is not None:
        return False
    answer: Answer = {"ranks": ranks, "none_good": False, "scores": {}, "flags": {}}
    answer |= {"comment": comment, "demonstration": None}
    order = list(range(len(task.body["responses"])))
    new = {"answer": answer, "slot": free_slot(connection, task.id, version)}
    record(connection, LogEvent("answered", person, task.id, version, order, new=new))
    return True


def _holds_events(path: Path) -> bool:
    """Whether a file is an export of our events."""
    _, first = next(read_records(path), ("", {}))
    return first.get("seq") == 1 and {"kind", "at", "order", "new"} <= first.keys()


def _restore(database: Database, path: Path) -> ImportReport:
    """Fill a project without tasks and people from an export of events.

    Accounts come without passwords: an owner sends each person a new link.
    """
    names = {entry.name for entry in fields(LogEvent)}
    with database.write() as connection:
        used = (select(tasks.c.id).limit(1), select(people.c.id).limit(1))
        if any(connection.execute(chosen).first() for chosen in used):
            what = "This project is in use, and an export of events fills a new one."
            raise OpenQwenError(what, path, "name a new folder")
        given = [
            LogEvent(**{k: v for k, v in event.items() if k in names})
            for _, event in read_records(path)
        ]
        if [event.seq for event in given] != list(range(1, len(given) + 1)):
            raise OpenQwenError("Events are missing in this file.", path, "export them again")
        connection.execute(delete(events_table))
        record_all(connection, given)
    kinds = Counter(event.kind for event in given)
    return ImportReport(added=kinds["imported"], answers=kinds["answered"])
