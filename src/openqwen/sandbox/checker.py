"""The process that runs the tests: it calls the program's functions and checks the results.

It is a separate process in its own PID namespace. The program never sees the tests, the expected
values or the nonce, and its exit status is not the verdict. Modules of the standard library that
the tests use are imported here. Other names that the program defines are taken from it: where
tests call a helper of the program, its result is the program's word. Standard library alone.
"""

import ast
import builtins
import importlib
import json
import os
import sys
import types
from typing import Any

from openqwen.sandbox import confine, kernel
from openqwen.sandbox.calls import Peer, RemoteError


def check(shell: confine.Shell, header: dict[str, Any], given: dict[str, int]) -> None:
    """Run the tests against the program and write the verdict, stamped with the nonce."""
    kernel.set_dumpable(False)
    tests = confine.read_payload(given.pop("tests"))
    answers, result = given["answers"], given["result"]
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)
    for name, opened in given.items():
        if name not in ("answers", "result"):
            os.close(opened)
    confine.be_killed_first()
    confine.give_up(shell, header["limits"], "", programs=False)
    reason = _failure(Peer(answers), str(tests["source"]), tests.get("entry"))
    verdict = {"nonce": tests["nonce"], "passed": reason is None, "reason": reason or ""}
    os.write(result, json.dumps(verdict).encode())
    os._exit(0)


def _failure(peer: Peer, source: str, entry: object) -> str | None:
    """Why the tests failed; None where all passed."""
    try:
        names = set(peer.remote_names())
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        space = vars(module)
        tree = ast.parse(source)
        if entry is not None and entry not in names:
            return f"the program has no function {entry!r}"
        for name in _wanted(tree, entry) & names:
            own = name in sys.stdlib_module_names and name != entry
            space[name] = importlib.import_module(name) if own else peer.named(name)
        exec(compile(tree, "tests.py", "exec"), space)
        # A `check` of the program's, which the tests call by themselves, is no such function.
        if entry is not None and isinstance(space.get("check"), types.FunctionType):
            space["check"](peer.named(str(entry)))
        return None
    except RemoteError as error:
        return str(error)
    except AssertionError as error:
        return f"a test failed: {_line(error)} {error}".strip()[:500]
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]


def _wanted(tree: ast.Module, entry: object) -> set[str]:
    """Names that the tests use and may take from the program.

    Built-in functions are the checker's own, except for the function under test: a program that
    defines `abs` or `len` must not decide what the tests compare.
    """
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return found - defined - (set(dir(builtins)) - {entry})


def _line(error: BaseException) -> str:
    trace, line = error.__traceback__, 0
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line} of the tests" if line else ""
