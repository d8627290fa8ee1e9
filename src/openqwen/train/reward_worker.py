"""A process that calls a user's reward function or endpoint, so that one that hangs can be ended.

    python -m openqwen.train.reward_worker MODULE:FUNCTION | URL

It reads one request a line from stdin and writes one reply a line to stdout, both JSON:
{"records": [...], "answers": [...]} → {"rewards": [...]}, or {"error": text}; with {"stop": true}
where other answers would fare no better.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_RETRIES = 5  # of a request that finds no server: about 15 seconds
Function = Callable[[Sequence[dict[str, Any]], Sequence[str]], Any]


def main() -> None:
    """Answer requests until stdin ends. What the function prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())
    name = sys.argv[1]
    try:
        function = partial(_post, name) if "//" in name else _imported(name)
    except Exception as error:
        replies.write(json.dumps(_failure(error) | {"stop": True}) + "\n")
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            # The first request asks for nothing, to see that the function is there.
            asked = request["records"], request["answers"]
            values = list(function(*asked)) if asked[0] else []
            reply: Any = {"rewards": [None if v is None else float(v) for v in values]}
        except ConnectionError as error:
            reply = _failure(error) | {"stop": True}
        except Exception as error:
            traceback.print_exc()
            reply = _failure(error)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _imported(name: str) -> Function:
    module, _, function = name.partition(":")
    found: Function = getattr(importlib.import_module(module), function)
    return found


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"}


def _post(url: str, records: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[float]:
    """The rewards that an endpoint gives: {"rewards": [...]}, or /score's {"data": [...]}."""
    import httpx

    from openqwen.tokenizer.messages import prompt

    talks = [
        [*prompt(record)[0], {"role": "assistant", "content": answer}]
        for record, answer in zip(records, answers)
    ]
    body = {"conversations": talks, "records": list(records)}
    for attempt in range(_RETRIES + 1):
        try:
            response = httpx.post(url, json=body, timeout=None)
            break
        except httpx.TransportError as error:
            if attempt == _RETRIES:
                raise ConnectionError(f"the server does not answer: {error}") from None
            time.sleep(0.5 * 2**attempt)
    value = response.raise_for_status().json()
    if "data" in value:
        return [row["score"] for row in value["data"]]
    rewards: list[float] = value["rewards"]
    return rewards


if __name__ == "__main__":
    main()
