"""Builds this package's C++ on the machine that runs it, once, and loads it.

The result is a shared library with a C ABI in the user's cache. It is never required: without a
compiler callers get None and take their Python path. OPENQWEN_NATIVE=0 turns it off, CXX names the
compiler, OPENQWEN_CACHE moves the cache.
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
_TUNED = ("-march=native",)  # left out if the compiler does not know the processor
_TIMEOUT = 600  # seconds


def load(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of these sources, built if needed; None where it cannot be built.

    The reason for None is logged once, as a warning. Functions of the library run without Python's
    global lock.

    Args:
        name: of the library's file.
        sources: .cpp files and headers; a change of any of them causes a new build.
        flags: for the compiler, after the default ones.
    """
    if os.environ.get("OPENQWEN_NATIVE", "1") == "0":
        return None
    return _load(name, tuple(sources), tuple(flags))


@cache
def _load(name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built(name, sources, flags)))
    except _UnavailableError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error} (set OPENQWEN_CACHE to a folder that can be written)"
    _log.warning("The compiled library '%s' is not used, plain Python is: %s.", name, reason)
    return None


class _UnavailableError(Exception):
    """Why there is no library."""


def _built(name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> Path:
    """The path of the library, after building it if it is missing.

    A lock keeps two processes from building it at the same time.
    """
    stem = f"{name}-{_key(sources, flags)}"
    try:
        compiler = _compiler()
    except _UnavailableError:
        # The compiler may have been removed after it built the library.
        if earlier := sorted(_cache().glob(f"{stem}-*.so")):
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
    """The command of a C++ compiler: from CXX, of the machine, or of the package ziglang."""
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
    """A digest of the sources, the flags and the processor."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    digest.update(repr([*_FLAGS, *_TUNED, *flags, _processor()]).encode())
    return digest.hexdigest()[:16]


def _identity(compiler: list[str]) -> str:
    """A digest that differs between compilers and between versions of a compiler."""
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    stamp = program.stat() if program.exists() else None
    parts = [*compiler, program, stamp and stamp.st_size, stamp and stamp.st_mtime_ns]
    return hashlib.sha256(repr(list(map(str, parts))).encode()).hexdigest()[:8]


def _processor() -> list[str]:
    """What `-march=native` depends on, since different machines may share one cache folder."""
    machine = [platform.system(), platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [*machine, platform.processor()]
    names = ("model name", "flags")
    return machine + [next((s for s in lines if s.startswith(name)), "") for name in names]


def _cache() -> Path:
    if folder := os.environ.get("OPENQWEN_CACHE"):
        return Path(folder) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openqwen" / "native"
