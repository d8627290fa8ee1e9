"""JSON from clients and to them: a value, or an error that says why there is none."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.params import Form
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from openqwen.http.errors import ApiError
from openqwen.support import files

_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u[dD][89a-fA-F]..|.)", re.DOTALL)


def parse_json(raw: bytes, what: str) -> Any:
    """The value of a client's JSON. ApiError 400 says why `what` has none.

    Half of a surrogate pair becomes U+FFFD, since it can be neither stored nor sent back.
    JavaScript writes halves where it cuts a text inside of a character.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at {error.start}"
        raise ApiError(400, f"{what} is not JSON: {where} is not UTF-8.") from None
    try:
        return files.parse_json(_ESCAPE.sub(_without_halves, text))
    except ValueError as error:
        raise ApiError(400, f"{what} is not JSON: {error}.") from None


def _without_halves(escape: re.Match[str]) -> str:
    return r"\ufffd" if len(escape[0]) == 6 else escape[0]


def dump_json(value: Any) -> bytes:
    """The value as JSON."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits, and halves of surrogate pairs that a model wrote
        return json.dumps(value).encode()


class JSON(JSONResponse):
    """A response of JSON."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dump_json(content)


class _ParsedRequest(Request):
    """A request whose body is parsed already."""

    value: Any = None

    async def json(self) -> Any:
        """The body's value."""
        return self.value


class JSONRoute(APIRoute):
    """A route that parses its JSON body by `parse_json` before FastAPI validates it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function that answers a request."""
        handler = super().get_route_handler()
        if self.body_field is None or isinstance(self.body_field.field_info, Form):
            return handler

        async def handle(request: Request) -> Response:
            _check_type(request)
            parsed = _ParsedRequest(request.scope, request.receive)
            parsed.value = parse_json(await parsed.body(), "The body")
            return await handler(parsed)

        return handle


def _check_type(request: Request) -> None:
    """Refuse a body that is not declared as JSON.

    A body without a type is read as JSON, but not from a browser: a page of any origin may send
    such a body without asking first (CORS).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    if not is_json and (kind or "origin" in request.headers):
        message = f"The Content-Type of this body is {kind or 'missing'}; send application/json."
        raise ApiError(400, message, "Content-Type")
