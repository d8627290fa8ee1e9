"""Grades by content, kept in a file, so that no answer is graded twice."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.progress import notice
from openqwen.tasks.task import Grade

_STATUSES = ("graded", "no_answer")  # "infra" is not kept: the next try may succeed


class GradeCache:
    """A file of grades, one JSON line each, that is only appended to.

    Several processes may use one file, each finds what the others wrote. A line that was cut off,
    since its writer was killed or the disk was full, is skipped.

    Args:
        path: the file; it is made when the first grade is kept.

    Raises:
        OpenQwenError: the file holds something else, or cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._grades: dict[bytes, Grade] = {}
        self._read = 0  # bytes of the file that were read
        self._refresh()

    def __len__(self) -> int:
        return len(self._grades)

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Grade]:
        """The grades that are known under these keys."""
        self._refresh()
        return {key: self._grades[key] for key in keys if key in self._grades}

    def keep(self, grades: Mapping[bytes, Grade]) -> None:
        """Append grades, flushed to the disk. Grades of status "infra" are left out."""
        kept = {key: grade for key, grade in grades.items() if grade.status in _STATUSES}
        lines = b"".join(_line(key, grade) for key, grade in kept.items())
        if not lines:
            return
        try:
            with disk_errors(self.path):
                self._append(lines)
        except OSError as error:
            what = f"The cache of grades cannot be written: {error}"
            raise OpenQwenError(what, self.path, "give another file") from None
        self._grades |= kept

    def _append(self, lines: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the system ends it with the process
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                lines = b"\n" + lines  # end the line of a writer that was killed
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _refresh(self) -> None:
        """Read the lines that were added since the last time."""
        damaged = 0
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._read:  # another file of that name
                    self._read, self._grades = 0, {}
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # its writer is still at it, or was killed
                    self._read += len(line)
                    damaged += not self._take(line)
        except FileNotFoundError:
            self._read, self._grades = 0, {}
        except OSError as error:
            raise OpenQwenError(f"The cache of grades cannot be read: {error}", self.path) from None
        if damaged and not self._grades:
            what = "This file is not a cache of grades."
            raise OpenQwenError(what, self.path, "give another file, or remove this one")
        if damaged:
            notice(f"{damaged} damaged lines of the cache of grades are skipped", str(self.path))

    def _take(self, line: bytes) -> bool:
        """Whether a line holds a grade, or nothing; the grade is added."""
        if not line.strip():
            return True
        try:
            record = json.loads(line)
            key, grade = bytes.fromhex(record["key"]), Grade(*record["grade"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not _is_grade(grade):
            return False
        self._grades[key] = grade
        return True


def _line(key: bytes, grade: Grade) -> bytes:
    return json.dumps({"key": key.hex(), "grade": grade}).encode() + b"\n"


def _is_grade(grade: Grade) -> bool:
    numbers: list[Any] = [grade.score] if grade.raw is None else [grade.score, grade.raw]
    return (
        isinstance(grade.passed, bool)
        and isinstance(grade.reason, str)
        and grade.status in _STATUSES
        and all(isinstance(number, int | float) for number in numbers)
    )
