"""Errors in OpenAI's shape."""

from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from openqwen.support.errors import OpenQwenError

TYPES = {  # others: invalid_request_error, server_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer. param: the field at fault. code: for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
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
    if isinstance(error, RequestValidationError | ValidationError):
        first = error.errors()[0]
        # The union of a field's types lends its names to the path; only the client's own keys are of use to it.
        path = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
        param = ".".join(path[1:] if path[:1] == ["body"] else path) or None
        return ApiError(400, f"{param}: {first['msg']}" if param else first["msg"], param)
    return ApiError(500, "The server has a fault; its log tells which.")


def install(app: FastAPI) -> None:
    """Every way in which a request can fail answers in the one shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return told(error).response()
        response = ApiError(error.status_code, str(error.detail)).response()
        if error.status_code == 405:  # the router names the methods of one of the path's routes alone
            here = [r for r in app.routes if isinstance(r, Route) and r.path_regex.match(request.url.path)]
            response.headers["Allow"] = ", ".join(sorted({method for r in here for method in r.methods or ()}))
        return response

    for kind in (ApiError, OpenQwenError, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
