"""The process that forks once a program. Standard library alone; started by pool.py.

It never reads a program, its input or its tests: they come as descriptors of memory files, which
only the fork that needs them opens. So nothing of one run is in the memory of the next.

    pool ── header, descriptors ──▶ zygote ──fork──▶ program ◀── calls, JSON ──▶ checker
                                       └────fork─────────────────────────────▶ checker

With namespaces the forks of the next run are made, and confined as far as no limit is needed, while
the last run goes on.
"""

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

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
    waiting = Waiting(shell) if shell.strict else None
    while True:
        message, descriptors, _, _ = socket.recv_fds(host, 1 << 16, 16)
        if not message:
            return
        _serve(shell, waiting, host, message, list(descriptors))


def _ask_for_map(host: socket.socket) -> None:
    host.send(b"map")
    host.recv(1)


class Waiting:
    """A process for the next program and one for its checker, forked while the last run goes on.

    With namespaces no run can see or end them. Each waits for its run's header and descriptors.
    """

    def __init__(self, shell: confine.Shell):
        self._shell = shell
        self._ready = {role: self._fork(role) for role in _ROLES}

    def start(self, role: str, message: bytes, descriptors: list[int]) -> int:
        """Give a waiting process its run; returns its number."""
        child, line = self._ready.pop(role)
        socket.send_fds(line, [message], descriptors)
        line.close()
        return child

    def refill(self) -> None:
        """Fork what was started."""
        for role in _ROLES:
            if role not in self._ready:
                self._ready[role] = self._fork(role)

    def _fork(self, role: str) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kernel.enter(self._shell.processes)  # back to our own; a namespace takes one first process
        kernel.unshare(kernel.NEWPID)
        child = os.fork()
        if not child:
            ours.close()
            _begin(self._shell, role, lambda: self._receive(role, theirs))
        theirs.close()
        return child, ours

    def _receive(self, role: str, line: socket.socket) -> tuple[dict[str, Any], dict[str, int]]:
        if role == "program":
            self._shell.enter_box()
        program.rehearse()
        message, descriptors, _, _ = socket.recv_fds(line, 1 << 16, 16)
        line.close()
        header = json.loads(message)
        return header, dict(zip(header["names"], descriptors))


def _begin(shell: confine.Shell, role: str, run: Callable[[], Any]) -> NoReturn:
    """In a fork: wait for the run, and become its program or its checker."""
    report = -1
    try:
        kernel.die_with_parent()
        header, given = run()
        body, channel = _ROLES[role]
        report = given[channel]
        body(shell, header, given)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        if report < 0:
            print(f"sandbox: {said}", file=sys.stderr, flush=True)
        else:
            os.write(report, json.dumps({"infra": said}).encode())
    finally:
        os._exit(70)


def _serve(
    shell: confine.Shell,
    waiting: Waiting | None,
    host: socket.socket,
    message: bytes,
    descriptors: list[int],
) -> None:
    """One run: start its processes, send their handles to the pool, wait until all have ended.

    The pool kills through the handles where a limit is met.
    """
    header = json.loads(message)
    given = dict(zip(header["names"], descriptors))
    children = []
    try:
        for role in _ROLES if "tests" in given else ["program"]:
            if waiting:
                children.append(waiting.start(role, message, descriptors))
            elif child := os.fork():
                children.append(child)
            else:
                _begin(shell, role, lambda: (header, given))
    finally:
        for opened in descriptors:
            os.close(opened)
    # gVisor's kernel has no handles; the pool then kills by number.
    handles = [] if shell.guest else [os.pidfd_open(child) for child in children]
    socket.send_fds(host, [json.dumps(children).encode()], handles)
    for handle in handles:
        os.close(handle)
    if waiting:
        waiting.refill()
    _, status, used = os.wait4(children[0], 0)
    for child in children[1:]:
        os.waitpid(child, 0)
    if shell.guest:
        end_user(confine.NOBODY)
    elif not shell.strict:  # with namespaces nothing outlives its first process
        end_descendants(os.getpid(), reap=True)
    seconds = used.ru_utime + used.ru_stime
    host.send(json.dumps({"status": status, "seconds": seconds}).encode())


# What a fork becomes, and the descriptor on which it reports.
_ROLES: dict[str, tuple[Callable[..., None], str]] = {
    "program": (program.become_program, "report"),
    "checker": (checker.check, "result"),
}
