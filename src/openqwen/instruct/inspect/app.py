"""The data page's routes, and `openqwen inspect`: index a source, listen, answer requests."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query
from fastapi.responses import Response

from openqwen.http import errors
from openqwen.http.errors import ApiError
from openqwen.http.json_body import JSON, JSONRoute
from openqwen.http.server import become_user, client_keys, listen, open_url, serve_app
from openqwen.http.static import SHARED, PageFiles
from openqwen.instruct.inspect.describe import shown
from openqwen.instruct.inspect.index import Entry, open_index
from openqwen.instruct.inspect.query import Filters, around, listed, statistics
from openqwen.instruct.inspect.settings import InspectConfig
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import parse_json
from openqwen.support.progress import console

Json = dict[str, Any]
FilterQuery = Annotated[Filters, Query()]
Number = Annotated[int, Path(ge=1, lt=1 << 62)]


class DataPage:
    """The source that is shown, and its index."""

    def __init__(self, source: str, config: InspectConfig):
        self.source, self.config = source, config
        self._reading = threading.Lock()
        self.index = open_index(source, config)

    def about(self) -> Json:
        """The source, its number of records, and whether its files have changed since."""
        index = self.index
        return {
            "source": self.source,
            "files": [str(path) for path, _, _ in index.files[:100]],
            "records": index.count,
            "changed": index.changed(),
        }

    def read_again(self) -> Json:
        """Index the source as it is now."""
        if not self._reading.acquire(blocking=False):
            raise ApiError(409, "The source is being read already.", code="busy")
        try:
            self.index = open_index(self.source, self.config)
        finally:
            self._reading.release()
        return self.about()

    def ask(self, query: Callable[[sqlite3.Connection, Filters], Json], filters: Filters) -> Json:
        """The answer of a query, within the time limit."""
        with closing(self.index.connect(self.config.query_seconds)) as connection:
            try:
                return query(connection, filters)
            except sqlite3.OperationalError as error:
                if "interrupted" not in str(error):
                    raise
                message = f"This took more than {self.config.query_seconds:g} seconds."
                raise ApiError(503, f"{message} Ask for less.", code="too_slow") from None

    def entry(self, number: int) -> Entry:
        """Where a record lies. ApiError 404 where there is none."""
        entry = self.index.entry(number)
        if entry is None:
            raise ApiError(404, f"There is no record {number}, only 1 to {self.index.count}.")
        return entry

    def bytes(self, entry: Entry) -> bytes:
        """A record's bytes. ApiError 409 where the file is no longer what was indexed."""
        try:
            return self.index.read(entry)
        except OpenQwenError as error:
            raise ApiError(409, error.what, code="file_changed") from None

    def record(self, number: int, filters: Filters) -> Json:
        """One record as it is shown, and those before and after it under the filters."""
        entry = self.entry(number)
        raw = self.bytes(entry)
        found = {"number": number, "file": str(entry.original), "line": entry.line}
        found |= {"bytes": entry.size, "fault": entry.fault}
        if entry.fault:
            found["raw"] = raw[:100_000].decode("utf-8", "replace")
        else:
            found |= shown(parse_json(raw))
        return found | self.ask(lambda c, f: around(c, f, number), filters)


def application(page: DataPage) -> FastAPI:
    """The application without its `Gate`. Routes are plain functions: each runs in a thread."""
    app = FastAPI(title="OpenQwen data page", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = JSONRoute

    @app.get("/api/source")
    def source() -> Response:
        return JSON(page.about())

    @app.get("/api/records")
    def records(filters: FilterQuery) -> Response:
        return JSON(page.ask(listed, filters))

    @app.get("/api/statistics")
    def numbers(filters: FilterQuery) -> Response:
        return JSON(page.ask(statistics, filters))

    @app.get("/api/records/{number}")
    def record(number: Number, filters: FilterQuery) -> Response:
        return JSON(page.record(number, filters))

    @app.get("/api/records/{number}/raw")
    def raw(number: Number) -> Response:
        headers = {"Content-Disposition": f'attachment; filename="record-{number}.json"'}
        body = page.bytes(page.entry(number))
        return Response(body, media_type="application/octet-stream", headers=headers)

    @app.post("/api/read-again")  # a body of JSON: pages of other origins cannot send one
    def read_again(body: dict[str, None]) -> Response:
        return JSON(page.read_again())

    page_files().install(app)
    errors.install(app, Filters.model_fields)
    return app


def page_files() -> PageFiles:
    """The files of the data page."""
    return PageFiles(SHARED, files("openqwen.instruct.inspect") / "page")


def inspect(source: str, config: InspectConfig) -> None:
    """Show a source on a page until SIGTERM or SIGINT."""
    listener = listen(config.host, config.port)
    keys = client_keys(config)
    become_user(config.user, config.cache)
    page = DataPage(source, config)
    console.print(f"{source}: {page.index.count:,} records; {open_url(listener)}")
    serve_app(application(page), config, listener, keys, page_files().paths)
