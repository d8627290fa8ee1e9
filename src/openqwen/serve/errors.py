"""Errors in OpenAI's shape, and the names of what is made."""

import uuid
from collections.abc import Sequence
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
_UNDERSCORED = ("resp", "msg", "fc")
TYPES = {  # others: invalid_request_error, server_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


def identity(kind: str) -> str:
    """A name that nobody can guess."""
    return f"{kind}{'_' if kind in _UNDERSCORED else '-'}{uuid.uuid4().hex}"


class ApiError(Exception):
    """What a client is told instead of an answer. param: the field at fault. code: for programs."""

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
        """The JSON that says so."""
        kind = TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> Response:
        """The whole answer."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.code == "timeout":
            headers["x-should-retry"] = "false"  # OpenAI's clients would ask twice more
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(orjson.dumps(self.body()), self.status, headers, "application/json")


def told(error: Exception) -> ApiError:
    """An error that is the client's, as it is told; any other is ours, and its text stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OpenQwenError):  # what the engine or the tokenizer would not take
        where = str(error.where)
        param = where if where.partition("[")[0] in ("messages", "prompt", "tools") else None
        return ApiError(400, error.what + (f" To mend it: {error.do}." if error.do else ""), param)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), error.body)
    return ApiError(500, "The server has a fault; its log tells which.")


def checked(kind: type[Model], body: Any) -> Model:
    """A request of this kind; ApiError names the field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error.errors(), body) from None


def _invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """What is wrong at the one place that is deepest in the body.

    A field that takes several types gives the errors of them all.
    The type that was meant fails deepest.
    """
    places = [_place(error, body) for error in errors]
    order = [(len(place), error["type"] != "missing") for place, error in zip(places, errors)]
    place = places[order.index(max(order))]
    told = dict.fromkeys(_message(error) for other, error in zip(places, errors) if other == place)
    first, *others = told
    said = " or ".join([first, *(text.removeprefix("Input should be ") for text in others)])
    steps = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    param = "".join(steps).removeprefix(".") or None
    return ApiError(400, f"{param}: {said}" if param else said, param)


def _place(error: Any, body: Any) -> list[str | int]:
    """The client's own keys on the path of an error; names of types stand there too."""
    loc = list(error["loc"])
    if loc[:1] in (["query"], ["path"]):
        return loc[1:]
    place: list[str | int] = []
    for part in loc:
        known = (
            body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()
        )
        if part in known:
            body = body[part]
            place.append(part)
    return [*place, loc[-1]] if error["type"] == "missing" and loc not in ([], ["body"]) else place


def _message(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        return (
            f"{context['discriminator']} cannot be '{context['tag']}', only "
            f"{context['expected_tags']}"
        )
    if kind == "union_tag_not_found":
        return f"{context['discriminator']} is missing"
    said = error["msg"].replace(
        "a valid dictionary or object to extract fields from", "a JSON object"
    )
    return said.replace("a valid dictionary", "a JSON object")


def install(app: FastAPI) -> None:
    """Every way in which a request can fail answers in the one shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return told(error).response()
        response = ApiError(error.status_code, str(error.detail)).response()
        if (
            error.status_code == 405
        ):  # the router names the methods of one of the path's routes alone
            here = [
                r
                for r in app.routes
                if isinstance(r, Route) and r.path_regex.match(request.url.path)
            ]
            methods = {method for r in here for method in r.methods or ()}
            methods |= {"HEAD"} if "GET" in methods else set()
            response.headers["Allow"] = ", ".join(sorted(methods))
        return response

    for kind in (ApiError, OpenQwenError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
