"""The routes: OpenAI's, a few of vLLM's and llama.cpp's, and the chat page."""

import asyncio
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from openqwen.serve import errors
from openqwen.serve import protocol as p
from openqwen.serve.answers import Writing
from openqwen.serve.api import Api
from openqwen.serve.batches import Batches, read_upload
from openqwen.serve.errors import ApiError
from openqwen.serve.gate import EventStream, until_gone
from openqwen.serve.json_text import dump_json, parse_json
from openqwen.serve.metrics import CONTENT_TYPE
from openqwen.serve.responses import Responding, Responses, ResponsesRequest

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src "
    "'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}
_TEXT, _MAYBE = {"type": "string"}, {"type": ["string", "null"]}
_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _MAYBE, "code": _MAYBE}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": list(_FIELDS), "properties": _FIELDS}},
}
_FAILURES: dict[int | str, p.Json] = {
    code: {"description": "What was wrong.", "content": {"application/json": {"schema": _ERROR}}}
    for code in (400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 503)
}
_STREAM: dict[int | str, p.Json] = {
    200: {"content": {"text/event-stream": {}, "application/json": {}}}
}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": _TEXT, "purpose": _TEXT},
}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}}


class JSON(JSONResponse):
    """A JSON answer."""

    def render(self, content: Any) -> bytes:
        """Bytes."""
        return dump_json(content)


class _Parsed(Request):
    """A request whose body has been read as JSON."""

    value: Any = None

    async def json(self) -> Any:
        """The body's value."""
        return self.value


class _Route(APIRoute):
    """Reads a body as JSON by our own rules before FastAPI looks at it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handler = super().get_route_handler()

        async def handle(http: Request) -> Response:
            if self.body_field is None:
                return await handler(http)
            _check_type(http)
            parsed = _Parsed(http.scope, http.receive)
            parsed.value = parse_json(await parsed.body(), "The body")
            return await handler(parsed)

        return handle


def _check_type(http: Request) -> None:
    """Bodies without a type are JSON, but not from a browser: any page may send those unasked."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    good = kind == "application/json" or kind.endswith("+json")
    if not good and (kind or "origin" in http.headers):
        told = f"The Content-Type of this body is {kind or 'missing'}; send application/json."
        raise ApiError(400, told, "Content-Type")


async def answer(
    http: Request, start: Coroutine[Any, Any, Writing | Responding], api: Api
) -> Response:
    """Make answers whole or as a stream, and stop making them when the client leaves."""
    writing = await until_gone(http.receive, start)
    if writing is None:
        return Response(status_code=499)
    if writing.request.stream:
        return EventStream(writing.frames(), writing.answers.close, 2 * api.config.timeout)
    try:
        return JSON(await until_gone(http.receive, writing.whole()))
    finally:
        writing.answers.close()


def application(api: Api, batches: Batches, lifespan: Any) -> FastAPI:
    """The whole application but for the gate."""
    app = FastAPI(
        title="OpenQwen",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    app.router.route_class = _Route
    responses = Responses(api)

    def route(method: str, path: str, function: Any, **options: Any) -> None:
        options = {
            "responses": _FAILURES | options.pop("more", {}),
            "response_class": JSON,
            **options,
        }
        app.add_api_route(path, function, methods=[method], **options)
        if path.startswith("/v1/"):  # llama.cpp serves these without the prefix too
            app.add_api_route(path[3:], function, methods=[method], include_in_schema=False)

    def with_body(path: str, kind: Any, make: Any, writes: bool = False) -> None:
        """make: from the body to a coroutine of JSON, or of answers that it writes."""

        async def endpoint(body: kind, http: Request) -> Response:
            return (
                await answer(http, make(body), api)
                if writes
                else JSON(await until_gone(http.receive, make(body)))
            )

        route("POST", path, endpoint, more=_STREAM if writes else {}, name=path)

    def with_name(method: str, path: str, make: Any) -> None:
        async def endpoint(name: str) -> Response:
            return JSON(make(name))

        route(method, path, endpoint, name=method + path)

    def bare(method: str, path: str, make: Any) -> None:
        async def endpoint() -> Response:
            made = make()
            return JSON(await made if asyncio.iscoroutine(made) else made)

        route(method, path, endpoint, name=method + path)

    async def upload(http: Request) -> Response:
        form = await asyncio.to_thread(
            read_upload, await http.body(), http.headers.get("content-type", "")
        )
        return JSON(batches.add_file(*form))

    async def content(name: str) -> Response:
        return Response(batches.content(name), media_type="application/octet-stream")

    async def metrics() -> Response:
        return Response(api.bridge.metrics.text(), media_type=CONTENT_TYPE)

    async def health() -> Response:
        faults = [fault for fault in (api.bridge.fault, batches.fault) if fault]
        state = "failed" if faults else "paused" if api.bridge.paused else "ok"
        told: p.Json = {"status": state, "version": api.bridge.engine.version}
        return JSON(told | {"reason": " ".join(faults)}, 503) if faults else JSON(told)

    async def input_items(
        name: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        return JSON(responses.input_items(name, after, limit, order))

    def listed(entries: Any) -> p.Json:
        return {"object": "list", "data": list(entries), "has_more": False}

    with_body("/v1/chat/completions", p.ChatRequest, api.chat, writes=True)
    with_body("/v1/completions", p.CompletionRequest, api.complete, writes=True)
    with_body("/v1/responses", ResponsesRequest, responses.begin, writes=True)
    with_body("/v1/embeddings", p.EmbeddingRequest, api.embed)
    with_body("/score", p.ScoreRequest, api.score)
    with_body("/tokenize", p.TokenizeRequest, api.tokenize)
    with_body("/detokenize", p.DetokenizeRequest, api.detokenize)
    with_body("/apply-template", p.TemplateRequest, api.template)
    with_body("/v1/batches", p.BatchRequest, batches.add_batch)
    with_body("/update_weights", p.WeightsRequest, api.update_weights)
    bare("GET", "/v1/models", lambda: listed(map(api.model, [*api.names, *api.adapters])))
    bare("GET", "/v1/files", lambda: listed(batches.files.values()))
    bare("GET", "/v1/batches", lambda: listed(batches.batches.values()))
    bare("GET", "/tokenizer_info", api.tokenizer.info)
    bare("POST", "/pause", lambda: api.bridge.pause(True))
    bare("POST", "/resume", lambda: api.bridge.pause(False))
    with_name(
        "GET", "/v1/models/{name:path}", lambda name: api.model(api.named(name, api.adapters))
    )
    with_name("GET", "/v1/responses/{name}", responses.get)
    with_name("DELETE", "/v1/responses/{name}", responses.delete)
    with_name("GET", "/v1/files/{name}", batches.file)
    with_name("DELETE", "/v1/files/{name}", batches.delete)
    with_name("GET", "/v1/batches/{name}", batches.batch)
    with_name("POST", "/v1/batches/{name}/cancel", batches.cancel)
    route("GET", "/v1/responses/{name}/input_items", input_items)
    route("POST", "/v1/files", upload, openapi_extra=_FORM)
    route(
        "GET",
        "/v1/files/{name}/content",
        content,
        more={200: {"content": {"application/octet-stream": {}}}},
    )
    route("GET", "/metrics", metrics, more={200: {"content": {"text/plain": {}}}})
    route("GET", "/health", health)
    for path, (body, kind) in page().items():
        app.add_api_route(path, _file(body, kind), methods=["GET"], include_in_schema=False)
    errors.install(app)
    for operation in (
        o for operations in app.openapi()["paths"].values() for o in operations.values()
    ):
        operation["responses"].pop("422", None)  # ours are 400
    return app


def page() -> dict[str, tuple[bytes, str]]:
    """The chat page: (content, type) of each file by its path, all read now and never again."""
    folder = files("openqwen.serve") / "page"
    found = list(folder.iterdir()) if folder.is_dir() else []
    kinds = {entry: _TYPES.get(entry.name.rpartition(".")[2]) for entry in found}
    return {
        "/" + e.name.replace("index.html", ""): (e.read_bytes(), kind)
        for e, kind in kinds.items()
        if kind
    }


def _file(body: bytes, kind: str) -> Any:
    async def send() -> Response:
        return Response(body, media_type=kind, headers={"Content-Security-Policy": _POLICY})

    return send
