"""Allow one run per folder, by a lock that the kernel releases with its process."""

import fcntl
import getpass
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from openqwen.support.errors import OpenQwenError


@contextmanager
def hold(path: Path, command: str) -> Iterator[None]:
    """Hold the lock file at `path` during the block, or raise an error that names the holder.

    It is a POSIX record lock: the kernel releases it when the process ends in any way, and forked
    workers that outlive their parent do not keep it. The text in the file is only read while
    somebody holds the lock.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _held(path) from None
        note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "user": _user(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
        }
        file.truncate(0)
        file.write(json.dumps(note) + "\n")
        file.flush()
        yield


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _held(path: Path) -> OpenQwenError:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        since = datetime.fromisoformat(note["started"])
        holder = f"process {note['pid']} of {note['user']} on {note['host']}"
        holder += f", since {since:%Y-%m-%d %H:%M:%S}"
        do = f"wait for it, stop it (kill {note['pid']}), or choose another --output"
        do += f"; it runs: {note['command']}"
    except (ValueError, KeyError, TypeError):  # the holder is writing its note at this moment
        holder, do = "another process", "wait for it, or choose another --output"
    return OpenQwenError(f"Another run uses this folder: {holder}.", where=path.parent, do=do)
