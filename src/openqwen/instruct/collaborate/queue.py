"""The queue: who gets which task, and for how long.

A task has `wanted` places (the overlap). A person holds a place from the lease on, and keeps it by
the answer. A lease that runs out frees its place when someone else looks for work; the draft stays,
and an answer that comes later is kept, as an extra one where all places are taken.

`turn` is the event since which a task waits. Whenever a place becomes free the task waits anew, so
a person's frontier (the turn of the latest task taken) says exactly where to look next, and the
next task is one step in an index however many tasks there are.

Statuses of work: open (a lease), expired, answered, skipped, returned (a reviewer refused the
answer), looked (a reviewer saw others' answers), stale (the task has changed).
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, exists, func, literal, select

from openqwen.instruct.collaborate.events import (
    GOLD_LANE,
    JUDGE_LANE,
    LogEvent,
    loads,
    record,
    record_all,
)
from openqwen.instruct.collaborate.settings import LEVELS, ProjectConfig
from openqwen.instruct.collaborate.tables import (
    GOLD,
    OPEN,
    UNFINISHED,
    WAITING,
    frontiers,
    people,
    tasks,
    work,
)

_MOST_COUNTED = 1_000  # tasks that are left
_MOST_EXPIRED = 200  # leases that one request ends


@dataclass(frozen=True)
class Turn:
    """What a person does next. work: the row of their lease, or None for this reason."""

    work: Row | None
    reason: str | None = None
    wait: float | None = None


def next_work(
    connection: Connection, person: Row, project: ProjectConfig, now: float | None = None
) -> Turn:
    """The open work of a person, or else a new lease on the next task. now: seconds since 1970."""
    now = time.time() if now is None else now
    _end_leases(connection, person.id, project, now)
    if (row := _open_work(connection, person.id)) is not None:
        half = now + project.lease / 2
        renew = row.status != "open" or not half <= row.lease_until <= now + project.lease
        return Turn(renewed(connection, row, project, now) if renew else row)
    if (row := lease_next(connection, person, project, now)) is not None:
        return Turn(row)
    soonest = _held_by_others(connection, person.id)
    if soonest is None:
        return Turn(None, "none_left")
    return Turn(None, "all_leased", min(max(soonest - now, 1.0), 60.0))


def lease_next(
    connection: Connection, person: Row, project: ProjectConfig, now: float
) -> Row | None:
    """A new lease on the next task, whatever else the person holds; None where there is none."""
    found, lane = _next_task(connection, person, project)
    return None if found is None else _lease(connection, person.id, found, lane, project, now)


def work_of(
    connection: Connection, person: str, task: str, version: int | None = None
) -> Row | None:
    """A person's work on a task, on the latest version that the person has seen."""
    chosen = select(work).where(work.c.person == person, work.c.task == task)
    if version is not None:
        chosen = chosen.where(work.c.version == version)
    return connection.execute(chosen.order_by(work.c.version.desc()).limit(1)).first()


def free_slot(connection: Connection, task: str, version: int) -> int | None:
    """The lowest place of a task that nobody holds; None where there is none, and for gold."""
    chosen = select(tasks.c.wanted, tasks.c.gold).where(
        tasks.c.id == task, tasks.c.version == version
    )
    row = connection.execute(chosen).first()
    if row is None or row.gold is not None:
        return None
    held = select(work.c.slot).where(work.c.task == task, work.c.version == version)
    taken = set(connection.execute(held.where(work.c.slot.is_not(None))).scalars())
    return next((slot for slot in range(row.wanted) if slot not in taken), None)


def left_for(connection: Connection, person: str) -> int:
    """How many tasks have a free place for a person; no more than 1,000 are counted."""
    reached = _frontiers(connection, person)
    left = 0
    for level in _levels(connection):
        waiting = select(literal(1)).where(*_waiting(level, reached.get(level, 0)))
        few = waiting.limit(_MOST_COUNTED - left).subquery()
        left += connection.execute(select(func.count()).select_from(few)).scalar_one()
    return left


def drawn_order(
    project: ProjectConfig, task: str, version: int, person: str, count: int
) -> list[int]:
    """The order in which a person sees the responses, drawn by a generator of that name."""
    order = list(range(count))
    random.Random(f"{project.seed}/order/{task}/{version}/{person}").shuffle(order)
    return order


def _open_work(connection: Connection, person: str) -> Row | None:
    """The latest lease or returned answer; else a draft whose place nobody else has taken."""
    chosen = select(work).where(work.c.person == person, UNFINISHED)
    chosen = chosen.order_by(work.c.seq.desc()).limit(1)
    held = chosen.where(work.c.status != "expired")
    if (row := connection.execute(held).first()) is not None:
        return row
    present = (tasks.c.id == work.c.task, tasks.c.version == work.c.version, WAITING)
    return connection.execute(chosen.where(exists().where(*present))).first()


def _end_leases(connection: Connection, person: str, project: ProjectConfig, now: float) -> None:
    """End the leases of others that have run out.

    A lease that ends later than any new one could was given before the clock was set back.
    """
    late = (work.c.lease_until < now) | (work.c.lease_until > now + 2 * project.lease)
    here = (OPEN, work.c.person != person, late)
    rows = connection.execute(select(work).where(*here).limit(_MOST_EXPIRED)).all()
    ended = [LogEvent("expired", row.person, row.task, row.version) for row in rows]
    record_all(connection, ended)


def _next_task(
    connection: Connection, person: Row, project: ProjectConfig
) -> tuple[Row | None, int]:
    reached = _frontiers(connection, person.id)
    mine = exists().where(
        work.c.task == tasks.c.id, work.c.version == tasks.c.version, work.c.person == person.id
    )

    def first(*where: Any) -> Row | None:
        chosen = select(tasks).where(*where, ~mine).order_by(tasks.c.turn).limit(1)
        return connection.execute(chosen).first()

    def after(lane: int) -> Any:
        return tasks.c.turn > reached.get(lane, 0)

    if person.kind == "model":  # a judge takes no place of a person
        return first(after(JUDGE_LANE)), JUDGE_LANE
    gold = (GOLD, after(GOLD_LANE))
    share = random.Random(f"{project.seed}/gold/{person.id}/{person.done}").random()
    if share < project.gold_share and (row := first(*gold)):
        return row, GOLD_LANE
    for level in _levels(connection):
        if row := first(*_waiting(level, reached.get(level, 0))):
            return row, level
    return first(*gold), GOLD_LANE


def _levels(connection: Connection) -> Iterator[int]:
    """The priorities at which tasks wait, highest first."""
    level: int | None = LEVELS
    while level is not None:
        lower = select(func.max(tasks.c.priority)).where(WAITING, tasks.c.priority < level)
        level = connection.execute(lower).scalar()
        if level is not None:
            yield level


def _waiting(level: int, turn: int) -> tuple[Any, ...]:
    return (WAITING, tasks.c.priority == level, tasks.c.turn > turn)


def _frontiers(connection: Connection, person: str) -> dict[int, int]:
    chosen = select(frontiers.c.lane, frontiers.c.turn).where(frontiers.c.person == person)
    return dict(connection.execute(chosen).tuples().all())


def _lease(
    connection: Connection, person: str, task: Row, lane: int, project: ProjectConfig, now: float
) -> Row | None:
    slot = None if lane < 0 else free_slot(connection, task.id, task.version)
    new = {"slot": slot, "lease_until": now + project.lease, "lane": lane, "turn": task.turn}
    order = drawn_order(project, task.id, task.version, person, task.responses)
    record(connection, LogEvent("opened", person, task.id, task.version, order, new=new))
    return work_of(connection, person, task.id, task.version)


def renewed(connection: Connection, row: Row, project: ProjectConfig, now: float) -> Row | None:
    """The same work with a new lease; it takes a free place if it has lost its own."""
    slot = row.slot
    is_judge = connection.execute(select(people.c.kind).where(people.c.id == row.person)).scalar()
    if slot is None and is_judge != "model":
        slot = free_slot(connection, row.task, row.version)
    new = {"slot": slot, "lease_until": now + project.lease}
    order = loads(row.order)
    record(connection, LogEvent("opened", row.person, row.task, row.version, order, new=new))
    return work_of(connection, row.person, row.task, row.version)


def _held_by_others(connection: Connection, person: str) -> float | None:
    """When the first lease ends on a task that this person has not had; None: there is none."""
    other = work.alias()
    had = exists().where(other.c.task == work.c.task, other.c.person == person)
    here = (OPEN, work.c.slot.is_not(None), work.c.person != person)
    soonest = select(func.min(work.c.lease_until)).where(*here, ~had)
    return connection.execute(soonest).scalar()
