"""The database of a project: SQLite in its folder, or PostgreSQL by a URL; and its migrations."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from openqwen.instruct.collaborate.tables import about
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

_LOCK = 0x0A11_0C47  # PostgreSQL's advisory lock of writers
_WAIT = 30_000  # milliseconds that SQLite waits for another writer


class Database:
    """Connections to a project's database.

    One transaction writes at a time, on both databases alike. So sequence numbers have no gaps, and
    what a transaction has read stays true until it is committed. A commit is on disk when it
    returns.

    Args:
        place: an SQLite file, or a PostgreSQL URL.
        project: its id; a database of another project is refused.

    Raises:
        OpenQwenError: the database cannot be opened, is damaged, or is another project's.
    """

    def __init__(self, place: Path | str, project: str):
        self.place = place
        self._writing = threading.Lock()
        try:
            self.engine = _sqlite(place) if isinstance(place, Path) else _postgresql(place)
            with self.engine.connect() as connection:
                self._check(connection)
            with self.write() as connection:
                _migrate(connection)
                _claim(connection, project, self.name)
        except DBAPIError as error:
            raise self.failure(error) from None

    @property
    def name(self) -> str:
        """Where it is, without a password."""
        return self.engine.url.render_as_string() if self.is_postgresql else str(self.place)

    @property
    def is_postgresql(self) -> bool:
        """Whether a PostgreSQL server holds it."""
        return self.engine.dialect.name == "postgresql"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; committed at the end of the block."""
        with self._writing, self.engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                if self.is_postgresql:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _LOCK})
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database from its first query on."""
        with self.engine.connect() as connection:
            if self.is_postgresql:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def failure(self, error: DBAPIError) -> OpenQwenError:
        """What a user can do about an error of the database."""
        given = error.orig.args[0] if error.orig and error.orig.args else "unknown"
        if isinstance(given, dict):  # pg8000's fields of an error; M is the message
            given = given.get("M", "unknown")
        reason = str(given).strip().partition("\n")[0].rstrip(".")
        do = "check that the database is reachable and that its disk has space"
        if "readonly" in reason or "read-only" in reason or "unable to open" in reason:
            do = "let this user write the file and its folder"
        elif "full" in reason or "No space" in reason:
            do = "free some space; every acknowledged answer is saved"
        elif "malformed" in reason or "not a database" in reason:
            do = _copy_again(self.place)
        return OpenQwenError(f"The database cannot be used: {reason}.", self.name, do)

    def _check(self, connection: Connection) -> None:
        """Refuse an SQLite file that is damaged, as one copied while it was written may be."""
        if self.is_postgresql:
            return
        found = connection.execute(text("PRAGMA quick_check(1)")).scalar()
        if found != "ok":
            what = f"This database is damaged: {found}."
            raise OpenQwenError(what, self.name, _copy_again(self.place))


def _copy_again(place: Path | str) -> str:
    return (
        "copy the project again while no server runs, or the database by `sqlite3 "
        f"{place} '.backup COPY'`; or start an empty project and import an export of its events"
    )


def _sqlite(path: Path) -> Engine:
    """SQLite with a write-ahead log. Each commit is flushed to the disk (synchronous=FULL)."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(mode=0o600)
        except OSError as error:
            what = f"The database cannot be made: {error.strerror}."
            raise OpenQwenError(what, path, "let this user write the folder") from None
    engine = create_engine(f"sqlite:///{path}", pool_size=40, max_overflow=0)

    @event.listens_for(engine, "connect")
    def opened(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not in the driver
        connection.execute(f"PRAGMA busy_timeout={_WAIT}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once where another one writes,
        # whatever the timeout. So writers take the lock at their begin.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+pg8000")
        query = dict(parsed.query)
        if str(query.get("host", "")).startswith("/"):  # as libpq writes the folder of a socket
            query["unix_sock"] = f"{query.pop('host')}/.s.PGSQL.{query.pop('port', 5432)}"
            parsed = parsed.set(query=query)
        if parsed.get_backend_name() != "postgresql":
            raise ArgumentError(f"the scheme is {parsed.drivername}")
        return create_engine(parsed, pool_size=20, max_overflow=20, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        what = f"This is no database URL: {error}."
        do = "give postgresql://USER:PASSWORD@HOST/DATABASE"
        raise OpenQwenError(what, "--database", do) from None
    except ModuleNotFoundError as error:
        what = f"PostgreSQL needs the library {error.name}."
        raise OpenQwenError(what, "--database", pip_install("openqwen[postgresql]")) from None


def _migrate(connection: Connection) -> None:
    """Bring the tables to the newest version; refuse tables of a newer program."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    now = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory.from_config(config)
    if now and now not in {revision.revision for revision in script.walk_revisions()}:
        what = f"A newer openqwen made this database (version {now})."
        raise OpenQwenError(what, do="update openqwen")
    if now != script.get_current_head():
        command.upgrade(config, "head")


def _claim(connection: Connection, project: str, name: str) -> None:
    """Write the project's id into a new database; refuse that of another project."""
    if connection.execute(select(about.c.value).where(about.c.name == "project")).first() is None:
        connection.execute(about.insert().values(name="project", value=project))
    found = connection.execute(select(about.c.value).where(about.c.name == "project")).scalar()
    if found != project:
        what = f"This database belongs to the project {found}, not to {project}."
        raise OpenQwenError(what, name, "give each project a database of its own")
