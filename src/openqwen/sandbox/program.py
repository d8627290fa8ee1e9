"""Inside of a run: a forked process becomes the program. Standard library alone."""

import atexit
import builtins
import json
import linecache
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

from openqwen.sandbox import confine
from openqwen.sandbox.calls import Peer

_COMPILE_SECONDS = 30
_REHEARSAL = """
import math
from typing import List

class Point:
    def __init__(self, x): self.x = x

def total(points: List[int]) -> int:
    found = {str(n): Point(n) for n in points}
    return sum(p.x for p in found.values())

assert total([1, 2, 3]) == 6 and f"{math.pi:.2f}" == "3.14"
"""
_MOST_DESCRIPTORS = 1 << 20


def become_program(shell: confine.Shell, header: dict[str, Any], given: dict[str, int]) -> None:
    """Set up the run's folder, compile where that is needed, and become the program.

    With namespaces it is the first of its own: when it ends, the kernel kills all others.
    """
    work = header["work"] or f"{confine.BOX}/work"
    if shell.strict:
        shell.limit_box(header["limits"]["disk_mb"], header["limits"]["files"])
    payload = confine.read_payload(given.pop("payload"))
    os.chdir(work)
    confine.put_files(payload, work)
    commands, calls = payload["commands"], given.get("calls", -1)
    if (commands or shell.guest) and not shell.strict and os.geteuid() == 0:
        confine.hand_over(work)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(given[name], number)
    for command in commands[:-1]:
        _compile(shell, header["limits"], command, work, given["report"])
    os.setsid()
    confine.give_up(shell, header["limits"], work, programs=bool(commands))
    if commands:
        os.set_inheritable(given["report"], False)
        _close_others({0, 1, 2, given["report"]})
        _start(commands[-1], work)
    _close_others({0, 1, 2, calls})
    run_python(payload["source"], work, calls)


def rehearse() -> None:
    """Do once what a run will do: the fork then has memory pages of its own."""
    space: dict[str, Any] = {}
    exec(compile(_REHEARSAL, "main.py", "exec", dont_inherit=True), space)


def _compile(
    shell: confine.Shell, limits: dict[str, Any], command: list[str], work: str, report: int
) -> None:
    """Run a compiler. If it fails, report that and exit."""
    child = os.fork()
    if not child:
        try:
            confine.give_up(shell, limits | {"seconds": _COMPILE_SECONDS}, work, programs=True)
            _close_others({0, 1, 2})
            _start(command, work)
        finally:
            os._exit(127)
    if os.waitpid(child, 0)[1]:
        os.write(report, json.dumps({"compiled": False}).encode())
        os._exit(1)


def _start(command: list[str], work: str) -> None:
    """Replace this process by another program, with a shell's signal settings."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(command[0], command, {**os.environ, "HOME": work, "TMPDIR": work})


def run_python(source: str, work: str, calls: int) -> None:
    """Run Python source as a script does, then answer the checker's calls. Never returns."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __file__="main.py")
    sys.modules["__main__"] = module
    for name in [name for name in sys.modules if name.split(".")[0] == "openqwen"]:
        del sys.modules[name]
    sys.argv, sys.path[0] = ["main.py"], work
    linecache.cache["main.py"] = (len(source), None, source.splitlines(keepends=True), "main.py")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        exec(compile(source, "main.py", "exec", dont_inherit=True), module.__dict__)
        if calls >= 0:
            Peer(calls, vars(module)).serve()
    except SystemExit as end:
        status = _exit_status(end.code)
    except BaseException as error:
        status = 1
        _print_error(error)
    os._exit(_finish(status))


def _exit_status(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _print_error(error: BaseException) -> None:
    # Without the frame of this file, which is not the program's.
    here = error.__traceback__.tb_next if error.__traceback__ else None
    traceback.print_exception(type(error), error, here)


def _finish(status: int) -> int:
    """What an interpreter does at its end: threads, exit functions, buffers."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        _print_error(error)
        return status or 120
    return status


def _close_others(kept: set[int]) -> None:
    first = 0
    for number in sorted(n for n in kept if n >= 0):
        if first < number:  # an empty range closes everything in Python 3.11
            os.closerange(first, number)
        first = number + 1
    os.closerange(first, _MOST_DESCRIPTORS)
