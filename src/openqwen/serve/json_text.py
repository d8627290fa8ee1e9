"""JSON from clients and to them: whatever they send gives a value or an error that says why not."""

import json
import re
from typing import Any

import orjson

from openqwen.serve.errors import ApiError
from openqwen.support import files

_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u[dD][89a-fA-F]..|.)", re.DOTALL)


def parse_json(raw: bytes, what: str) -> Any:
    """The value of a client's JSON. ApiError 400 says why `what` has none.

    Half of a surrogate pair (JavaScript cuts texts so) becomes U+FFFD: it can be neither stored
    nor sent back.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at {error.start}"
        raise ApiError(400, f"{what} is not JSON: {where} is not UTF-8.") from None
    try:
        return files.parse_json(_ESCAPE.sub(_whole, text))
    except ValueError as error:
        raise ApiError(400, f"{what} is not JSON: {error}.") from None


def dump_json(value: Any) -> bytes:
    """JSON of a value."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits, and halves of surrogate pairs that a model wrote
        return json.dumps(value).encode()


def _whole(escape: re.Match[str]) -> str:
    return r"\ufffd" if len(escape[0]) == 6 else escape[0]
