"""Static files of a page, read once at start, with the headers that a browser needs."""

import hashlib
from collections.abc import Callable, Coroutine
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

# Nothing is loaded from other origins, no text becomes code, and no other page may frame this one.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "json": "application/json",
}


# What pages share: colours, buttons, Markdown.
SHARED = files("openqwen.http") / "page"


class PageFiles:
    """The files of folders: html, js, css, svg and json. `index.html` is served as `/`.

    A browser keeps them, and asks each time whether they have changed (ETag).
    """

    def __init__(self, *folders: Traversable):
        self._files: dict[str, tuple[bytes, str]] = {}
        entries = chain.from_iterable(folder.iterdir() for folder in folders if folder.is_dir())
        for entry in entries:
            kind = _TYPES.get(entry.name.rpartition(".")[2])
            if kind:
                path = "/" + entry.name.replace("index.html", "")
                self._files[path] = (entry.read_bytes(), kind)
        self.paths = frozenset(self._files)

    def install(self, app: FastAPI) -> None:
        """Add a route for each file."""
        for path, (body, kind) in self._files.items():
            answer = _answer(body, kind)
            app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


def _answer(body: bytes, kind: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"Content-Security-Policy": _POLICY, "ETag": tag, "Cache-Control": "no-cache"}

    async def send(request: Request) -> Response:
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    return send
