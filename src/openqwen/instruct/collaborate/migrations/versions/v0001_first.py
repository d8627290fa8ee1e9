"""The first tables."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables. A later change of `tables.py` is a migration of its own."""
    big, text, whole, real = sa.BigInteger, sa.Text, sa.Integer, sa.Float

    def need(name: str, kind: type, **options: Any) -> sa.Column:
        return sa.Column(name, kind, nullable=False, **options)

    def maybe(*names: str, kind: type = text) -> list[sa.Column]:
        return [sa.Column(name, kind) for name in names]

    op.create_table(
        "events",
        sa.Column("seq", big, primary_key=True, autoincrement=False),
        need("at", text),
        *maybe("person"),
        need("kind", text),
        *maybe("task"),
        *maybe("version", kind=whole),
        *maybe("order", "old", "new"),
        *maybe("seconds", kind=real),
        *maybe("key"),
        sa.UniqueConstraint("person", "key"),
    )
    op.create_table(
        "contents",
        sa.Column("task", text, primary_key=True),
        sa.Column("version", whole, primary_key=True),
        need("body", text),
    )
    op.create_table(
        "tasks",
        sa.Column("id", text, primary_key=True),
        need("number", big, unique=True),
        need("version", whole),
        need("preview", text),
        *(need(name, whole) for name in ("responses", "wanted", "free", "answers", "priority")),
        need("turn", big),
        *maybe("gold"),
    )
    free, gold = sa.text("free > 0"), sa.text("gold IS NOT NULL")
    _partial("tasks_waiting", "tasks", ["priority", "turn"], free)
    _partial("tasks_gold", "tasks", ["turn"], gold)
    op.create_index("tasks_turn", "tasks", ["turn"])
    op.create_table(
        "work",
        sa.Column("task", text, primary_key=True),
        sa.Column("version", whole, primary_key=True),
        sa.Column("person", text, primary_key=True),
        need("status", text),
        *maybe("slot", kind=whole),
        need("order", text),
        need("lease_until", real),
        need("opened", big),
        *maybe("draft", "answer"),
        need("seconds", real),
        need("seq", big),
        *maybe("verdict"),
        sa.UniqueConstraint("task", "version", "slot"),
    )
    op.create_index("work_mine", "work", ["person", "seq"])
    _partial("work_leases", "work", ["lease_until"], sa.text("status = 'open'"))
    unfinished = sa.text("status IN ('open', 'returned', 'expired')")
    _partial("work_unfinished", "work", ["person", "seq"], unfinished)
    op.create_table(
        "frontiers",
        sa.Column("person", text, primary_key=True),
        sa.Column("lane", whole, primary_key=True),
        need("turn", big),
    )
    op.create_table(
        "people",
        sa.Column("id", text, primary_key=True),
        need("name", text, unique=True),
        need("role", text),
        need("kind", text),
        need("active", sa.Boolean),
        need("since", text),
        need("done", whole),
    )
    op.create_table("credentials", sa.Column("person", text, primary_key=True), need("hash", text))
    op.create_table(
        "sessions",
        sa.Column("hash", text, primary_key=True),
        need("person", text, index=True),
        need("csrf", text),
        need("expires", real),
    )
    op.create_table(
        "invitations",
        sa.Column("id", text, primary_key=True),
        need("hash", text, unique=True),
        need("role", text),
        *maybe("person", "by"),
        need("expires", real),
        need("used", sa.Boolean),
    )
    op.create_table("about", sa.Column("name", text, primary_key=True), need("value", text))


def _partial(name: str, table: str, columns: list[str], where: sa.TextClause) -> None:
    op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
