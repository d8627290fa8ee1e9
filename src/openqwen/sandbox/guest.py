"""Inside of a gVisor container: programs come as lines of JSON, and verdicts go as lines of JSON.

Standard library alone; started by gvisor.py as the container's first process.
"""

import base64
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from openqwen.sandbox.limits import Limits
from openqwen.sandbox.pool import Program, Worker


def main(packages: list[str]) -> None:
    """Run programs until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of runs leave no zombies
    worker = Worker("gvisor", packages)
    answers = os.dup(1)
    os.dup2(2, 1)
    _write(answers, "ready")
    for line in sys.stdin.buffer:
        _write(answers, asdict(worker.run(_unpacked(json.loads(line)))))
    worker.stop()


def _unpacked(packed: dict[str, Any]) -> Program:
    files = {name: base64.b64decode(text) for name, text in packed.pop("files").items()}
    limits, stdin = Limits(**packed.pop("limits")), base64.b64decode(packed.pop("stdin"))
    return Program(**packed, files=files, limits=limits, stdin=stdin)


def _write(descriptor: int, value: Any) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]
