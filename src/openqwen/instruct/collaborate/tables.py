"""Tables of an annotation project: the log of events, the state folded from it, and secrets."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

# The truth. Sequence numbers have no gaps. JSON is stored as text: the same in all databases, and
# it can hold any character.
events = Table(
    "events",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Text, nullable=False),
    Column("person", Text),
    Column("kind", Text, nullable=False),
    Column("task", Text),
    Column("version", Integer),
    Column("order", Text),
    Column("old", Text),
    Column("new", Text),
    Column("seconds", Float),
    Column("key", Text),
    UniqueConstraint("person", "key"),
)

# State: `events.rebuild` makes these tables again from the log.
contents = Table(
    "contents",
    metadata,
    Column("task", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("body", Text, nullable=False),  # {"prompt", "responses": [{"text", "origin"}], "origin"}
)
tasks = Table(
    "tasks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("number", BigInteger, nullable=False, unique=True),  # the event that imported it
    Column("version", Integer, nullable=False),
    Column("preview", Text, nullable=False),
    Column("responses", Integer, nullable=False),
    Column("wanted", Integer, nullable=False),  # places for people
    Column("free", Integer, nullable=False),  # places that nobody holds; 0 for a gold task
    Column("answers", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("turn", BigInteger, nullable=False),  # the event since which it waits in the queue
    Column("gold", Text),  # the known ranks, best first
)
turns = Index("tasks_turn", tasks.c.turn)
work = Table(
    "work",
    metadata,
    Column("task", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("person", Text, primary_key=True),
    Column("status", Text, nullable=False),  # see `queue.py`
    Column("slot", Integer),  # the place of the task that this person holds
    Column("order", Text, nullable=False),  # the response shown at each place
    Column("lease_until", Float, nullable=False),  # seconds since 1970
    Column("opened", BigInteger, nullable=False),
    Column("draft", Text),
    Column("answer", Text),
    Column("seconds", Float, nullable=False),
    Column("seq", BigInteger, nullable=False),  # the latest event
    Column("verdict", Text),
    UniqueConstraint("task", "version", "slot"),
)
mine = Index("work_mine", work.c.person, work.c.seq)
# Conditions of partial indices, as text: a query uses such an index only if it has the same words,
# not a parameter.
WAITING = text("tasks.free > 0")
GOLD = text("tasks.gold IS NOT NULL")
OPEN = text("work.status = 'open'")
UNFINISHED = text("work.status IN ('open', 'returned', 'expired')")
frontiers = Table(  # tasks before this turn have nothing for this person
    "frontiers",
    metadata,
    Column("person", Text, primary_key=True),
    Column("lane", Integer, primary_key=True),
    Column("turn", BigInteger, nullable=False),
)
people = Table(
    "people",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("kind", Text, nullable=False),  # human, model, or imported
    Column("active", Boolean, nullable=False),
    Column("since", Text, nullable=False),
    Column("done", Integer, nullable=False),
)
STATE = (contents, tasks, work, frontiers, people)

# Secrets are in no event: the log can be exported.
credentials = Table(
    "credentials",
    metadata,
    Column("person", Text, primary_key=True),
    Column("hash", Text, nullable=False),
)
sessions = Table(
    "sessions",
    metadata,
    Column("hash", Text, primary_key=True),
    Column("person", Text, nullable=False, index=True),
    Column("csrf", Text, nullable=False),
    Column("expires", Float, nullable=False),
)
invitations = Table(
    "invitations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("hash", Text, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("person", Text),  # whose password it sets again
    Column("by", Text),
    Column("expires", Float, nullable=False),
    Column("used", Boolean, nullable=False),
)
about = Table(
    "about",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
