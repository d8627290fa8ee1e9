"""Our own C++, compiled on the machine that runs it: at set-up or on first use, once, into the
user's cache.

A plain shared library with a C ABI. It is never required: where there is no compiler, callers get
None and take their Python path. OPENQWEN_NATIVE=0 turns it off, CXX names the compiler,
OPENQWEN_CACHE moves the cache.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_log = logging.getLogger(__name__)
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
_TUNED = ("-march=native",)  # left out where the compiler does not know the processor
_TIMEOUT = 600  # seconds


def load(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library built of `sources` (headers too: a change of any builds anew), or None where that
    cannot be.

    name: of the library's file. flags: for the compiler, after ours. The reason for None is logged
    once, as a warning. Functions called through it run without Python's lock.
    """
    return (
        _load(name, tuple(sources), tuple(flags))
        if os.environ.get("OPENQWEN_NATIVE", "1") != "0"
        else None
    )


@cache
def _load(name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built(name, sources, flags)))
    except _UnavailableError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error} (OPENQWEN_CACHE names another folder for what is built)"
    _log.warning("The compiled %s is not used, plain Python is: %s.", name, reason)
    return None


class _UnavailableError(Exception):
    """Why there is no library."""


def _built(name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> Path:
    """The path of the library; built first if it is not there.

    Two processes do not build it twice.
    """
    stem = f"{name}-{_key(sources, flags)}"
    try:
        compiler = _compiler()
    except _UnavailableError:
        if earlier := sorted(
            _cache().glob(f"{stem}-*.so")
        ):  # the compiler went after it had done its work
            return earlier[0]
        raise
    library = _cache() / f"{stem}-{_identity(compiler)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            aside = library.with_suffix(".aside")
            _compile(compiler, sources, flags, aside)
            os.replace(aside, library)
    return library


def _compile(
    compiler: list[str], sources: tuple[Path, ...], flags: tuple[str, ...], output: Path
) -> None:
    units = [str(path) for path in sources if path.suffix == ".cpp"]
    for tuned in (_TUNED, ()):
        command = [*compiler, *_FLAGS, *tuned, *flags, *units, "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _UnavailableError(f"the compiler did not run ({error})") from None
        if done.returncode == 0:
            return
    log = output.with_suffix(".log")
    log.write_text(f"{' '.join(command)}\n{done.stdout}{done.stderr}", encoding="utf-8")
    raise _UnavailableError(f"{compiler[0]} failed, see {log}")


def _compiler() -> list[str]:
    """The command of a C++ compiler: CXX, the machine's, or the one in the package ziglang."""
    if named := os.environ.get("CXX", "").split():
        return named
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise _UnavailableError(
        "there is no C++ compiler (install g++ or clang, or the Python package ziglang)"
    )


def _key(sources: tuple[Path, ...], flags: tuple[str, ...]) -> str:
    """A digest of what the library is made of and for: the sources, the flags, the processor."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    digest.update(repr([*_FLAGS, *_TUNED, *flags, _processor()]).encode())
    return digest.hexdigest()[:16]


def _identity(compiler: list[str]) -> str:
    """A digest that another compiler, or another version of it, does not share."""
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    stamp = program.stat() if program.exists() else None
    parts = [*compiler, program, stamp and stamp.st_size, stamp and stamp.st_mtime_ns]
    return hashlib.sha256(repr(list(map(str, parts))).encode()).hexdigest()[:8]


def _processor() -> list[str]:
    """What `-march=native` looks at: a cache on a network drive may serve different machines."""
    known = [platform.system(), platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [*known, platform.processor()]
    return known + [
        next((line for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags")
    ]


def _cache() -> Path:
    if folder := os.environ.get("OPENQWEN_CACHE"):
        return Path(folder) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openqwen" / "native"
