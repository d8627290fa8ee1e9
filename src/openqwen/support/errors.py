"""Error messages for users: what is wrong, where, and what to do."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OpenQwenError(Exception):
    """A problem that the user can solve. The command line prints it without a traceback.

    Args:
        what: one sentence that says what is wrong.
        where: the file, line, field or stage.
        do: what the user can do.
    """

    def __init__(self, what: str, where: str | Path | None = None, do: str | None = None):
        self.what, self.where, self.do = what, where, do
        lines = [what]
        if where is not None:
            lines.append(f"  where: {where}")
        if do is not None:
            lines.append(f"  do:    {do}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:  # errors of worker processes are sent as copies
        return type(self), (self.what, self.where, self.do)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix the `where` of errors from the block with this one, such as a file and a record."""
    try:
        yield
    except OpenQwenError as error:
        inner = f", {error.where}" if error.where is not None else ""
        raise OpenQwenError(error.what, f"{where}{inner}", error.do) from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'NAME'?" to append to an error; "" where no known name is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


# The system's errors for "no space left": the disk, the user's quota, the limit of a file's size.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors of a full disk into an OpenQwenError; others pass through."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        # safetensors raises its own class, with the system's error as text.
        if not full and not any(f"os error {code})" in str(error) for code in _FULL):
            raise
        what = "There is no space left to write."
        do = "free some space and run the same command again; finished stages and the last saved"
        raise OpenQwenError(what, path, f"{do} state are intact") from error
