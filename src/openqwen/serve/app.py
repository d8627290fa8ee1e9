"""The routes: OpenAI's, a few of vLLM's and llama.cpp's, and the chat page."""

import asyncio
from collections.abc import Coroutine
from importlib.resources import files
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response

from openqwen.serve import errors
from openqwen.serve.answers import Writing
from openqwen.serve.api import Api
from openqwen.serve.batches import PURPOSES, Batches, read_upload
from openqwen.serve.gate import EventStream, until_gone
from openqwen.serve.metrics import CONTENT_TYPE
from openqwen.serve.protocol import (
    BatchRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Json,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
    WeightsRequest,
)
from openqwen.serve.responses import Responding, ResponsesRequest

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_ERROR = {
    "description": "What was wrong, in OpenAI's shape.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
_FAILURES: dict[int | str, Json] = {code: _ERROR for code in (400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 503)}
_STREAM: dict[int | str, Json] = {200: {"content": {"text/event-stream": {}, "application/json": {}}}}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


class JSON(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Bytes."""
        return orjson.dumps(content)


async def answer(http: Request, start: Coroutine[Any, Any, Writing | Responding], api: Api) -> Response:
    """Make answers whole or as a stream, and stop making them when the client leaves."""
    writing = await until_gone(http.receive, start)
    if writing is None:
        return Response(status_code=499)
    if writing.request.stream:
        return EventStream(writing.frames(), writing.answers.close, 2 * api.config.timeout)
    try:
        whole = await until_gone(http.receive, writing.whole())
    finally:
        writing.answers.close()
    return Response(status_code=499) if whole is None else JSON(whole)


def application(api: Api, batches: Batches, lifespan: Any) -> FastAPI:
    """The whole application but for the gate."""
    app = FastAPI(title="OpenQwen", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)

    def route(method: str, path: str, **options: Any) -> Any:
        """OpenAI's paths are served without their /v1 too, as llama.cpp does."""

        def both(function: Any) -> Any:
            options.setdefault("responses", _FAILURES)
            app.add_api_route(path, function, methods=[method], response_class=JSON, **options)
            if path.startswith("/v1/"):
                app.add_api_route(path[3:], function, methods=[method], include_in_schema=False, response_class=JSON)
            return function

        return both

    @route("POST", "/v1/chat/completions", responses=_FAILURES | _STREAM)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await answer(http, api.chat(body), api)

    @route("POST", "/v1/completions", responses=_FAILURES | _STREAM)
    async def complete(body: CompletionRequest, http: Request) -> Response:
        return await answer(http, api.complete(body), api)

    @route("POST", "/v1/responses", responses=_FAILURES | _STREAM)
    async def respond(body: ResponsesRequest, http: Request) -> Response:
        return await answer(http, Responding.begin(body, api), api)

    @route("POST", "/v1/embeddings")
    async def embed(body: EmbeddingRequest, http: Request) -> Response:
        return JSON(await until_gone(http.receive, api.embed(body)))

    @route("POST", "/score")
    async def score(body: ScoreRequest, http: Request) -> Response:
        return JSON(await until_gone(http.receive, api.score(body)))

    @route("GET", "/v1/models")
    async def models() -> Response:
        return JSON({"object": "list", "data": [api.model(name) for name in api.names]})

    @route("GET", "/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSON(api.model(api.named(name)))

    @route("POST", "/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSON(await api.tokenize(body))

    @route("POST", "/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        text = api.tokenizer.decode(body.tokens, skip_control=False)
        return JSON({"content": text, "prompt": text})

    @route("POST", "/apply-template")
    async def template(body: TemplateRequest) -> Response:
        return JSON({"prompt": await api.template(body.messages, body.tools)})

    @route("POST", "/v1/files", openapi_extra=_FORM)
    async def upload(http: Request) -> Response:
        form = await asyncio.to_thread(read_upload, await http.body(), http.headers.get("content-type", ""))
        return JSON(batches.add_file(*form))

    @route("GET", "/v1/files")
    async def list_files() -> Response:
        return JSON({"object": "list", "data": list(batches.files.values()), "has_more": False})

    @route("GET", "/v1/files/{file_id}")
    async def file(file_id: str) -> Response:
        return JSON(batches.file(file_id))

    @route("GET", "/v1/files/{file_id}/content", responses=_FAILURES | {200: {"content": {"application/octet-stream": {}}}})
    async def content(file_id: str) -> Response:
        return Response(batches.content(file_id), media_type="application/octet-stream")

    @route("DELETE", "/v1/files/{file_id}")
    async def delete(file_id: str) -> Response:
        return JSON(batches.delete(file_id))

    @route("POST", "/v1/batches")
    async def batch(body: BatchRequest) -> Response:
        return JSON(batches.add_batch(body))

    @route("GET", "/v1/batches")
    async def list_batches() -> Response:
        return JSON({"object": "list", "data": list(batches.batches.values()), "has_more": False})

    @route("GET", "/v1/batches/{batch_id}")
    async def one_batch(batch_id: str) -> Response:
        return JSON(batches.batch(batch_id))

    @route("POST", "/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Response:
        return JSON(batches.cancel(batch_id))

    @route("POST", "/pause")
    async def pause() -> Response:
        await api.bridge.pause(True)
        return JSON({"paused": True, "version": api.bridge.engine.version})

    @route("POST", "/resume")
    async def resume() -> Response:
        await api.bridge.pause(False)
        return JSON({"paused": False, "version": api.bridge.engine.version})

    @route("POST", "/update_weights")
    async def update(body: WeightsRequest) -> Response:
        await api.update_weights(body.version)
        return JSON({"version": api.bridge.engine.version})

    @route("GET", "/health")
    async def health() -> Response:
        state = "failed" if api.bridge.dead else "paused" if api.bridge.paused else "ok"
        return JSON({"status": state, "version": api.bridge.engine.version}, 503 if api.bridge.dead else 200)

    @route("GET", "/metrics", responses=_FAILURES | {200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(api.bridge.metrics.text(), media_type=CONTENT_TYPE)

    for path, (body, kind) in page().items():
        app.add_api_route(path, _file(body, kind), methods=["GET"], include_in_schema=False)
    schema = app.openapi()
    for operation in (o for operations in schema["paths"].values() for o in operations.values()):
        operation["responses"].pop("422", None)  # ours are 400
    return app


def page() -> dict[str, tuple[bytes, str]]:
    """The chat page: (content, type) of each file by its path, all read now and never again."""
    folder = files("openqwen.serve") / "page"
    found = {entry.name: entry.read_bytes() for entry in folder.iterdir()} if folder.is_dir() else {}
    kinds = {name: _TYPES[name.rpartition(".")[2]] for name in found if name.rpartition(".")[2] in _TYPES}
    return {"/" + ("" if name == "index.html" else name): (found[name], kind) for name, kind in kinds.items()}


def _file(body: bytes, kind: str) -> Any:
    async def send() -> Response:
        return Response(body, media_type=kind, headers={"Content-Security-Policy": _POLICY})

    return send
