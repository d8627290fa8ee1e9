"""What reviewers and owners do with tasks: look at answers, judge them, set priority and gold."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, select

from openqwen.http.errors import ApiError
from openqwen.instruct.collaborate.annotate import Json, content, not_found
from openqwen.instruct.collaborate.answers import check_ranks, preference, renamed
from openqwen.instruct.collaborate.events import LogEvent, event_with_key, loads, record
from openqwen.instruct.collaborate.queue import work_of
from openqwen.instruct.collaborate.tables import events, people, tasks, work

Order = Literal["number", "disagreement", "flags", "answers"]
_SCANNED = 20_000  # tasks that an order by their answers looks at


def list_tasks(
    connection: Connection, order: Order, offset: int, limit: int, text: str | None
) -> Json:
    """A page of the tasks, with the agreement of their answers."""
    chosen = select(tasks)
    if text:
        chosen = chosen.where(tasks.c.preview.icontains(text, autoescape=True))
    total = connection.execute(select(func.count()).select_from(chosen.subquery())).scalar_one()
    if order == "answers":
        chosen = chosen.order_by(tasks.c.answers.desc(), tasks.c.number)
    if order in ("number", "answers"):
        rows = connection.execute(chosen.order_by(tasks.c.number).offset(offset).limit(limit)).all()
        return {"total": total, "tasks": _listed(connection, rows)}
    answered = chosen.where(tasks.c.answers > 0).order_by(tasks.c.answers.desc(), tasks.c.number)
    listed = _listed(connection, connection.execute(answered.limit(_SCANNED)).all())
    if order == "flags":
        listed.sort(key=lambda task: -task["flags"])
    else:
        listed.sort(key=lambda task: (task["agreement"] is None, task["agreement"]))
    return {"total": len(listed), "tasks": listed[offset : offset + limit]}


def _listed(connection: Connection, rows: Any) -> list[Json]:
    by_task = answers_by_task(connection, [row.id for row in rows])
    listed = []
    for row in rows:
        answers = by_task.get((row.id, row.version), [])
        given = [preference(answer["ranks"], row.responses) for answer in answers]
        flags = sum(len(names) for answer in answers for names in answer["flags"].values())
        listed.append(
            {
                "id": row.id,
                "number": row.number,
                "preview": row.preview,
                "answers": row.answers,
                "wanted": row.wanted,
                "agreement": pair_agreement(given),
                "flags": flags,
                "gold": row.gold is not None,
                "priority": row.priority,
            }
        )
    return listed


def answers_by_task(connection: Connection, ids: list[str]) -> dict[tuple[str, int], list[Json]]:
    """The answers to tasks, by task and version."""
    found: dict[tuple[str, int], list[Json]] = {}
    for start in range(0, len(ids), 500):
        here = (work.c.task.in_(ids[start : start + 500]), work.c.status == "answered")
        for row in connection.execute(
            select(work.c.task, work.c.version, work.c.answer).where(*here)
        ):
            found.setdefault((row.task, row.version), []).append(loads(row.answer))
    return found


def pair_agreement(given: Iterable[Mapping[tuple[int, int], int]]) -> float | None:
    """The share of (two people, two responses) on which the people agree; None where none is."""
    votes: dict[tuple[int, int], list[int]] = {}
    for pairs in given:
        for pair, value in pairs.items():
            votes.setdefault(pair, []).append(value)
    same = both = 0
    for values in votes.values():
        n = len(values)
        both += n * (n - 1)
        same += sum(values.count(v) * (values.count(v) - 1) for v in (-1, 0, 1))
    return same / both if both else None


def look(connection: Connection, person: Row, task: str) -> Json:
    """A task with all its answers. Whoever looks is not given the task afterwards.

    Raises:
        ApiError: 403 while this person holds the task open.
    """
    row = _task(connection, task)
    mine = work_of(connection, person.id, task, row.version)
    if mine is not None and mine.status in ("open", "returned"):
        message = "Answer or skip this task before you see the answers of others."
        raise ApiError(403, message, code="answer_first")
    record(connection, LogEvent("looked", person.id, task, row.version))
    body = content(connection, task, row.version)
    responses = [
        {"index": n, "text": r["text"], "model": r["origin"].get("model"), "origin": r["origin"]}
        for n, r in enumerate(body["responses"])
    ]
    here = (work.c.task == task, work.c.version == row.version, work.c.status == "answered")
    chosen = (
        select(work, people.c.name, people.c.kind, events.c.at)
        .join(people, people.c.id == work.c.person)
        .join(events, events.c.seq == work.c.seq)
        .where(*here)
        .order_by(work.c.seq)
    )
    answers = [_answer_shown(answer) for answer in connection.execute(chosen)]
    return {
        "id": task,
        "version": row.version,
        "prompt": body["prompt"],
        "responses": responses,
        "gold": loads(row.gold),
        "priority": row.priority,
        "origin": body["origin"],
        "answers": answers,
    }


def _answer_shown(row: Row) -> Json:
    shown = renamed(loads(row.answer), str)
    about = {"id": row.person, "person": row.person, "name": row.name, "kind": row.kind}
    when = {"seconds": row.seconds, "at": row.at, "seq": row.seq}
    return about | shown | when | {"verdict": loads(row.verdict)}


def judge_answer(
    connection: Connection,
    person: Row,
    task: str,
    answer: str,
    accepted: bool,
    comment: str,
    key: str,
) -> Json:
    """A reviewer's verdict; a refused answer goes back to its person as a draft."""
    if (known := event_with_key(connection, person.id, key)) is not None:
        return {"seq": known.seq, "repeated": True}
    version = _task(connection, task).version
    row = work_of(connection, answer, task, version)
    if row is None or row.status != "answered":
        raise not_found()
    if answer == person.id:
        raise ApiError(403, "Nobody reviews their own answers.", code="not_allowed")
    new = {"person": answer, "accepted": accepted, "comment": comment}
    old = {"answer": loads(row.answer), "verdict": loads(row.verdict)}
    event = LogEvent("reviewed", person.id, task, version, old=old, new=new, key=key)
    return {"seq": record(connection, event).seq, "repeated": False}


def set_task(connection: Connection, person: str, task: str, given: dict[str, Any]) -> Json:
    """Change a task's priority, or its known ranks (gold)."""
    row = _task(connection, task)
    old = {"priority": row.priority, "gold": loads(row.gold)}
    new = old | given
    if new["gold"] is not None:
        try:
            new["gold"] = check_ranks(new["gold"], row.responses)
        except ValueError as error:
            raise ApiError(400, f"gold: {error}.", "gold") from None
    held = select(func.count()).where(
        work.c.task == task, work.c.version == row.version, work.c.slot.is_not(None)
    )
    free = row.wanted - connection.execute(held).scalar_one()
    change = new | {"free": 0 if new["gold"] else free}
    record(connection, LogEvent("prioritised", person, task, row.version, old=old, new=change))
    return {"id": task} | new


def _task(connection: Connection, task: str) -> Row:
    row = connection.execute(select(tasks).where(tasks.c.id == task)).first()
    if row is None:
        raise not_found()
    return row
