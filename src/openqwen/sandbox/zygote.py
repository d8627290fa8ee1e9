"""The process that forks once a program. Standard library alone; started by pool.py.

It never reads a program, its input or its tests: they come as descriptors of memory files, which
only the fork that needs them opens. So nothing of one run is in the memory of the next.

    pool ── header, descriptors ──▶ zygote ──fork──▶ program ◀── calls, JSON ──▶ checker
                                       └────fork─────────────────────────────▶ checker
"""

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from openqwen.sandbox import checker, confine, kernel, program
from openqwen.sandbox.processes import end_descendants, end_user

# What programs import most; imported once, not in every run.
_MODULES = [
    "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "hashlib", "heapq", "itertools", "json", "math", "operator", "queue", "random",
    "re", "statistics", "string", "threading", "time", "traceback", "typing", "unicodedata",
]  # fmt: skip


def main(descriptor: int, tier: str, packages: list[str]) -> None:
    """Serve runs until the pool closes the connection."""
    host = socket.socket(fileno=descriptor)
    shell = confine.Shell(tier, packages)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not shell.guest:  # gVisor has no such call; guest.py is the first process, and reaps
        kernel.become_subreaper()
    if shell.strict:
        shell.separate(lambda: _ask_for_map(host))
    kernel.die_with_parent()
    kernel.set_dumpable(False)
    sys.path.extend(shell.packages_path())
    names = [os.path.basename(path) for path in packages]
    confine.warm_up([*_MODULES, *(name for name in names if "." not in name)])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    shell.size = confine.own_size()
    kernel.forbid_privileges()
    gc.collect()
    gc.freeze()  # forks then share these pages
    host.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(host, 1 << 16, 16)
        if not message:
            return
        _serve(shell, host, json.loads(message), list(descriptors))


def _ask_for_map(host: socket.socket) -> None:
    host.send(b"map")
    host.recv(1)


def _serve(
    shell: confine.Shell, host: socket.socket, header: dict[str, Any], descriptors: list[int]
) -> None:
    """One run: fork, send process handles to the pool, wait until all have ended, report.

    The pool kills through the handles where a limit is met.
    """
    given = dict(zip(header["names"], descriptors))
    try:
        run = lambda: program.become_program(shell, header, given)  # noqa: E731
        children = [_fork(shell, run, given["report"])]
        if "tests" in given:
            judge = lambda: checker.check(shell, header, given)  # noqa: E731
            children.append(_fork(shell, judge, given["result"]))
    finally:
        for opened in descriptors:
            os.close(opened)
    # gVisor's kernel has no handles; the pool then kills by number.
    handles = [] if shell.guest else [os.pidfd_open(child) for child in children]
    socket.send_fds(host, [json.dumps(children).encode()], handles)
    for handle in handles:
        os.close(handle)
    _, status, used = os.wait4(children[0], 0)
    for child in children[1:]:
        os.waitpid(child, 0)
    if shell.guest:
        end_user(confine.NOBODY)
    elif not shell.strict:  # with namespaces nothing outlives its first process
        end_descendants(os.getpid(), reap=True)
    seconds = used.ru_utime + used.ru_stime
    host.send(json.dumps({"status": status, "seconds": seconds}).encode())


def _fork(shell: confine.Shell, body: Callable[[], None], report: int) -> int:
    if shell.strict:
        kernel.enter(shell.processes)  # back to our own; a namespace takes one first process
        kernel.unshare(kernel.NEWPID)
    child = os.fork()
    if child:
        return child
    try:
        kernel.die_with_parent()
        body()
    except BaseException as error:
        os.write(report, json.dumps({"infra": f"{type(error).__name__}: {error}"}).encode())
    finally:
        os._exit(70)
