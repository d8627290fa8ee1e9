"""What the workers of test_workers.py do. Worker processes import this file."""

import os
import time
from pathlib import Path

from openqwen.support.errors import OpenQwenError


def doubling(folder: Path):
    """Doubles numbers after a moment; leaves a file named by its process."""
    (folder / f"{os.getpid()}.pid").touch()

    def work(number):
        time.sleep(0.01 * (number % 3))
        return number * 2

    return work


def dying(folder: Path, times: int):
    """As `doubling`, but the process is killed at item 5, so many times."""
    work = doubling(folder)

    def mortal(number):
        deaths = len(list(folder.glob("*.death")))
        if number == 5 and deaths < times:
            (folder / f"{deaths}.death").touch()
            os.kill(os.getpid(), 9)
        return work(number)

    return mortal


def faulty(folder: Path):
    """Refuses 5, in two ways."""

    def work(number):
        if number == 5:
            raise OpenQwenError("Five is too many.", folder, "give four")
        if number == 6:
            raise ValueError("six")
        return number

    return work


def unmade():
    raise OpenQwenError("There is nothing to work with.", "make")


def threads():
    return lambda _: os.environ.get("OMP_NUM_THREADS")


def stuck(folder: Path):
    (folder / f"{os.getpid()}.pid").touch()
    return lambda *_: time.sleep(600)


def pids(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
