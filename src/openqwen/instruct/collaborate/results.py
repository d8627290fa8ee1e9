"""Tasks with their answers, read a block at a time, for exports and for quality."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, select

from openqwen.instruct.collaborate.answers import Answer, preference
from openqwen.instruct.collaborate.events import loads
from openqwen.instruct.collaborate.tables import contents, people, tasks, work

_BLOCK = 200  # tasks: more objects that live at once cost the garbage collector more


@dataclass(frozen=True)
class PersonAnswer:
    """One person's answer to a task.

    order: the response shown at each place. pairs: see `answers.preference`.
    """

    person: str
    name: str
    kind: str
    answer: Answer
    order: list[int]
    seconds: float
    seq: int
    pairs: dict[tuple[int, int], int]

    @property
    def ranks(self) -> list[list[int]]:
        """Tiers of responses, best first."""
        return self.answer["ranks"]


@dataclass
class TaskResult:
    """A task and the answers to its present version.

    body: its prompt and responses, where they were asked for.
    """

    row: Row
    gold: list[list[int]] | None
    body: dict[str, Any] | None
    answers: list[PersonAnswer] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The task's id."""
        return self.row.id

    @property
    def count(self) -> int:
        """The number of its responses."""
        return self.row.responses


def results(connection: Connection, bodies: bool = True) -> Iterator[list[TaskResult]]:
    """Blocks of the tasks that have answers, in the order of their import."""
    last = 0
    while True:
        chosen = select(tasks)
        if bodies:
            here = (contents.c.task == tasks.c.id) & (contents.c.version == tasks.c.version)
            chosen = select(tasks, contents.c.body).join(contents, here)
        chosen = chosen.where(tasks.c.number > last, tasks.c.answers > 0)
        rows = connection.execute(chosen.order_by(tasks.c.number).limit(_BLOCK)).all()
        if not rows:
            return
        block = {
            row.id: TaskResult(row, loads(row.gold), loads(row.body) if bodies else None)
            for row in rows
        }
        _add_answers(connection, block, last, rows[-1].number)
        last = rows[-1].number
        yield list(block.values())


def _add_answers(
    connection: Connection, block: dict[str, TaskResult], after: int, until: int
) -> None:
    columns = (work.c.task, work.c.person, work.c.answer, work.c.order, work.c.seconds, work.c.seq)
    here = (work.c.task == tasks.c.id) & (work.c.version == tasks.c.version)
    chosen = (
        select(*columns, people.c.name, people.c.kind)
        .join(tasks, here)
        .join(people, people.c.id == work.c.person)
        .where(work.c.status == "answered", tasks.c.number > after, tasks.c.number <= until)
        .order_by(tasks.c.number, work.c.seq)
    )
    for row in connection.execute(chosen):
        if row.task in block:
            answer, order = loads(row.answer), loads(row.order)
            about = (row.person, row.name, row.kind, answer, order, row.seconds, row.seq)
            pairs = preference(answer["ranks"], block[row.task].count)
            block[row.task].answers.append(PersonAnswer(*about, pairs))
