"""How strong a sandbox this machine can build."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openqwen.support.errors import OpenQwenError

Tier = Literal["gvisor", "strict", "process", "none"]
_ORDER = ("none", "process", "strict")
_SPACES = "user, mount, process, network, IPC, name and control-group namespaces"


@dataclass(frozen=True)
class Protections:
    """What the kernel offers: namespaces, the version of Landlock (0: none), seccomp, and the
    folder of control groups that can be written (None: none).
    """

    namespaces: bool
    landlock: int
    seccomp: bool
    groups: str | None

    @property
    def tier(self) -> Tier:
        """The strongest tier that these make."""
        if self.seccomp and self.namespaces:
            return "strict"
        return "process" if self.seccomp and self.landlock else "none"

    def lines(self) -> list[tuple[str, bool, str]]:
        """(name, whether it is active, what it does) for a person to read."""
        return [
            ("namespaces", self.namespaces, _SPACES),
            ("Landlock", bool(self.landlock), f"files, TCP, signals; version {self.landlock}"),
            ("seccomp", self.seccomp, "system calls that no program needs are refused"),
            ("control groups", self.groups is not None, "memory of all processes of a run"),
            ("gVisor", runsc() is not None, "a kernel of its own for the tier 'gvisor' (runsc)"),
            ("resource limits", True, "CPU time, memory, processes and file size of a process"),
        ]


@functools.cache
def protections() -> Protections:
    """What this machine offers; tried, not guessed."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return Protections(False, 0, False, None)
    from openqwen.sandbox import groups, kernel

    test = "import ctypes; raise SystemExit(ctypes.CDLL(None).unshare(0x7E020000) != 0)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", test], capture_output=True)
    filters = ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) == 0  # PR_GET_SECCOMP
    return Protections(not done.returncode, kernel.landlock_abi(), filters, groups.kind())


@functools.cache
def runsc() -> str | None:
    """The path of gVisor's program; None where it is not installed."""
    return shutil.which("runsc")


def best_tier() -> Tier:
    """The strongest tier of this machine."""
    return protections().tier


def required(tier: Tier) -> Tier:
    """`tier`, where this machine reaches it. Raises OpenQwenError where it does not."""
    if tier == "gvisor":
        if runsc() is None:
            what = (
                "gVisor is not installed: there is no program 'runsc'. No untrusted code was run."
            )
            raise OpenQwenError(what, do="install it (https://gvisor.dev), or take another tier")
        return tier
    if tier not in ("strict", "process"):
        do = "use gvisor, strict or process"
        raise OpenQwenError(f"'{tier}' is not a tier of the sandbox.", do=do)
    if _ORDER.index(best_tier()) < _ORDER.index(tier):
        missing = [name for name, active, _ in protections().lines() if not active]
        raise OpenQwenError(
            f"This machine cannot build a sandbox of the tier '{tier}': the strongest is "
            f"'{best_tier()}' (missing: {', '.join(missing)}). No untrusted code was run.",
            do="allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or "
            "docker run --security-opt seccomp=unconfined), or take the tier 'process' where it is "
            "the strongest",
        )
    return tier


def interpreter() -> Path:
    """The Python that runs programs: this one."""
    return Path(os.path.realpath(sys.executable))
