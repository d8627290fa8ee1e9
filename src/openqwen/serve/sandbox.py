"""`openqwen sandbox --serve`: a pool of sandboxes behind SandboxFusion's HTTP interface.

POST /run_code takes and gives what bytedance/SandboxFusion documents, so that its clients can use
this server. `language` is one of ours, or "nodejs". `run_timeout` limits CPU time and the clock.
`compile_timeout` and `args` are not used. `fetch_files` is refused: print what you need.

Beyond that, clients of ours send `limits` (all fields of `Limits`), and `tests` with `entry`, which
run in another process than the program; the response's `verdict` holds the fields of `Verdict` that
the others do not have.
"""

import asyncio
import base64
import binascii
import math
import time
from contextlib import suppress
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from openqwen.http import errors
from openqwen.http.errors import ApiError
from openqwen.http.json_body import JSON, JSONRoute
from openqwen.http.limits import ConcurrencyLimit, while_connected
from openqwen.http.server import become_user, client_keys, listen, open_url, serve_app
from openqwen.sandbox import Limits, Pool, Program, Verdict
from openqwen.sandbox.languages import TABLE, available
from openqwen.sandbox.limits import NOT_COMPILED
from openqwen.serve.settings import SandboxConfig
from openqwen.support.progress import console

Json = dict[str, Any]
_OURS = {"nodejs": "javascript"}  # SandboxFusion's name -> ours


class RunCodeBody(BaseModel):
    """SandboxFusion's RunCodeRequest, and our own fields after it."""

    code: str
    language: str
    run_timeout: float = 10.0
    compile_timeout: float = 10.0
    memory_limit_MB: int = -1
    stdin: str | None = None
    files: dict[str, str | None] = Field({}, max_length=1000)
    fetch_files: list[str] = []
    args: list[str] = []
    limits: dict[str, float | None] | None = None
    tests: str | None = None
    entry: str | None = None

    def program(self, most: Limits) -> Program:
        """The program to run. ApiError 400 where it cannot be run within `most`."""
        if self.fetch_files:
            raise ApiError(400, "Files cannot be fetched here; print what you need.", "fetch_files")
        language = _OURS.get(self.language, self.language)
        if language not in available():
            known = ", ".join(available())
            message = f"There is no language '{self.language}' here, only {known}."
            raise ApiError(400, message, "language")
        contents = {
            name: _decoded(name, text) for name, text in self.files.items() if text is not None
        }
        limits = self._limits(most)
        stdin = self.stdin or ""
        return Program(self.code, stdin, contents, language, self.tests, self.entry, limits)

    def _limits(self, most: Limits) -> Limits:
        given = self.limits
        if given is None:
            memory = self.memory_limit_MB if self.memory_limit_MB > 0 else most.memory_mb
            seconds = self.run_timeout
            given = {"seconds": seconds, "wall_seconds": seconds, "memory_mb": memory}
        values: dict[str, Any] = {}
        for field in fields(Limits):
            value, largest = given.get(field.name), getattr(most, field.name)
            if value is None:
                continue
            if not 0 < value <= largest:
                message = f"{field.name} must be above 0 and at most {largest}, not {value}."
                raise ApiError(400, message, "limits" if self.limits else None)
            values[field.name] = math.ceil(value) if isinstance(field.default, int) else value
        return Limits(**values)


def _decoded(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ApiError(400, f"The content of '{name}' is not base64.", "files") from None


def run_response(verdict: Verdict, language: str) -> Json:
    """A verdict as SandboxFusion's RunCodeResponse, with our `verdict` beside it."""
    run: Json | None = {
        "status": "Finished",
        "execution_time": verdict.wall_seconds,
        "return_code": -9 if verdict.exit_status is None else verdict.exit_status,
        "stdout": verdict.stdout,
        "stderr": verdict.stderr,
    }
    compiled = None
    if verdict.reason == NOT_COMPILED:
        run, compiled = None, run
    elif language in TABLE and len(TABLE[language].commands) > 1:
        compiled = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": ""}
    if run and verdict.status == "timeout":
        run |= {"status": "TimeLimitExceeded", "return_code": None}
    infra = verdict.status == "infra"
    if infra:
        run = {"status": "Error", "stderr": verdict.reason}
    failed = "SandboxError" if infra else "Failed"
    return {
        "status": "Success" if verdict.passed else failed,
        "message": verdict.reason if infra else "",
        "compile_result": compiled,
        "run_result": run,
        "executor_pod_name": None,
        "files": {},
        "verdict": {
            "status": verdict.status,
            "reason": verdict.reason,
            "seconds": verdict.seconds,
            "exit_status": verdict.exit_status,
        },
    }


def sandbox_application(pool: Pool, config: SandboxConfig) -> FastAPI:
    """The application without its `Gate`."""
    app = FastAPI(title="OpenQwen sandbox", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = JSONRoute
    places = ConcurrencyLimit(config.queue)
    most = Limits(config.max_seconds, 4 * config.max_seconds, config.max_memory_mb, 256, 1 << 14,
                  1 << 10, 1 << 16)  # fmt: skip

    @app.post("/run_code")
    async def run_code(body: RunCodeBody, http: Request) -> Response:
        program = body.program(most)
        places.take(1)
        loop, began = asyncio.get_running_loop(), time.monotonic()
        future = pool.submit(program)

        def ended(_: Any) -> None:  # only then, even where the client has left before
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(places.release, 1, time.monotonic() - began)

        future.add_done_callback(ended)

        async def verdict() -> Verdict:
            return await asyncio.wrap_future(future)

        found = await while_connected(http.receive, verdict())
        if found is None:
            return Response(status_code=499)
        return JSON(run_response(found, program.language))

    @app.get("/v1/ping")
    async def ping() -> Response:
        return JSON("pong")

    @app.get("/health")
    async def health() -> Response:
        return JSON({"status": "ok", "tier": pool.tier, "languages": available()})

    errors.install(app, RunCodeBody.model_fields)
    return app


def serve_sandbox(config: SandboxConfig) -> None:
    """Serve a pool of sandboxes until SIGTERM or SIGINT."""
    listener = listen(config.host, config.port)
    keys = client_keys(config)
    become_user(config.user, None)
    with Pool(config.workers, tier=config.tier, packages=config.packages) as pool:
        console.print(f"sandbox; tier {pool.tier}; {', '.join(available())}; {open_url(listener)}")
        app = sandbox_application(pool, config)
        serve_app(app, config, listener, keys, frozenset({"/health", "/v1/ping"}))
