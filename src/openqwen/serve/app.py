"""The routes: OpenAI's, a few of vLLM's and llama.cpp's, and the chat page."""

import asyncio
import functools
from collections.abc import Coroutine
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile

from openqwen.http import errors
from openqwen.http.errors import ApiError
from openqwen.http.json_body import JSON, JSONRoute
from openqwen.http.limits import EventStream, while_connected
from openqwen.http.static import SHARED, PageFiles
from openqwen.serve import protocol as p
from openqwen.serve.answers import TextResponse
from openqwen.serve.api import FIELDS, Api
from openqwen.serve.batches import Batches
from openqwen.serve.metrics import CONTENT_TYPE
from openqwen.serve.responses import ResponseObject, Responses, ResponsesRequest

_STREAM: dict[int | str, p.Json] = {
    200: {"content": {"text/event-stream": {}, "application/json": {}}}
}
_BYTES: dict[int | str, p.Json] = {200: {"content": {"application/octet-stream": {}}}}
_PLAIN: dict[int | str, p.Json] = {200: {"content": {"text/plain": {}}}}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string"}, "purpose": {"type": "string"}},
}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}}


@functools.cache
def page() -> PageFiles:
    """The files of the chat page."""
    return PageFiles(SHARED, files("openqwen.serve") / "page")


def application(api: Api, batches: Batches, lifespan: Any) -> FastAPI:
    """The application without its `Gate`."""
    app = FastAPI(
        title="OpenQwen",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    app.router.route_class = JSONRoute
    _add_routes(_Router(app, api), api, batches)
    page().install(app)
    errors.install(app, FIELDS)
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here such errors are 400
    return app


class _Router:
    """Adds routes to an application, each kind of endpoint by a method of its own."""

    def __init__(self, app: FastAPI, api: Api):
        self._app, self._api = app, api

    def add(self, method: str, path: str, endpoint: Any, more: Any = None, **options: Any) -> None:
        """Add a route. more: further responses for the OpenAPI document."""
        options |= {"responses": errors.FAILURES | (more or {}), "response_class": JSON}
        self._app.add_api_route(path, endpoint, methods=[method], **options)
        if path.startswith("/v1/"):  # llama.cpp serves these without the prefix too
            bare = path.removeprefix("/v1")
            self._app.add_api_route(bare, endpoint, methods=[method], include_in_schema=False)

    def text(self, path: str, kind: Any, start: Any) -> None:
        """A route that generates text. start: from the body to a coroutine that gives answers."""

        async def endpoint(body: kind, http: Request) -> Response:
            return await _answer(http, start(body), self._api)

        self.add("POST", path, endpoint, _STREAM, name=path)

    def body(self, path: str, kind: Any, make: Any) -> None:
        """A route with a JSON body. make: from the body to a coroutine that gives JSON."""

        async def endpoint(body: kind, http: Request) -> Response:
            return JSON(await while_connected(http.receive, make(body)))

        self.add("POST", path, endpoint, name=path)

    def name(self, method: str, path: str, make: Any) -> None:
        """A route whose path holds a name. make: from the name to JSON."""

        async def endpoint(name: str) -> Response:
            return JSON(make(name))

        self.add(method, path, endpoint, name=method + path)

    def bare(self, method: str, path: str, make: Any) -> None:
        """A route without input. make: gives JSON, or a coroutine of it."""

        async def endpoint() -> Response:
            value = make()
            return JSON(await value if asyncio.iscoroutine(value) else value)

        self.add(method, path, endpoint, name=method + path)


async def _answer(
    http: Request, start: Coroutine[Any, Any, TextResponse | ResponseObject], api: Api
) -> Response:
    """Send answers whole or as a stream; they are cancelled when the client disconnects."""
    response = await while_connected(http.receive, start)
    if response is None:
        return Response(status_code=499)
    if response.request.stream:
        return EventStream(response.stream(), response.answers.close, 2 * api.config.timeout)
    try:
        return JSON(await while_connected(http.receive, response.result()))
    finally:
        response.answers.close()


def _add_routes(to: _Router, api: Api, batches: Batches) -> None:
    responses = Responses(api)

    async def upload(http: Request) -> Response:
        async with http.form() as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile) or not isinstance(purpose, str):
                param = "purpose" if isinstance(file, UploadFile) else "file"
                message = "Send a multipart form with a file named `file`, and the text `purpose`."
                raise ApiError(400, message, param)
            content = await file.read()
        return JSON(batches.add_file(file.filename or "file", purpose, content))

    async def content(name: str) -> Response:
        return Response(batches.content(name), media_type="application/octet-stream")

    async def metrics() -> Response:
        return Response(api.bridge.metrics.text(), media_type=CONTENT_TYPE)

    async def health() -> Response:
        faults = [fault for fault in (api.bridge.fault, batches.fault) if fault]
        status = "paused" if api.bridge.paused else "ok"
        state: p.Json = {"status": status, "version": api.bridge.engine.version}
        if not faults:
            return JSON(state)
        return JSON(state | {"status": "failed", "reason": " ".join(faults)}, 503)

    async def input_items(
        name: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        return JSON(responses.input_items(name, after, limit, order))

    def listed(entries: Any) -> p.Json:
        return {"object": "list", "data": list(entries), "has_more": False}

    to.text("/v1/chat/completions", p.ChatRequest, api.chat)
    to.text("/v1/completions", p.CompletionRequest, api.complete)
    to.text("/v1/responses", ResponsesRequest, responses.start)
    to.body("/v1/embeddings", p.EmbeddingRequest, api.embed)
    to.body("/score", p.ScoreRequest, api.score)
    to.body("/tokenize", p.TokenizeRequest, api.tokenize)
    to.body("/detokenize", p.DetokenizeRequest, api.detokenize)
    to.body("/apply-template", p.TemplateRequest, api.template)
    to.body("/v1/batches", p.BatchRequest, batches.add_batch)
    to.body("/update_weights", p.WeightsRequest, api.update_weights)
    to.bare("GET", "/v1/models", lambda: listed(map(api.model, [*api.names, *api.adapters])))
    to.bare("GET", "/v1/files", lambda: listed(batches.files.values()))
    to.bare("GET", "/v1/batches", lambda: listed(batches.batches.values()))
    to.bare("GET", "/tokenizer_info", api.tokenizer.info)
    to.bare("POST", "/pause", lambda: api.bridge.pause(True))
    to.bare("POST", "/resume", lambda: api.bridge.pause(False))
    model = "/v1/models/{name:path}"
    to.name("GET", model, lambda name: api.model(api.named(name, api.adapters)))
    to.name("GET", "/v1/responses/{name}", responses.get)
    to.name("DELETE", "/v1/responses/{name}", responses.delete)
    to.name("GET", "/v1/files/{name}", batches.file)
    to.name("DELETE", "/v1/files/{name}", batches.delete)
    to.name("GET", "/v1/batches/{name}", batches.batch)
    to.name("POST", "/v1/batches/{name}/cancel", batches.cancel)
    to.add("GET", "/v1/responses/{name}/input_items", input_items)
    to.add("POST", "/v1/files", upload, openapi_extra=_FORM)
    to.add("GET", "/v1/files/{name}/content", content, _BYTES)
    to.add("GET", "/metrics", metrics, _PLAIN)
    to.add("GET", "/health", health)
