"""Inside of a run: the first process, and the program itself. Standard library alone."""

import atexit
import builtins
import json
import linecache
import os
import resource
import signal
import sys
import threading
import traceback
import types
from typing import Any

from openqwen.sandbox import confine, kernel
from openqwen.sandbox.calls import Peer

_COMPILE_SECONDS = 30


def first_process(shell: confine.Shell, header: dict[str, Any], given: dict[str, int]) -> None:
    """Set up the run's folder, start the program, wait, report.

    It is the first of its namespace: when it ends, the kernel kills all others. It stays apart from
    the program, which cannot look into it, so the report is true.
    """
    limits, work = header["limits"], header["work"] or f"{confine.BOX}/work"
    kernel.set_dumpable(False)
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    if shell.strict:
        shell.enter_box(limits["disk_mb"], limits["files"])
    payload = confine.read_payload(given.pop("payload"))
    os.chdir(work)
    os.umask(0o077)
    confine.put_files(payload, work)
    if not shell.strict and os.geteuid() == 0 and payload["commands"] != [None]:
        confine.hand_over(work)
    kept = {
        given[name] for name in ("stdin", "stdout", "stderr", "report", "calls") if name in given
    }
    _close_others(kept)
    report: dict[str, Any] = {}
    for command in payload["commands"]:  # type: ignore[attr-defined]
        last = command is payload["commands"][-1]  # type: ignore[index]
        if not last:
            limits = header["limits"] | {"seconds": _COMPILE_SECONDS}
        else:
            limits = header["limits"]
        child = os.fork()
        if not child:
            _program(shell, header | {"limits": limits}, payload, command, given, work)
        _, status, used = os.wait4(child, 0)
        report = {"status": status, "seconds": used.ru_utime + used.ru_stime, "compiling": not last}
        if status:
            break
    os.write(given["report"], json.dumps(report).encode())
    os._exit(0)


def _program(
    shell: confine.Shell,
    header: dict[str, Any],
    payload: dict[str, Any],
    command: list[str] | None,
    given: dict[str, int],
    work: str,
) -> None:
    """Become the program. Never returns."""
    try:
        kernel.set_dumpable(True)
        os.setsid()
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(given[name], number)
        calls = given.get("calls", -1)
        _close_others({0, 1, 2, calls})
        os.environ.clear()
        os.environ.update(HOME=work, PATH="/usr/local/bin:/usr/bin:/bin", LANG="C.UTF-8")
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TMPDIR=work)
        confine.give_up(shell, header["limits"], work, programs=command is not None)
        if command is not None:
            os.execvpe(command[0], command, os.environ)
        run_python(payload["source"], work, calls)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def run_python(source: str, work: str, calls: int) -> None:
    """Run Python source as a script does, then answer the checker's calls. Never returns."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __file__="main.py")
    sys.modules["__main__"] = module
    for name in [name for name in sys.modules if name.split(".")[0] == "openqwen"]:
        del sys.modules[name]
    sys.argv, sys.path[0] = ["main.py"], work
    linecache.cache["main.py"] = (len(source), None, source.splitlines(keepends=True), "main.py")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as in every interpreter
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
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
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
