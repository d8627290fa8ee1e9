"""What an annotator does: take a task, save a draft, answer, skip, undo.

Each function runs in one writing transaction and records one event (a new lease may be another).
"""

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from openqwen.http.errors import ApiError
from openqwen.instruct.collaborate.answers import (
    SLOTS,
    Answer,
    AnswerBody,
    check_complete,
    shown,
    stored,
)
from openqwen.instruct.collaborate.events import (
    LogEvent,
    as_event,
    event_with_key,
    loads,
    record,
)
from openqwen.instruct.collaborate.queue import (
    free_slot,
    left_for,
    next_work,
    renewed,
    work_of,
)
from openqwen.instruct.collaborate.settings import ProjectConfig
from openqwen.instruct.collaborate.tables import contents, events, people, tasks, work

Json = dict[str, Any]


def take_next(connection: Connection, person: Row, project: ProjectConfig) -> Json:
    """The person's open task, or a new one."""
    turn = next_work(connection, person, project)
    done = connection.execute(select(people.c.done).where(people.c.id == person.id)).scalar()
    answer: Json = {"task": None, "reason": turn.reason, "done": done}
    answer["left"] = left_for(connection, person.id)
    if turn.wait is not None:
        answer["wait"] = round(turn.wait, 1)
    if turn.work is not None:
        answer["task"] = task_shown(connection, turn.work)
    return answer


def task_shown(connection: Connection, row: Row) -> Json:
    """A task as its annotator sees it: no model names, the responses in the drawn order."""
    body = content(connection, row.task, row.version)
    order = loads(row.order)
    status = row.status if row.status in ("answered", "skipped") else "open"
    draft = loads(row.answer if status == "answered" else row.draft)
    texts = [body["responses"][number]["text"] for number in order]
    return {
        "id": row.task,
        "version": row.version,
        "prompt": body["prompt"],
        "responses": [{"slot": slot, "text": text} for slot, text in zip(SLOTS, texts)],
        "lease": lease_shown(row),
        "draft": draft and {"answer": shown(draft, order), "seconds": row.seconds},
        "status": status,
        "comment": (loads(row.verdict) or {}).get("comment"),
    }


def lease_shown(row: Row) -> Json:
    """A lease: its id, and the seconds that are left."""
    left = max(row.lease_until - time.time(), 0.0)
    return {"id": str(row.opened), "seconds": round(left, 1)}


def content(connection: Connection, task: str, version: int) -> Json:
    """The prompt and the responses of a version of a task."""
    here = (contents.c.task == task, contents.c.version == version)
    body = connection.execute(select(contents.c.body).where(*here)).scalar()
    if body is None:
        raise not_found()
    return loads(body)


def save_draft(
    connection: Connection,
    person: str,
    task: str,
    lease: str,
    body: AnswerBody,
    seconds: float,
    project: ProjectConfig,
) -> Json:
    """Keep work in progress and renew its lease. Only fields that have changed are recorded."""
    row = _leased(connection, person, task, lease)
    if row.status == "answered":
        raise answered_already()
    if row.status in ("skipped", "looked"):
        raise not_found()
    if row.status in ("expired", "returned"):
        row = renewed(connection, row, project, time.time()) or row
    answer = stored(body, loads(row.order), project)
    before = loads(row.draft) or {}
    new = {name: value for name, value in answer.items() if before.get(name) != value}
    old = {name: before.get(name) for name in new}
    until = time.time() + project.lease
    change = {"answer": new, "lease_until": until}
    place = (person, task, row.version, loads(row.order))
    record(connection, LogEvent("draft", *place, old, change, seconds))
    return {"lease": lease_shown(_row(connection, row))}


def submit(
    connection: Connection,
    person: str,
    task: str,
    lease: str,
    key: str,
    body: AnswerBody,
    seconds: float,
    project: ProjectConfig,
) -> Json | None:
    """Record an answer, once for each key.

    None: the task is answered already, by another key, or the person has looked at the answers of
    others. In these cases what was sent is in the log, as `refused_copy`.
    """
    if (known := _repeated(connection, person, key, "answered", task)) is not None:
        return _receipt(connection, known, project)
    row = _leased(connection, person, task, lease)
    order = loads(row.order)
    answer = check_complete(stored(body, order, project), len(order), project)
    if row.status in ("answered", "looked"):
        change = {"answer": answer}
        place = (person, task, row.version, order)
        record(connection, LogEvent("refused_copy", *place, loads(row.answer), change, seconds))
        return None
    event = answer_event(connection, row, answer, seconds, key)
    return _receipt(connection, event, project, repeated=False)


def answer_event(
    connection: Connection, row: Row, answer: Answer, seconds: float, key: str | None
) -> LogEvent:
    """Record an answer to leased work; it takes a free place if it has none."""
    slot = row.slot
    kind = connection.execute(select(people.c.kind).where(people.c.id == row.person)).scalar()
    if slot is None and kind != "model":
        slot = free_slot(connection, row.task, row.version)
    place = (row.person, row.task, row.version, loads(row.order))
    new = {"answer": answer, "slot": slot}
    return record(connection, LogEvent("answered", *place, loads(row.draft), new, seconds, key))


def skip(
    connection: Connection,
    person: str,
    task: str,
    lease: str,
    key: str,
    reason: str,
    seconds: float,
) -> Json:
    """Give a task back. It does not come to this person again."""
    if (known := _repeated(connection, person, key, "skipped", task)) is not None:
        return {"seq": known.seq, "repeated": True}
    row = _leased(connection, person, task, lease)
    if row.status == "answered":
        raise answered_already()
    place = (person, task, row.version, loads(row.order))
    change = {"reason": reason}
    event = record(connection, LogEvent("skipped", *place, loads(row.draft), change, seconds, key))
    return {"seq": event.seq, "repeated": False}


def reopen(
    connection: Connection, person: str, task: str, key: str, project: ProjectConfig
) -> Json:
    """Undo an answer or a skip: the task is open again, with what it was as the draft."""
    row = work_of(connection, person, task)
    if row is None or row.status == "looked":
        raise not_found()
    if row.status in ("answered", "skipped", "expired", "returned"):
        slot = row.slot
        if slot is None:
            slot = free_slot(connection, task, row.version)
        change = {"slot": slot, "lease_until": time.time() + project.lease}
        place = (person, task, row.version, loads(row.order))
        known = _repeated(connection, person, key, "reopened", task)
        if known is None:
            event = LogEvent("reopened", *place, loads(row.answer), change, key=key)
            record(connection, event)
    return {"task": task_shown(connection, _row(connection, row))}


def history(connection: Connection, person: str, limit: int, before: int | None) -> Json:
    """A person's latest answers and skips, the newest first."""
    columns = (work.c.task, work.c.status, work.c.seq, work.c.verdict, tasks.c.preview, events.c.at)
    chosen = (
        select(*columns)
        .join(tasks, tasks.c.id == work.c.task)
        .join(events, events.c.seq == work.c.seq)
        .where(work.c.person == person, work.c.status.in_(("answered", "skipped", "returned")))
        .order_by(work.c.seq.desc())
        .limit(limit)
    )
    if before is not None:
        chosen = chosen.where(work.c.seq < before)
    rows = connection.execute(chosen).all()
    return {"answers": [row._asdict() | {"verdict": loads(row.verdict)} for row in rows]}


def not_found() -> ApiError:
    """One answer for what does not exist and for what belongs to others."""
    return ApiError(404, "There is no such task for you.", code="not_found")


def answered_already() -> ApiError:
    """The answer to a second answer."""
    message = "You have answered this task already, perhaps in another window."
    return ApiError(409, message, code="already_answered")


def _leased(connection: Connection, person: str, task: str, lease: str) -> Row:
    """The person's work that a lease began; ApiError 404 where it is not theirs."""
    opened = int(lease) if lease.isascii() and lease.isdigit() and len(lease) < 19 else 0
    found = connection.execute(select(events).where(events.c.seq == opened)).first()
    event = as_event(found) if found else None
    mine = event is not None and (event.person, event.task) == (person, task)
    if event is None or not mine or event.kind not in ("opened", "reopened"):
        raise not_found()
    row = work_of(connection, person, task, event.version)
    if row is None:
        raise not_found()
    return row


def _row(connection: Connection, row: Row) -> Row:
    """The same work as it is now."""
    found = work_of(connection, row.person, row.task, row.version)
    assert found is not None
    return found


def _repeated(
    connection: Connection, person: str, key: str, kind: str, task: str
) -> LogEvent | None:
    """The event of this key; ApiError 400 where the key was used for something else."""
    event = event_with_key(connection, person, key)
    if event is not None and (event.kind, event.task) != (kind, task):
        raise ApiError(400, "This key was used for something else.", "key", "key_used")
    return event


def _receipt(
    connection: Connection, event: LogEvent, project: ProjectConfig, repeated: bool = True
) -> Json:
    assert event.task is not None
    assert event.version is not None
    models = None
    if project.reveal:
        body = content(connection, event.task, event.version)
        models = models_by_slot(body, event.order or [])
    extra = event.new["slot"] is None
    return {"seq": event.seq, "repeated": repeated, "extra": extra, "models": models}


def models_by_slot(body: Json, order: Sequence[int]) -> dict[str, str | None]:
    """The model behind each slot."""
    origins = [body["responses"][number]["origin"] for number in order]
    return {slot: origin.get("model") for slot, origin in zip(SLOTS, origins)}
