"""Control groups, version 1 or 2: memory and processes of a worker, where they can be written."""

import functools
import os
import time
import uuid
from pathlib import Path

_V1 = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/pids"))
_V2 = Path("/sys/fs/cgroup")
_PREFIX = "openqwen-"
_OWN_MB = 96  # the zygote's own memory, beside what a run may use
_OWN_PROCESSES = 8


@functools.cache
def kind() -> str | None:
    """The version of control groups that can limit memory here: v1, v2, or None."""
    for version in ("v1", "v2"):
        try:
            group = Group(version)
        except OSError:
            continue
        try:
            group.limit(64, 16)
            return version
        except OSError:
            continue
        finally:
            group.close()
    return None


class Group:
    """One worker's groups. limit() before a run, exceeded() after it."""

    def __init__(self, version: str):
        self.version = version
        folders = _V1 if version == "v1" else (_V2,)
        name = f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.folders = [folder / name for folder in folders]
        self._kills = 0
        for folder in self.folders:
            folder.mkdir()

    def add(self, process: int) -> None:
        """Move a process, with what it will fork, into the groups."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(process))

    def limit(self, memory_mb: int, processes: int) -> None:
        """Limits of the next run."""
        memory, count = (memory_mb + _OWN_MB) << 20, processes + _OWN_PROCESSES
        if self.version == "v2":
            (self.folders[0] / "memory.max").write_text(str(memory))
            (self.folders[0] / "pids.max").write_text(str(count))
        else:
            (self.folders[0] / "memory.limit_in_bytes").write_text(str(memory))
            (self.folders[1] / "pids.max").write_text(str(count))
        self._kills = self._killed()

    def exceeded(self) -> bool:
        """Whether the kernel killed a process for its memory since `limit`."""
        return self._killed() > self._kills

    def close(self) -> None:
        """Remove the groups. Their processes have ended; the kernel takes a moment to let go."""
        for folder in self.folders:
            for _ in range(20):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.01)

    def _killed(self) -> int:
        name = "memory.events" if self.version == "v2" else "memory.oom_control"
        for line in (self.folders[0] / name).read_text().splitlines():
            word, _, count = line.partition(" ")
            if word == "oom_kill":
                return int(count)
        return 0


def sweep() -> None:
    """Remove groups of callers that have ended without closing theirs."""
    for folder in (*_V1, _V2):
        for group in folder.glob(_PREFIX + "*"):
            try:
                os.kill(int(group.name.split("-")[1]), 0)
            except ProcessLookupError:
                try:
                    group.rmdir()
                except OSError:
                    continue
            except (ValueError, PermissionError):
                continue
