"""The tier "gvisor": a worker whose programs run on gVisor's own kernel, not on this machine's.

`runsc` (https://gvisor.dev) runs one container for each worker. Inside, `guest.py` runs programs
one after another as the tier "process" does, but the container's files take Landlock's place: the
root holds the system's libraries and Python alone, and a program may write to its folder alone.
"""

import base64
import json
import os
import secrets
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openqwen.sandbox import confine, groups
from openqwen.sandbox.limits import Verdict
from openqwen.sandbox.tiers import interpreter, runsc

if TYPE_CHECKING:
    from openqwen.sandbox.pool import Program

_PACKAGE = Path(__file__).parents[1]
_HOST = "/host"  # our package; user 65534 may not enter it
_START = 60.0  # seconds for a container to come up
_GRACE = 20.0  # seconds beyond the run's limits until its verdict must be here
_KERNEL_MB, _KERNEL_PROCESSES = 256, 4096  # what gVisor's kernel may use beside a run
_LARGEST = 64 << 20  # bytes of a verdict
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETPCAP"]
_CAPABILITIES += ["CAP_SETUID"]


class GuestWorker:
    """One container and the runs in it, one at a time."""

    def __init__(self, packages: Sequence[str]):
        self.packages = list(packages)
        self.process: subprocess.Popen[bytes] | None = None
        self.group: groups.Group | None = None

    def run(self, program: "Program") -> Verdict:
        """One run. A broken container is stopped and started anew by the next run."""
        try:
            if self.process is None:
                self._start()
            if self.group:
                self.group.limit(program.limits.memory_mb + _KERNEL_MB, _KERNEL_PROCESSES)
            return Verdict(**self._ask(_packed(program), program.limits.wall + _GRACE))
        except (OSError, ValueError, TypeError, EOFError) as error:
            if self.group and self.group.exceeded():
                self.stop()
                return Verdict("memory", reason=f"more than {program.limits.memory_mb} MiB")
            return Verdict("infra", reason=f"{type(error).__name__}: {error} {self.stop()}".strip())

    def stop(self) -> str:
        """End the container; returns what it said of an error."""
        if self.process is None:
            return ""
        self._runsc("kill", self.name, "KILL")
        self.process.kill()
        self.process.communicate()
        self.process = None
        self._runsc("delete", "-force", self.name)
        said = (self.bundle / "said").read_text(encoding="utf-8", errors="replace")
        shutil.rmtree(self.bundle, ignore_errors=True)
        if self.group:
            self.group.close()
            self.group = None
        return said.strip()[-500:]

    def _runsc(self, *words: str) -> None:
        subprocess.run([*self.command, *words], capture_output=True)

    def _start(self) -> None:
        self.bundle = Path(tempfile.mkdtemp(prefix="openqwen-gvisor-"))
        self.name = f"openqwen-{secrets.token_hex(8)}"
        options = ["--network=none", "--ignore-cgroups", f"--root={self.bundle / 'state'}"]
        options += [] if os.geteuid() == 0 else ["--rootless"]
        self.command = [str(runsc()), *options]
        (self.bundle / "config.json").write_text(json.dumps(_bundle(self.bundle, self.packages)))
        with open(self.bundle / "said", "wb") as said:
            self.process = subprocess.Popen(
                [*self.command, "run", f"--bundle={self.bundle}", self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )
        if version := groups.kind():
            groups.sweep()
            self.group = groups.Group(version)
            self.group.add(self.process.pid)
            self.group.limit(4096, _KERNEL_PROCESSES)
        if self._ask(None, _START) != "ready":
            raise EOFError("the container did not start")

    def _ask(self, message: Any, seconds: float) -> Any:
        """Send a line of JSON, where there is one, and read a line of JSON."""
        assert self.process is not None
        given, output = self.process.stdin, self.process.stdout
        assert given is not None
        assert output is not None
        if message is not None:
            given.write(json.dumps(message).encode() + b"\n")
            given.flush()
        answer = bytearray()
        end = time.monotonic() + seconds
        while not answer.endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
                raise OSError("the container does not answer")
            part = os.read(output.fileno(), 1 << 16)
            answer += part
            if not part or len(answer) > _LARGEST:
                raise EOFError("the container ended")
        return json.loads(answer)


def _packed(program: "Program") -> dict[str, Any]:
    """A program as JSON; texts and bytes as base64."""
    files = {name: _base64(text) for name, text in program.files.items()}
    return {
        "source": program.source,
        "stdin": _base64(program.stdin),
        "files": files,
        "language": program.language,
        "tests": program.tests,
        "entry": program.entry,
        "limits": asdict(program.limits),
    }


def _base64(text: str | bytes) -> str:
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return base64.b64encode(data).decode()


def _bundle(folder: Path, packages: Sequence[str]) -> dict[str, Any]:
    """The container's configuration (OCI runtime specification); makes its root below `folder`."""
    binds = {
        place: path for place, path in confine.sources(packages).items() if "/dev/" not in place
    }
    python = str(interpreter())
    if not any(python.startswith(f"{place}/") for place in binds):
        binds[python] = python
    binds[f"{_HOST}/openqwen"] = str(_PACKAGE)
    root = folder / "rootfs"
    for place in (*binds, "/proc", "/sys", "/dev", "/tmp"):
        target = root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(binds.get(place, "/")):
            target.mkdir(exist_ok=True)
        else:
            target.touch()
    for path in confine.SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root / path.lstrip("/"))
    (root / _HOST.lstrip("/")).chmod(0o700)
    root.chmod(0o755)
    inside = [f"{confine.EXTRA}/{os.path.basename(path)}" for path in packages]
    start = f"import sys; sys.path.insert(0, '{_HOST}'); from openqwen.sandbox import guest; "
    start += f"sys.path[0] = ''; guest.main({inside!r})"
    capabilities = dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES)
    # No /proc and no /sys: they would show the container's other processes to a program.
    mounts: list[dict[str, Any]] = [_empty("/proc", "0700"), _empty("/sys", "0700")]
    mounts.append(_empty("/tmp", "0755"))
    for place, path in binds.items():
        bind = {"destination": place, "type": "bind", "source": path, "options": ["rbind", "ro"]}
        mounts.append(bind)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [python, "-I", "-S", "-B", "-X", "utf8", "-c", start],
            "env": [f"{name}={value}" for name, value in confine.ENVIRONMENT.items()],
            "cwd": "/",
            "capabilities": capabilities,
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]
        },
    }


def _empty(place: str, mode: str) -> dict[str, Any]:
    options = [f"mode={mode}"]
    return {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options}
