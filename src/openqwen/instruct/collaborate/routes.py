"""The annotation site's routes. Each is a plain function, which runs in a thread."""

import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi import Path as PathField
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Row, select
from sqlalchemy.exc import DataError, DBAPIError

from openqwen.http import errors
from openqwen.http.errors import ApiError
from openqwen.http.json_body import JSON, JSONRoute
from openqwen.http.static import SHARED, PageFiles
from openqwen.instruct.collaborate import accounts, annotate, review
from openqwen.instruct.collaborate.accounts import Caller, Role
from openqwen.instruct.collaborate.answers import AnswerBody
from openqwen.instruct.collaborate.events import LogEvent, read_events, record
from openqwen.instruct.collaborate.export import EXPORTS, export_bytes
from openqwen.instruct.collaborate.read_tasks import import_file
from openqwen.instruct.collaborate.site import Site, address
from openqwen.instruct.collaborate.tables import people
from openqwen.support.hub import DATA_SUFFIXES

Plain = r"^[^\x00]*$"  # PostgreSQL's texts cannot hold it
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{8,64}$")]
Task = Annotated[str, PathField(max_length=200, pattern=Plain)]
Id = Annotated[str, PathField(max_length=200, pattern=Plain)]
Line = Annotated[str, StringConstraints(max_length=1_000, pattern=Plain)]
Lease = Annotated[str, StringConstraints(max_length=20)]
Seconds = Annotated[float, Field(ge=0, le=86_400 * 7)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoginBody(_Body):
    """Who logs in, or takes an invitation."""

    name: Line
    password: Line


class PasswordBody(_Body):
    """A change of one's own password."""

    old: Line
    new: Line


class DraftBody(_Body):
    """Work in progress. seconds: active time on the task so far."""

    lease: Lease
    answer: AnswerBody
    seconds: Seconds = 0.0


class SubmitBody(DraftBody):
    """An answer. key: made once for this submission, so that it is recorded once."""

    key: Key


class SkipBody(_Body):
    """A task that a person cannot answer."""

    lease: Lease
    key: Key
    reason: Line = ""
    seconds: Seconds = 0.0


class KeyBody(_Body):
    """The key of a request that is recorded once."""

    key: Key


class VerdictBody(KeyBody):
    """A reviewer's verdict on an answer."""

    accepted: bool
    comment: str = Field("", max_length=10_000)


class InvitationBody(_Body):
    """Whom to invite, and for how long the link counts."""

    role: Role = "annotator"
    days: float = Field(7, gt=0, le=90)


class PersonBody(_Body):
    """Changes of an account."""

    role: Role | None = None
    active: bool | None = None


class TaskBody(_Body):
    """Changes of a task's place in the queue. gold: the known ranks, or null."""

    priority: int | None = Field(None, ge=0, le=9)
    gold: list[list[int]] | None = None


def application(site: Site) -> FastAPI:
    """The application without its `Gate`."""
    app = FastAPI(title="OpenQwen annotation", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = JSONRoute
    _add_accounts(app, site)
    _add_work(app, site)
    _add_review(app, site)
    _add_owner(app, site)
    page_files().install(app)
    errors.install(app, AnswerBody.model_fields)

    @app.exception_handler(DBAPIError)
    async def failed(request: Request, error: DBAPIError) -> Response:
        if isinstance(error, DataError):
            return ApiError(400, "A text has characters that cannot be stored.").response()
        failure = site.database.failure(error)
        message = f"{failure.what} Nothing is lost: keep this page open and try again."
        return ApiError(503, message, code="storage", retry=5).response()

    return app


def page_files() -> PageFiles:
    """The files of the site's pages."""
    return PageFiles(SHARED, files("openqwen.instruct.collaborate") / "pages")


def _need(site: Site, role: Role) -> Any:
    """A dependency: the caller, who has this role or a higher one."""

    def caller(request: Request) -> Caller:
        return site.caller(request, role)

    return Annotated[Caller, Depends(caller)]


def _add_accounts(app: FastAPI, site: Site) -> None:
    Annotator: Any = _need(site, "annotator")

    def session(person: str) -> Response:
        token, caller = site.begin_session(person)
        response = JSON(site.me(caller))
        site.set_cookie(response, token)
        return response

    @app.get("/api/me")
    def me(caller: Annotator) -> Response:
        return JSON(site.me(caller))

    @app.post("/api/login")
    def login(request: Request, body: LoginBody) -> Response:
        return session(site.check_login(request, body.name, body.password))

    @app.post("/api/logout")
    def logout(caller: Annotator, body: dict[str, None]) -> Response:
        with site.database.write() as connection:
            accounts.end_session(connection, caller)
        response = JSON({})
        site.set_cookie(response, "")
        return response

    @app.post("/api/password")
    def password(request: Request, caller: Annotator, body: PasswordBody) -> Response:
        person = site.check_login(request, caller.person.name, body.old)
        hashed = accounts.hash_password(body.new)
        with site.database.write() as connection:
            accounts.set_password(connection, person, hashed)
        return session(person)

    @app.get("/api/invitations/{token}")
    def invitation(request: Request, token: Id) -> Response:
        site.visitors.check(address(request))
        with site.database.read() as connection:
            row = accounts.invitation_of(connection, token)
            name = row.person and accounts.find_person(connection, row.person).name
        return JSON({"role": row.role, "project": site.project.title, "name": name})

    @app.post("/api/invitations/{token}/accept")
    def accept(request: Request, token: Id, body: LoginBody) -> Response:
        site.check_origin(request)
        site.visitors.check(address(request))
        with site.database.read() as connection:
            accounts.invitation_of(connection, token)  # before a hash is computed
        hashed = accounts.hash_password(body.password)
        with site.database.write() as connection:
            person = accounts.accept(connection, token, body.name, hashed)
        return session(person)


def _add_work(app: FastAPI, site: Site) -> None:
    Annotator: Any = _need(site, "annotator")
    database, project = site.database, site.project

    @app.post("/api/next")
    def take(caller: Annotator, body: dict[str, None]) -> Response:
        with database.write() as connection:
            return JSON(annotate.take_next(connection, caller.person, project))

    @app.put("/api/tasks/{task}/draft")
    def draft(caller: Annotator, task: Task, body: DraftBody) -> Response:
        given = (body.lease, body.answer, body.seconds)
        with database.write() as connection:
            who = caller.person.id
            return JSON(annotate.save_draft(connection, who, task, *given, project))

    @app.post("/api/tasks/{task}/answer")
    def answer(caller: Annotator, task: Task, body: SubmitBody) -> Response:
        given = (body.lease, body.key, body.answer, body.seconds)
        with database.write() as connection:
            receipt = annotate.submit(connection, caller.person.id, task, *given, project)
        if receipt is None:  # raised here: in the block it would undo the record of what was sent
            raise annotate.answered_already()
        return JSON(receipt)

    @app.post("/api/tasks/{task}/skip")
    def skip(caller: Annotator, task: Task, body: SkipBody) -> Response:
        given = (body.lease, body.key, body.reason, body.seconds)
        with database.write() as connection:
            return JSON(annotate.skip(connection, caller.person.id, task, *given))

    @app.post("/api/tasks/{task}/reopen")
    def reopen(caller: Annotator, task: Task, body: KeyBody) -> Response:
        with database.write() as connection:
            who = caller.person.id
            return JSON(annotate.reopen(connection, who, task, body.key, project))

    @app.get("/api/mine")
    def mine(
        caller: Annotator,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[int | None, Query(ge=0, lt=1 << 62)] = None,
    ) -> Response:
        with database.read() as connection:
            return JSON(annotate.history(connection, caller.person.id, limit, before))


def _add_review(app: FastAPI, site: Site) -> None:
    Reviewer: Any = _need(site, "reviewer")
    database = site.database

    @app.get("/api/tasks")
    def tasks(
        caller: Reviewer,
        order: review.Order = "number",
        offset: Annotated[int, Query(ge=0, lt=1 << 60)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        text: Annotated[str | None, Query(max_length=200, pattern=Plain)] = None,
    ) -> Response:
        with database.read() as connection:
            return JSON(review.list_tasks(connection, order, offset, limit, text))

    @app.get("/api/tasks/{task}")
    def look(caller: Reviewer, task: Task) -> Response:
        with database.write() as connection:
            return JSON(review.look(connection, caller.person, task))

    @app.post("/api/tasks/{task}/answers/{answer}/verdict")
    def verdict(caller: Reviewer, task: Task, answer: Id, body: VerdictBody) -> Response:
        given = (body.accepted, body.comment, body.key)
        with database.write() as connection:
            return JSON(review.judge_answer(connection, caller.person, task, answer, *given))

    @app.get("/api/quality")
    def quality(caller: Reviewer) -> Response:
        return JSON(site.quality.get())


def _add_owner(app: FastAPI, site: Site) -> None:
    Owner: Any = _need(site, "owner")
    database, project = site.database, site.project

    @app.get("/api/export/{name}")
    def export(caller: Owner, name: Id) -> Response:
        if name not in EXPORTS:
            raise ApiError(404, f"Exports are {', '.join(EXPORTS)}.", code="not_found")
        with database.write() as connection:
            record(connection, LogEvent("exported", caller.person.id, new={"name": name}))
        headers = {"Content-Disposition": f'attachment; filename="{name}.jsonl"'}
        chunks = export_bytes(database, project, name)
        return StreamingResponse(chunks, 200, headers, "application/x-ndjson")

    @app.get("/api/invitations")
    def invited(caller: Owner) -> Response:
        return JSON({"invitations": site.open_invitations()})

    @app.post("/api/invitations")
    def invite(caller: Owner, request: Request, body: InvitationBody) -> Response:
        with database.write() as connection:
            made = accounts.invite(connection, body.role, body.days, caller.person.id)
        return JSON(site.as_link(request, made))

    @app.delete("/api/invitations/{invitation}")
    def revoke(caller: Owner, invitation: Id) -> Response:
        with database.write() as connection:
            accounts.revoke(connection, invitation, caller.person.id)
        return JSON({})

    @app.get("/api/people")
    def everyone(caller: Owner) -> Response:
        with database.read() as connection:
            rows = connection.execute(select(people).order_by(people.c.since)).all()
        return JSON({"people": [_person(row) for row in rows]})

    @app.post("/api/people/{person}")
    def change(caller: Owner, person: Id, body: PersonBody) -> Response:
        given = (caller.person.id, person, body.role, body.active)
        with database.write() as connection:
            return JSON(_person(accounts.change_person(connection, *given)))

    @app.post("/api/people/{person}/reset")
    def reset(caller: Owner, request: Request, person: Id, body: dict[str, None]) -> Response:
        with database.write() as connection:
            row = accounts.find_person(connection, person)
            if row.kind != "human":
                raise ApiError(400, "Only people's accounts have passwords.", code="not_allowed")
            made = accounts.invite(connection, row.role, 7, caller.person.id, person)
        return JSON(site.as_link(request, made))

    @app.post("/api/tasks/{task}/settings")
    def settings(caller: Owner, task: Task, body: TaskBody) -> Response:
        given = body.model_dump(include=body.model_fields_set)
        if given.get("priority", 0) is None:
            raise ApiError(400, "priority is a number from 0 to 9.", "priority")
        with database.write() as connection:
            return JSON(review.set_task(connection, caller.person.id, task, given))

    @app.get("/api/events")
    def events(
        caller: Owner,
        after: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    ) -> Response:
        with database.read() as connection:
            found = list(read_events(connection, after, limit))
        last = found[-1].seq if found else after
        return JSON({"events": [vars(event) for event in found], "last": last})

    # The body is a file, so this route is none of `JSONRoute`.
    async def read_file(request: Request) -> bytes:
        return await request.body()

    @app.post("/api/import")
    def add(
        caller: Owner,
        raw: Annotated[bytes, Depends(read_file)],
        name: Annotated[str, Query(max_length=300, pattern=Plain)],
    ) -> Response:
        return JSON(_import(site, caller.person, name, raw))


def _import(site: Site, person: Row, name: str, raw: bytes) -> dict[str, Any]:
    """Import an upload. Its name gives the form and is shown; it is never a path."""
    base = PurePosixPath(name.replace("\\", "/")).name
    suffix = next((s for s in sorted(DATA_SUFFIXES, key=len, reverse=True) if base.endswith(s)), "")
    if not suffix:
        message = f"Files to import end with {', '.join(DATA_SUFFIXES)}."
        raise ApiError(400, message, "name", "unknown_form")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"upload{suffix}")
        path.write_bytes(raw)
        return asdict(import_file(site.database, site.project, path, base, person.id))


def _person(row: Row) -> dict[str, Any]:
    values = row._asdict()
    return {name: values[name] for name in ("id", "name", "role", "kind", "active", "since")}
