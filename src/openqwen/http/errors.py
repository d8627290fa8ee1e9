"""Errors in one form, OpenAI's: `{"error": {"message", "type", "param", "code"}}`."""

import uuid
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from openqwen.support.errors import OpenQwenError

Model = TypeVar("Model", bound=BaseModel)
_UNDERSCORED = ("resp", "msg", "fc")  # kinds whose ids OpenAI writes with an underscore
_TYPES = {  # of all other status codes: invalid_request_error below 500, else server_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_TEXT, _MAYBE_TEXT = {"type": "string"}, {"type": ["string", "null"]}
_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT}
_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": list(_FIELDS), "properties": _FIELDS}},
}
# For the OpenAPI document: the status codes with which any route may fail.
FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"description": "What is wrong.", "content": {"application/json": {"schema": _SCHEMA}}}
    for code in (400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 503)
}


def new_id(kind: str) -> str:
    """A random id that cannot be guessed, such as `chatcmpl-0f3a...`."""
    return f"{kind}{'_' if kind in _UNDERSCORED else '-'}{uuid.uuid4().hex}"


class ApiError(Exception):
    """An error that the client receives.

    Args:
        status: the HTTP status code.
        message: what is wrong and what to do.
        param: the field of the request at fault.
        code: a name that programs compare, such as "queue_full".
        retry: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry = code, retry

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        other = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, other)
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> Response:
        """The error as an HTTP response."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.code == "timeout":
            headers["x-should-retry"] = "false"  # OpenAI's clients would try twice more
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(orjson.dumps(self.body()), self.status, headers, "application/json")


def as_api_error(error: Exception, fields: Collection[str] = ()) -> ApiError:
    """Turn any exception into an `ApiError`.

    An unexpected exception becomes status 500, and its text is not sent: it may hold secrets.
    fields: names of request fields that an `OpenQwenError` may name as its place.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OpenQwenError):
        where = str(error.where)
        param = where if where.partition("[")[0] in fields else None
        return ApiError(400, error.what + (f" What to do: {error.do}." if error.do else ""), param)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), error.body)
    return ApiError(500, "Internal server error; see the server's log.")


def validated(kind: type[Model], body: Any) -> Model:
    """The body as a model of this kind; ApiError 400 names the field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error.errors(), body) from None


def _invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """Report the errors at the deepest place in the body.

    A field that accepts several types gives the errors of all of them. The type that the client
    meant is the one whose check went deepest.
    """
    places = [_place(error, body) for error in errors]
    depths = [(len(place), error["type"] != "missing") for place, error in zip(places, errors)]
    deepest = places[depths.index(max(depths))]
    messages = {_message(e): None for place, e in zip(places, errors) if place == deepest}
    first, *others = messages
    text = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    steps = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in deepest]
    param = "".join(steps).removeprefix(".") or None
    return ApiError(400, f"{param}: {text}" if param else text, param)


def _place(error: Any, body: Any) -> list[str | int]:
    """The path of an error in the client's own keys; pydantic's path also names types."""
    path = list(error["loc"])
    if path[:1] in (["query"], ["path"]):
        return path[1:]
    place: list[str | int] = []
    for part in path:
        known: Any = ()
        if isinstance(body, dict):
            known = body
        elif isinstance(body, list):
            known = range(len(body))
        if part in known:
            body = body[part]
            place.append(part)
    missing = error["type"] == "missing" and path not in ([], ["body"])
    return [*place, path[-1]] if missing else place


def _message(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        known = context["expected_tags"]
        return f"{context['discriminator']} cannot be '{context['tag']}', only {known}"
    if kind == "union_tag_not_found":
        return f"{context['discriminator']} is missing"
    text = error["msg"].replace(" or object to extract fields from", "")
    return text.replace("a valid dictionary", "a JSON object")


def install(app: FastAPI, fields: Collection[str] = ()) -> None:
    """Make all errors of an application answer in the one form; see `as_api_error` for `fields`."""

    async def answer(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return as_api_error(error, fields).response()
        response = ApiError(error.status_code, str(error.detail)).response()
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(_methods(app, request.url.path))
        return response

    for kind in (ApiError, OpenQwenError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _methods(app: FastAPI, path: str) -> list[str]:
    """The methods of all routes of a path; the router's own answer names those of one route."""
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.path_regex.match(path):
            methods |= set(route.methods or ())
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)
