"""The log of events, and the fold that makes the state tables from it.

Whatever changes the state is one event: `record` appends it and folds it in one transaction. The
fold reads nothing but the event and the state, so `rebuild` gives the same tables again. Events are
ordered by their number, never by their time: a clock may jump.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from openqwen.http.json_body import dump_json
from openqwen.instruct.collaborate.tables import (
    STATE,
    contents,
    events,
    frontiers,
    people,
    tasks,
    work,
)

GOLD_LANE = -1
JUDGE_LANE = -2
_BLOCK = 1_000  # events that are read or written at a time
_PREVIEW = 120  # characters
_JSON = ("order", "old", "new")
Values = dict[str, Any]  # of columns


@dataclass(frozen=True)
class LogEvent:
    """One action.

    Args:
        kind: see `_FOLDS`, and the kinds that change no state: logged_in, login_refused, ...
        person: who did it; None: the program.
        order: the responses in the order shown, by their numbers.
        old, new: the value before and after.
        seconds: time on the task.
        key: a name that the client gave; the same key is never recorded twice.
        seq, at: its number and time, given by `record`.
    """

    kind: str
    person: str | None = None
    task: str | None = None
    version: int | None = None
    order: list[int] | None = None
    old: Any = None
    new: Any = None
    seconds: float | None = None
    key: str | None = None
    seq: int = 0
    at: str = ""


def record(connection: Connection, event: LogEvent) -> LogEvent:
    """Append an event and fold it; returns it with its number and time."""
    (recorded,) = record_all(connection, [event])
    return recorded


def record_all(connection: Connection, given: Iterable[LogEvent]) -> list[LogEvent]:
    """Append several events; the log is written first, then the state."""
    last = connection.execute(select(func.coalesce(func.max(events.c.seq), 0))).scalar_one()
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    numbered = [
        replace(event, seq=last + number, at=event.at or now)
        for number, event in enumerate(given, 1)
    ]
    if numbered:
        connection.execute(insert(events), [_row(event) for event in numbered])
        _fold(connection, numbered)
    return numbered


def read_events(
    connection: Connection, after: int = 0, limit: int | None = None
) -> Iterator[LogEvent]:
    """The events with numbers above `after`, in order, a block at a time."""
    left = limit
    while left is None or left > 0:
        size = _BLOCK if left is None else min(left, _BLOCK)
        chosen = select(events).where(events.c.seq > after).order_by(events.c.seq).limit(size)
        rows = connection.execute(chosen).all()
        for row in rows:
            yield as_event(row)
        if len(rows) < size:
            return
        after, left = rows[-1].seq, None if left is None else left - size


def as_event(row: Row) -> LogEvent:
    """The event in a row of the log."""
    values = row._asdict()
    for name in _JSON:
        values[name] = loads(values[name])
    return LogEvent(**values)


def event_with_key(connection: Connection, person: str, key: str) -> LogEvent | None:
    """The event that a client named so, if it was recorded."""
    chosen = select(events).where(events.c.person == person, events.c.key == key)
    row = connection.execute(chosen).first()
    return as_event(row) if row else None


def rebuild(connection: Connection) -> None:
    """Make the state tables again from the log alone."""
    for table in STATE:
        connection.execute(delete(table))
    block: list[LogEvent] = []
    for event in read_events(connection):
        block.append(event)
        if len(block) == _BLOCK:
            _fold(connection, block)
            block = []
    _fold(connection, block)


def dumps(value: Any) -> str | None:
    """A value as JSON text for a column; None stays None."""
    return None if value is None else dump_json(value).decode()


def loads(text: str | None) -> Any:
    """The value of a column's JSON text."""
    return None if text is None else orjson.loads(text)


def _row(event: LogEvent) -> dict[str, Any]:
    return vars(event) | {name: dumps(getattr(event, name)) for name in _JSON}


def _fold(connection: Connection, block: list[LogEvent]) -> None:
    """Fold events in order. Imports that follow each other are written together."""
    imports: list[LogEvent] = []
    for event in block:
        if event.kind == "imported":
            imports.append(event)
            continue
        _imported(connection, imports)
        imports = []
        if fold := _FOLDS.get(event.kind):
            fold(connection, event)
    _imported(connection, imports)


def _imported(connection: Connection, imports: list[LogEvent]) -> None:
    """New tasks. new: {"body", "wanted", "priority", "gold"}."""
    if not imports:
        return
    bodies, rows = [], []
    for event in imports:
        new = event.new
        bodies.append({"task": event.task, "version": 1, "body": dumps(new["body"])})
        row = {"id": event.task, "number": event.seq, "version": 1, "turn": event.seq}
        row |= _of_body(new["body"]) | {"wanted": new["wanted"], "priority": new["priority"]}
        row |= {"free": 0 if new["gold"] else new["wanted"], "answers": 0}
        rows.append(row | {"gold": dumps(new["gold"])})
    connection.execute(insert(contents), bodies)
    connection.execute(insert(tasks), rows)


def _of_body(body: dict[str, Any]) -> dict[str, Any]:
    text = str(body["prompt"][-1]["content"]).replace("\0", " ")  # PostgreSQL's texts lack it
    text = " ".join(text.split())
    return {"preview": text[:_PREVIEW], "responses": len(body["responses"])}


def _changed(connection: Connection, event: LogEvent) -> None:
    """Other content for a task: a new version, which all people may answer. new: as of imports."""
    new, task = event.new, event.task
    body = {"task": task, "version": event.version, "body": dumps(new["body"])}
    connection.execute(insert(contents), body)
    here = (work.c.task == task, work.c.version < event.version)
    connection.execute(update(work).where(*here).values(slot=None))
    held = (work.c.status.in_(("open", "returned")),)
    connection.execute(update(work).where(*here, *held).values(status="stale"))
    free = 0 if new["gold"] else new["wanted"]
    values = {"version": event.version, "wanted": new["wanted"], "free": free, "answers": 0}
    values |= _of_body(new["body"]) | {"priority": new["priority"], "turn": event.seq}
    _update_task(connection, task, gold=dumps(new["gold"]), **values)


def _prioritised(connection: Connection, event: LogEvent) -> None:
    """An owner's settings of a task. new: {"priority", "gold", "free"}."""
    new = event.new
    gold = dumps(new["gold"])
    values = {"priority": new["priority"], "free": new["free"], "turn": event.seq}
    _update_task(connection, event.task, gold=gold, **values)


def _opened(connection: Connection, event: LogEvent) -> None:
    """A lease. new: {"slot", "lease_until", "lane", "turn"}; its place may be held already."""
    new = event.new
    row = _work(connection, event)
    values = {"status": "open", "lease_until": new["lease_until"], "opened": event.seq}
    values |= {"slot": new["slot"], "seq": event.seq}
    if row is None:
        key = {"task": event.task, "version": event.version, "person": event.person}
        rest: Values = {"order": dumps(event.order), "seconds": 0.0}
        connection.execute(insert(work).values(**key, **values, **rest))
    else:
        _update_work(connection, event, **values)
    if new["slot"] is not None and (row is None or row.slot is None):
        _update_task(connection, event.task, free=tasks.c.free - 1)
    if new.get("lane") is not None:
        here = {"person": event.person, "lane": new["lane"]}
        at = [getattr(frontiers.c, name) == value for name, value in here.items()]
        moved = update(frontiers).where(*at).values(turn=new["turn"])
        if not connection.execute(moved).rowcount:
            connection.execute(insert(frontiers).values(**here, turn=new["turn"]))


def _expired(connection: Connection, event: LogEvent) -> None:
    """A lease has run out and its place is given up. The draft stays."""
    _give_up(connection, event, status="expired")


def _draft(connection: Connection, event: LogEvent) -> None:
    """Work in progress. new: {"answer": the fields that changed, "lease_until"}."""
    row = _work(connection, event)
    draft = (loads(row.draft) if row else None) or {}
    values: Values = {"draft": dumps(draft | event.new["answer"]), "seq": event.seq}
    values |= {"lease_until": event.new["lease_until"], "seconds": event.seconds}
    _update_work(connection, event, **values)


def _answered(connection: Connection, event: LogEvent) -> None:
    """An answer. new: {"answer", "slot"}; a slot of None where others fill all places."""
    new = event.new
    row = _work(connection, event)
    values: Values = {"status": "answered", "answer": dumps(new["answer"]), "draft": None}
    values |= {"slot": new["slot"], "seq": event.seq, "seconds": event.seconds or 0.0}
    if row is None:  # an imported answer
        key = {"task": event.task, "version": event.version, "person": event.person}
        rest: Values = {"order": dumps(event.order), "opened": event.seq, "lease_until": 0.0}
        connection.execute(insert(work).values(**key, **values, **rest))
    else:
        _update_work(connection, event, verdict=None, **values)
    taken = new["slot"] is not None and (row is None or row.slot is None)
    _count(connection, event, 1, free=tasks.c.free - int(taken))


def _skipped(connection: Connection, event: LogEvent) -> None:
    """The person gives the task back. new: {"reason"}. The draft stays."""
    values: Values = {"answer": dumps(event.new), "seconds": event.seconds or 0.0}
    _give_up(connection, event, status="skipped", **values)


def _reopened(connection: Connection, event: LogEvent) -> None:
    """The undo of an answer or of a skip. old: the answer. new: {"slot", "lease_until"}."""
    row = _work(connection, event)
    if row is None:
        return
    was_answer = row.status == "answered"
    draft = row.answer if was_answer else row.draft
    values = {"status": "open", "answer": None, "draft": draft}
    values |= {"slot": event.new["slot"], "lease_until": event.new["lease_until"]}
    _update_work(connection, event, seq=event.seq, opened=event.seq, verdict=None, **values)
    taken = event.new["slot"] is not None and row.slot is None
    free = tasks.c.free - int(taken)
    if was_answer:
        _count(connection, event, -1, free=free)
    elif taken:
        _update_task(connection, event.task, free=free)


def _looked(connection: Connection, event: LogEvent) -> None:
    """A reviewer sees the answers, and is not given the task any more."""
    row = _work(connection, event)
    if row is not None:
        if row.status != "answered":
            _give_up(connection, event, status="looked")
        return
    key = {"task": event.task, "version": event.version, "person": event.person}
    values = {"status": "looked", "order": "[]", "lease_until": 0.0, "opened": event.seq}
    connection.execute(insert(work).values(**key, **values, seconds=0.0, seq=event.seq))


def _reviewed(connection: Connection, event: LogEvent) -> None:
    """A verdict. new: {"person", "accepted", "comment"}; a refused answer returns as a draft."""
    new = event.new
    answer = LogEvent(event.kind, new["person"], event.task, event.version, seq=event.seq)
    verdict = dumps({"accepted": new["accepted"], "comment": new["comment"]})
    row = _work(connection, answer)
    if new["accepted"] or row is None:
        _update_work(connection, answer, verdict=verdict)
        return
    values = {"draft": row.answer, "answer": None, "verdict": verdict}
    _give_up(connection, answer, status="returned", **values)
    _count(connection, answer, -1)


def _joined(connection: Connection, event: LogEvent) -> None:
    """A new account. new: {"name", "role", "kind"}."""
    active = event.new["kind"] != "imported"
    values = event.new | {"id": event.person, "active": active, "since": event.at, "done": 0}
    connection.execute(insert(people).values(**values))


def _person_changed(connection: Connection, event: LogEvent) -> None:
    """An owner changes an account. new: {"person", "role", "active"}."""
    values = {"role": event.new["role"], "active": event.new["active"]}
    connection.execute(update(people).where(people.c.id == event.new["person"]).values(**values))


def _work(connection: Connection, event: LogEvent) -> Row | None:
    return connection.execute(select(work).where(*_here(event))).first()


def _here(event: LogEvent) -> tuple[Any, ...]:
    return (
        work.c.task == event.task,
        work.c.version == event.version,
        work.c.person == event.person,
    )


def _update_work(connection: Connection, event: LogEvent, **values: Any) -> None:
    connection.execute(update(work).where(*_here(event)).values(**values))


def _update_task(connection: Connection, task: str | None, **values: Any) -> None:
    connection.execute(update(tasks).where(tasks.c.id == task).values(**values))


def _give_up(connection: Connection, event: LogEvent, **values: Any) -> None:
    """Free the place of a piece of work: its task waits in the queue anew."""
    row = _work(connection, event)
    _update_work(connection, event, slot=None, seq=event.seq, **values)
    if row is not None and row.slot is not None:
        _update_task(connection, event.task, free=tasks.c.free + 1, turn=event.seq)


def _count(connection: Connection, event: LogEvent, change: int, **values: Any) -> None:
    """Count an answer of a task's present version, and of a person."""
    here = (tasks.c.id == event.task, tasks.c.version == event.version)
    counted = update(tasks).where(*here).values(answers=tasks.c.answers + change, **values)
    connection.execute(counted)
    done = update(people).where(people.c.id == event.person)
    connection.execute(done.values(done=people.c.done + change))


_FOLDS: dict[str, Callable[[Connection, LogEvent], None]] = {
    "changed": _changed,
    "prioritised": _prioritised,
    "opened": _opened,
    "expired": _expired,
    "draft": _draft,
    "answered": _answered,
    "skipped": _skipped,
    "reopened": _reopened,
    "looked": _looked,
    "reviewed": _reviewed,
    "joined": _joined,
    "person_changed": _person_changed,
}
