"""What a program may use, and how its run ended."""

from dataclasses import dataclass
from typing import Literal

NOT_COMPILED = "it does not compile"  # the reason of a verdict "failed"
Status = Literal["passed", "failed", "timeout", "memory", "output", "crashed", "infra"]


@dataclass(frozen=True)
class Limits:
    """What one run may use; it is killed with all its processes where it takes more.

    Args:
        seconds: CPU time of one process.
        wall_seconds: Time by the clock; None: twice `seconds` and two more.
        memory_mb: Memory of the run in MiB, of all its processes together where control groups can
            be written, else of each.
        processes: Processes and threads at a time.
        output_kb: What is kept of standard output and of standard error, KiB each; more ends the
            run.
        disk_mb: Files in the working folder, MiB in all (in the tier "process": of each file).
        files: Files and folders that can be created (in the tier "process": not limited).
    """

    seconds: float = 5.0
    wall_seconds: float | None = None
    memory_mb: int = 512
    processes: int = 16
    output_kb: int = 1024
    disk_mb: int = 64
    files: int = 2048

    @property
    def wall(self) -> float:
        """Seconds by the clock after which the run is killed."""
        return 2 * self.seconds + 2 if self.wall_seconds is None else self.wall_seconds


@dataclass(frozen=True)
class Verdict:
    """How a run ended.

    status: passed: it ended with status 0, and all tests passed where there were tests. failed: it
    ended otherwise, or a test failed. timeout, memory, output: the limit that it met. crashed:
    killed by a signal. infra: the sandbox failed, which says nothing of the program: keep it out of
    rewards and statistics.
    stdout, stderr: what was written, cut at the limit; bytes that are not UTF-8 are replaced.
    seconds: CPU time of the program. wall_seconds: time by the clock. reason: one line.
    exit_status: of the program, -N where signal N ended it; None where nothing ran.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    wall_seconds: float = 0.0
    reason: str = ""
    exit_status: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the program did what was asked."""
        return self.status == "passed"
