"""JSON from clients and to them: whatever they send gives a value or an error that says why not."""

import json
import re
from typing import Any

import orjson

from openqwen.serve.errors import ApiError

_DEEPEST = 100  # levels; what works on the values calls itself, and Python's stack is finite
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u[dD][89a-fA-F]..|.)", re.DOTALL)


def parse_json(raw: bytes, what: str) -> Any:
    """The value of a client's JSON. ApiError 400 says why `what` has none.

    Half of a surrogate pair (JavaScript cuts texts so) becomes U+FFFD: it can be neither stored
    nor sent back.
    """
    try:
        value = json.loads(_ESCAPE.sub(_whole, raw.decode("utf-8-sig")), parse_constant=_refuse)
    except RecursionError:
        raise _too_deep(what) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"{what} is not JSON: {error}.") from None
    except ValueError:
        raise ApiError(400, f"{what} holds a number that is too long or infinite.") from None
    level, depth = [value], 0
    while level := [inner for one in level for inner in _inner(one) if isinstance(inner, dict | list)]:
        depth += 1
        if depth >= _DEEPEST:
            raise _too_deep(what)
    return value


def dump_json(value: Any) -> bytes:
    """JSON of a value."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits, and halves of surrogate pairs that a model wrote
        return json.dumps(value).encode()


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _whole(escape: re.Match[str]) -> str:
    return r"\ufffd" if len(escape[0]) == 6 else escape[0]


def _refuse(name: str) -> None:
    raise ValueError(name)


def _too_deep(what: str) -> ApiError:
    return ApiError(400, f"{what} is nested deeper than {_DEEPEST} levels.")
