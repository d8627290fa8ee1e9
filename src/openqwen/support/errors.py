"""Errors that a person reads: what is wrong, where, and what to do (law 9)."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class OpenQwenError(Exception):
    """A problem that the user can mend. The command line prints it without a traceback.

    what: one sentence that names the fault. where: the file, line, field or stage. do: the next
    step.
    """

    def __init__(self, what: str, where: str | Path | None = None, do: str | None = None):
        self.what, self.where, self.do = what, where, do
        lines = [what]
        if where is not None:
            lines.append(f"  where: {where}")
        if do is not None:
            lines.append(f"  do:    {do}")
        super().__init__("\n".join(lines))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put `where`, such as a file and a record, before the place that an error names."""
    try:
        yield
    except OpenQwenError as error:
        inner = f", {error.where}" if error.where is not None else ""
        raise OpenQwenError(error.what, f"{where}{inner}", error.do) from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, as the sentence to append to an error, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


# Every way in which "there is no room left" reaches a program: disk, quota, file-size limit.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk under `path` into an error that says so; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(path) from error
    except Exception as error:  # safetensors wraps the system's error in its own class, as text
        if "os error" not in str(error) or not any(
            f"os error {code})" in str(error) for code in FULL
        ):
            raise
        raise _full(path) from error


def _full(path: Path) -> OpenQwenError:
    return OpenQwenError(
        "There is no space left to write.",
        where=path,
        do=(
            "free some space and run the same command again: finished stages and the last saved "
            "state are intact"
        ),
    )
