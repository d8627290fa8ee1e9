"""What the clients' scripts share: checks by name, the words that are sent, how it went.

A script is run as `python try_X.py URL STRICT [WHAT ...]`.
It prints one line of JSON for each check.
URL is a server of the model `local`.
STRICT is another with `--queue 1` and a short `--timeout`: there the clients meet 429 and 408.
"""

import json
import re
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

MODEL, KEY = "local", "none"
HELLO = "Say hello."
TOO_LONG = "word " * 20_000
WEATHER = "What is the weather in Oslo? Use the tool."
CITIES = ["Oslo", "Paris"]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
        },
    },
}
_CHECKS: dict[str, Callable[[str, str], None]] = {}


class Choice(Exception):
    """The model chose otherwise: no fault of the server or of the client."""


def check(what: str) -> Callable[[Callable[[str, str], None]], Callable[[str, str], None]]:
    """Register a function of URL and STRICT that fails by an exception."""

    def register(function: Callable[[str, str], None]) -> Callable[[str, str], None]:
        _CHECKS[what] = function
        return function

    return register


def main() -> None:
    """Run the checks that are named, or all."""
    url, strict, *named = sys.argv[1:]
    for what in named or _CHECKS:
        outcome, why = "passed", ""
        try:
            _CHECKS[what](url, strict)
        except Choice as choice:
            outcome, why = "model", str(choice)
        except Exception as error:
            outcome, why = "failed", f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
        print(json.dumps({"what": what, "outcome": outcome, "why": why}), flush=True)


def refused(call: Callable[[], Any], kind: Any) -> Any:
    """The error that a call ends with, which must be of a kind."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"no error, but {answer!r}")


@contextmanager
def full(strict: str, seconds: float | None = None) -> Iterator[None]:
    """STRICT has no place free, for so many seconds or until the block ends."""
    _post(strict, "/pause")
    threading.Thread(target=_hold, args=[strict], daemon=True).start()
    while _metric(strict, "num_requests_waiting") < 1:
        time.sleep(0.02)
    if seconds is not None:
        threading.Timer(seconds, _post, (strict, "/resume")).start()
    try:
        yield
    finally:
        _post(strict, "/resume")
        while _metric(strict, "num_requests_waiting") + _metric(strict, "num_requests_running"):
            time.sleep(0.02)


@contextmanager
def too_slow(strict: str) -> Iterator[None]:
    """STRICT ends every answer at its time limit.

    A client must not ask anew, for that would be as slow.
    """
    _post(strict, "/pause")
    before = _metric(strict, "request_success_total", "abort")
    try:
        yield
        asked = _metric(strict, "request_success_total", "abort") - before
        assert asked == 1, f"asked {asked:.0f} times"
    finally:
        _post(strict, "/resume")


def _hold(strict: str) -> None:
    body = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 1}
    with suppress(OSError):
        _post(strict, "/v1/chat/completions", body)


def _post(url: str, path: str, body: Any = None) -> None:
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body or {}).encode()
    urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60).read()


def _metric(url: str, name: str, label: str = "") -> float:
    text = urllib.request.urlopen(url + "/metrics", timeout=60).read().decode()
    lines = re.findall(rf"^vllm:{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for labels, value in lines if label in labels)
