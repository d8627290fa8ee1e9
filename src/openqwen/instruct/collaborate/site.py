"""A project that is being annotated: its settings, its database, and what limits its visitors."""

import hmac
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request
from sqlalchemy import Connection, delete, insert, select
from starlette.responses import Response

from openqwen.http.errors import ApiError
from openqwen.http.gate import LOOPBACK
from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.accounts import Caller, RateLimit, Role
from openqwen.instruct.collaborate.annotate import Json
from openqwen.instruct.collaborate.database import Database
from openqwen.instruct.collaborate.events import LogEvent, dumps, loads, record
from openqwen.instruct.collaborate.quality import QualityCache
from openqwen.instruct.collaborate.settings import DATABASE_FILE, AnnotateConfig, open_project
from openqwen.instruct.collaborate.tables import about, invitations, people

_SAFE = ("GET", "HEAD")


class Site:
    """A project's settings and database, and who may do what.

    Args:
        folder: the project; a new or empty folder becomes one.
        config: the flags of `openqwen annotate`.

    Raises:
        OpenQwenError: the project or its database cannot be opened.
    """

    def __init__(self, folder: Path, config: AnnotateConfig):
        self.folder, self.config = folder, config
        self.project = open_project(folder)
        url = config.database or os.environ.get("OPENQWEN_DATABASE")
        self.database = Database(url or folder / DATABASE_FILE, self.project.id)
        self.quality = QualityCache(self.database, self.project)
        self.cookie = f"openqwen_{self.project.id}"
        self.requests = RateLimit(600, 30)  # of one session, or of one address without one
        self.attempts = RateLimit(10, 60)  # to log in, of a name at an address
        self.visitors = RateLimit(60, 60)  # attempts of an address
        # A flood of attempts is recorded once a minute for each address, not once an attempt.
        self.floods = RateLimit(1, 60)
        with self.database.write() as connection:
            self._record_settings(connection)

    @property
    def hosts(self) -> list[str]:
        """Values of the Host header that the site answers to."""
        return [*LOOPBACK, self.config.host, *self.config.name]

    def _record_settings(self, connection: Connection) -> None:
        """Record the project's settings where they have changed since the last start."""
        known = connection.execute(select(about.c.value).where(about.c.name == "settings")).scalar()
        old, new = loads(known), self.project.model_dump()
        if old != new:
            connection.execute(delete(about).where(about.c.name == "settings"))
            connection.execute(insert(about).values(name="settings", value=dumps(new)))
            record(connection, LogEvent("configured", old=old, new=new))

    def caller(self, request: Request, role: Role) -> Caller:
        """Who makes a request.

        Raises:
            ApiError: 401 without a session, 403 without the role or, where the request may change
                something, without the session's CSRF token or from another origin; 429.
        """
        token = request.cookies.get(self.cookie, "")
        caller = None
        if token:
            with self.database.read() as connection:
                caller = accounts.find_session(connection, token)
        self.requests.check(caller.person.id if caller else address(request))
        if caller is None:
            raise ApiError(401, "Log in first.", code="not_logged_in")
        if request.method not in _SAFE:
            self.check_origin(request)
            given = request.headers.get("x-csrf-token", "").encode()
            if not hmac.compare_digest(given, caller.csrf.encode()):
                message = "The X-CSRF-Token header is missing or wrong. Load the page again."
                raise ApiError(403, message, code="csrf")
        if not caller.allows(role):
            raise ApiError(403, f"Only the role '{role}' may do this.", code="not_allowed")
        return caller

    def check_origin(self, request: Request) -> None:
        """Refuse a request that a page of another origin sends."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise ApiError(403, "A page of another site sent this.", code="wrong_origin")

    def check_login(self, request: Request, name: str, password: str) -> str:
        """The id of the person with this name and password; ApiError 401 where there is none."""
        self.check_origin(request)
        where = address(request)
        try:
            self.visitors.check(where)
            self.attempts.check(f"{where} {name[:100]}")
        except ApiError:
            if self.floods.take(where) == 0:
                self._refused(name, where, "too_many")
            raise
        with self.database.read() as connection:
            person, known = accounts.find_login(connection, name)
        if not accounts.password_is(password, known) or person is None:
            self._refused(name, where, "wrong_password")
            raise ApiError(401, "Name or password is wrong.", code="wrong_password")
        return person.id

    def begin_session(self, person: str) -> tuple[str, Caller]:
        """(the token of a new session of a person, its caller)."""
        with self.database.write() as connection:
            token = accounts.start_session(connection, person, self.project.session_hours)
            caller = accounts.find_session(connection, token)
        assert caller is not None
        return token, caller

    def _refused(self, name: str, where: str, reason: str) -> None:
        """Record a refused log-in, without the password."""
        new = {"name": name[:100], "address": where, "reason": reason}
        with self.database.write() as connection:
            record(connection, LogEvent("login_refused", new=new))

    def set_cookie(self, response: Response, token: str) -> None:
        """Give the browser its session; an empty token ends it."""
        seconds = round(3_600 * self.project.session_hours) if token else 0
        response.set_cookie(
            self.cookie,
            token,
            max_age=seconds,
            path="/",
            secure=self.config.https,
            httponly=True,
            samesite="strict",
        )

    def as_link(self, request: Request, made: Json) -> Json:
        """An invitation with its link, under the address that the browser uses."""
        scheme = "https" if self.config.https else "http"
        link = f"{scheme}://{request.headers['host']}/#/invitation/{made['token']}"
        return {"id": made["id"], "link": link, "expires": made["expires"]}

    def open_invitations(self) -> list[Json]:
        """Invitations that nobody has taken yet."""
        open_ = (invitations.c.used.is_(False), invitations.c.expires > time.time())
        chosen = select(invitations, people.c.name).outerjoin(
            people, people.c.id == invitations.c.person
        )
        with self.database.read() as connection:
            rows = connection.execute(chosen.where(*open_).order_by(invitations.c.expires)).all()
        return [
            {"id": row.id, "role": row.role, "name": row.name, "by": row.by}
            | {"expires": accounts.iso(row.expires)}
            for row in rows
        ]

    def me(self, caller: Caller) -> Json:
        """The caller, the CSRF token, and what the page must know of the project."""
        row = caller.person
        person = {"id": row.id, "name": row.name, "role": row.role}
        return {"person": person, "csrf": caller.csrf, "project": self.project.shown()}


def address(request: Request) -> str:
    """The client's address; IPv6 addresses count by their network."""
    host = request.client.host if request.client else "?"
    return ":".join(host.split(":")[:4]) if ":" in host else host
