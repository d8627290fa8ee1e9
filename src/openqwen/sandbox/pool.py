"""The caller's side: zygotes, what they are sent, and the verdict."""

import functools
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from openqwen.sandbox import confine, groups, languages
from openqwen.sandbox.gvisor import GuestWorker
from openqwen.sandbox.limits import NOT_COMPILED, Limits, Status, Verdict
from openqwen.sandbox.processes import end_descendants
from openqwen.sandbox.tiers import Tier, interpreter, protections, required
from openqwen.support.errors import OpenQwenError

_SOURCES = str(Path(__file__).parents[2])
_START = 30.0  # seconds for a zygote to come up
_TRIES = 3  # of a run whose sandbox failed
_GRACE = 5.0  # seconds for the last processes of a killed run to go


@dataclass(frozen=True)
class Program:
    """One run.

    Args:
        source: The program's text.
        stdin: What it reads from standard input.
        files: Name → content of files in its working folder; names are relative.
        language: "python", or another of `languages.TABLE` whose tools are on this machine.
        tests: Python statements that call the program's functions (Python alone): asserts, or a
            function `check(candidate)` that is called with the function `entry`. They run in a
            process of their own; see checker.py.
        entry: The name of the function that the tests are for.
        limits: What the run may use.
    """

    source: str
    stdin: str | bytes = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    language: str = "python"
    tests: str | None = None
    entry: str | None = None
    limits: Limits = field(default_factory=Limits)


def run(
    source: str,
    stdin: str | bytes = "",
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
    *,
    language: str = "python",
    tests: str | None = None,
    entry: str | None = None,
    tier: Tier = "strict",
) -> Verdict:
    """Run one program in a sandbox of its own; many are faster in a `Pool`. See `Program`.

    Raises OpenQwenError where this machine cannot build the tier.
    """
    program = Program(source, stdin, files or {}, language, tests, entry, limits or Limits())
    with Pool(1, tier=tier) as pool:
        return pool.run([program])[0]


class Pool:
    """Workers that run programs side by side.

    Args:
        workers: Programs at a time; None: one for each core.
        tier: What is required of the sandbox; see tiers.py.
        packages: Installed modules that programs may import beside the standard library, such as
            ("numpy",). They are imported once, before the forks.

    Raises OpenQwenError where this machine cannot build the tier, or a package is not installed.
    """

    def __init__(
        self, workers: int | None = None, *, tier: Tier = "strict", packages: Sequence[str] = ()
    ):
        self.tier = required(tier)
        paths = [path for name in packages for path in _package_paths(name)]
        count = workers or len(os.sched_getaffinity(0))
        make = GuestWorker if tier == "gvisor" else functools.partial(Worker, tier)
        self._workers: list[Worker | GuestWorker] = [make(paths) for _ in range(count)]
        self._idle = list(self._workers)
        self._threads = ThreadPoolExecutor(count)
        self._lock = threading.Lock()

    def run(self, programs: Iterable[Program]) -> list[Verdict]:
        """Run programs; their verdicts in that order. A run whose sandbox failed is repeated."""
        return [future.result() for future in [self.submit(program) for program in programs]]

    def submit(self, program: Program) -> Future[Verdict]:
        """Run a program when a worker is free."""
        return self._threads.submit(self._one, program)

    def close(self) -> None:
        """End the workers and everything that they run."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _one(self, program: Program) -> Verdict:
        with self._lock:
            worker = self._idle.pop()
        try:
            for _ in range(_TRIES):
                verdict = worker.run(program)
                if verdict.status != "infra":
                    break
            return verdict
        finally:
            with self._lock:
                self._idle.append(worker)


class Worker:
    """One zygote and the runs that it forks, one at a time."""

    def __init__(self, tier: Tier, packages: Sequence[str]):
        self.tier, self.strict, self.packages = tier, tier == "strict", list(packages)
        self.process: subprocess.Popen[bytes] | None = None
        self.group: groups.Group | None = None

    def run(self, program: Program) -> Verdict:
        """One run. A broken sandbox is stopped and started anew by the next run."""
        payload = _payload(program)
        work = "" if self.strict else tempfile.mkdtemp(prefix="openqwen-box-")
        try:
            if self.process is None:
                self._start()
            if self.group:
                self.group.limit(program.limits.memory_mb, program.limits.processes)
            return self._run(program, payload, work)
        except (OSError, ValueError, EOFError) as error:
            return Verdict("infra", reason=f"{type(error).__name__}: {error} {self.stop()}".strip())
        finally:
            if work:  # rm follows no link, and goes as deep as folders do; rmtree recurses
                subprocess.run(["rm", "-rf", "--", work], stderr=subprocess.DEVNULL)

    def stop(self) -> str:
        """End the zygote, and its namespaces with it; returns what it said of an error."""
        said = b""
        if self.process is not None:
            self.host.close()
            if not self.strict:
                end_descendants(self.process.pid, reap=False)
            self.process.kill()
            said = self.process.communicate()[1]
            self.process = None
        if self.group:
            self.group.close()
            self.group = None
        return said.decode("utf-8", "replace").strip()[-500:]

    def _start(self) -> None:
        self.host, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        start = (
            f"import sys; sys.path.insert(0, {_SOURCES!r}); from openqwen.sandbox import zygote; "
            f"sys.path[0] = ''; zygote.main({theirs.fileno()}, {self.tier!r}, {self.packages!r})"
        )
        with theirs:
            self.process = subprocess.Popen(
                [interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", start],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=confine.ENVIRONMENT,
                cwd="/",
            )
        if version := protections().groups:
            groups.sweep()
            self.group = groups.Group(version)
            self.group.add(self.process.pid)
            self.group.limit(4096, 64)
        self.host.settimeout(_START)
        message = self.host.recv(16)
        if message == b"map":
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{self.process.pid}/{name}").write_text("65534 65534 1")
            self.host.send(b"!")
            message = self.host.recv(16)
        if message != b"ready":
            raise EOFError("the sandbox did not start")
        self.host.settimeout(None)

    def _run(self, program: Program, payload: bytes, work: str) -> Verdict:
        nonce = secrets.token_hex(16)
        inner: dict[str, int] = {}  # what the zygote gets
        outer: dict[str, int] = {}  # what is read here
        handles: list[int] = []
        try:
            inner["payload"] = _memory(payload)
            inner["stdin"] = _memory(_latin(program.stdin).encode("latin-1"))
            for name in ("stdout", "stderr", "report"):
                outer[name], inner[name] = os.pipe()
            if program.tests is not None:
                ours, theirs = socket.socketpair()
                inner["calls"], inner["answers"] = ours.detach(), theirs.detach()
                tests = {"source": program.tests, "entry": program.entry, "nonce": nonce}
                inner["tests"] = _memory(json.dumps(tests).encode())
                outer["result"], inner["result"] = os.pipe()
            header = {"limits": asdict(program.limits), "work": work, "names": list(inner)}
            socket.send_fds(self.host, [json.dumps(header).encode()], list(inner.values()))
            _close(inner)
            processes, handles = self._started()
            kill = functools.partial(_kill, processes, handles)
            began = time.monotonic()
            ending, read = _follow(outer, kill, program.limits, self.host)
            return _verdict(program, ending, read, nonce, time.monotonic() - began, self.group)
        finally:
            _close(inner)
            _close(outer)
            for handle in handles:
                os.close(handle)

    def _started(self) -> tuple[list[int], list[int]]:
        """The processes of the run, and handles of them where the kernel has handles."""
        message, handles, _, _ = socket.recv_fds(self.host, 64, 2)
        if not message:
            raise EOFError("the sandbox ended")
        return json.loads(message), list(handles)


def _follow(
    outer: Mapping[str, int], kill: Callable[[], None], limits: Limits, host: socket.socket
) -> tuple[str, dict[str, bytearray]]:
    """Read what a run writes until nothing of it is left; returns the limit that ended it ("" where
    it ended by itself) and what was read.
    """
    read = {name: bytearray() for name in outer}
    names = {descriptor: name for name, descriptor in outer.items()}
    poll = select.poll()
    for descriptor in (*names, host.fileno()):
        poll.register(descriptor, select.POLLIN)
    most, ending = limits.output_kb << 10, ""
    deadline = time.monotonic() + limits.wall
    while True:
        left = deadline - time.monotonic()
        ready = poll.poll(left * 1000) if left > 0 else []
        for descriptor, _ in ready:
            if descriptor == host.fileno():
                continue
            name = names[descriptor]
            part = os.read(descriptor, 1 << 16)
            if not part:
                poll.unregister(descriptor)
            read[name] += part[: most + 1 - len(read[name])]
            if name == "result":  # the program has nothing left to do but to end
                deadline = min(deadline, time.monotonic() + _GRACE)
        if len(ready) == 1 and ready[0][0] == host.fileno():
            if not (message := host.recv(1 << 12)):
                raise EOFError("the sandbox ended")
            read["ended"] = bytearray(message)
            return ending, read
        flood = any(len(text) > most for text in read.values())
        if not ending and (flood or not ready):
            ending = "output" if flood else "timeout"
            deadline = time.monotonic() + _GRACE
            kill()
        elif not ready:
            raise OSError("a killed run did not end")


def _verdict(
    program: Program,
    ending: str,
    read: Mapping[str, bytearray],
    nonce: str,
    wall: float,
    group: groups.Group | None,
) -> Verdict:
    report = json.loads(read["report"] or b"{}") | json.loads(read["ended"])
    result = json.loads(read.get("result") or b"{}")
    judged = result.get("nonce") == nonce
    stdout, stderr = (read[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    status, reason = _ending(program, ending, report | result, stderr, group)
    if status in ("passed", "failed") and program.tests is not None:
        status = "passed" if judged and result["passed"] is True else "failed"
        reason = str(result.get("reason", "")) if judged else "the tests did not end"
        if report.get("status") != 0 and stderr.strip():
            reason = _last_words(stderr)
    code = os.waitstatus_to_exitcode(report["status"])
    return Verdict(status, stdout, stderr, float(report.get("seconds", 0.0)), wall, reason, code)


def _last_words(stderr: str) -> str:
    """The line that says why a program ended: the last one; of Node, whose own name is last, the
    line with the error.
    """
    lines = stderr.strip().splitlines()
    if lines and lines[-1].startswith("Node.js v"):
        lines = [line for line in lines if re.match(r"(Uncaught )?\w*Error\b", line)] or lines[:-1]
    return lines[-1][:500] if lines else ""


def _ending(
    program: Program,
    ending: str,
    report: Mapping[str, Any],
    stderr: str,
    group: groups.Group | None,
) -> tuple[Status, str]:
    """How the program's process ended, without a look at tests."""
    limits = program.limits
    if "infra" in report:
        return "infra", str(report["infra"])
    if group is not None and group.exceeded():
        return "memory", f"more than {limits.memory_mb} MiB"
    if ending == "timeout":
        return "timeout", f"more than {limits.wall:g} seconds by the clock"
    if ending == "output":
        return "output", f"more than {limits.output_kb} KiB of output"
    code = os.waitstatus_to_exitcode(report["status"])
    if report.get("compiled") is False:
        return "failed", NOT_COMPILED
    last = _last_words(stderr)
    if code and (last.startswith("MemoryError") or "std::bad_alloc" in stderr):
        return "memory", f"more than {limits.memory_mb} MiB"
    spent = report["seconds"] >= 0.9 * limits.seconds  # the kernel counts CPU time in two ways
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and spent):
        return "timeout", f"more than {limits.seconds:g} seconds of CPU time"
    if code < 0:
        return "crashed", f"killed by {signal.Signals(-code).name}"
    return ("failed", last or f"exit status {code}") if code else ("passed", "")


def _payload(program: Program) -> bytes:
    """What the run reads. Raises OpenQwenError for a program that cannot be run."""
    files = {_checked_name(name): _latin(text) for name, text in program.files.items()}
    commands: list[list[str]] = []  # Python runs in the fork itself
    if program.language != "python":
        if program.tests is not None:
            raise OpenQwenError(
                f"Tests call functions of Python programs, and this one is {program.language}.",
                do="compare its output instead",
            )
        language = languages.language_of(program.language)
        files[language.file] = _latin(program.source)
        commands = [list(command) for command in language.commands]
    payload = {"source": program.source, "files": files, "commands": commands}
    return json.dumps(payload).encode()


def _latin(text: str | bytes) -> str:
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return data.decode("latin-1")


def _checked_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise OpenQwenError(
            f"{name!r} is not a valid file name in the working folder.",
            do="give a relative name without '..'",
        )
    return str(path)


def _package_paths(name: str) -> list[str]:
    """The paths of an installed module: its folder or file, its wheel's libraries and metadata."""
    spec = find_spec(name)
    if spec is None or spec.origin is None or not name.isidentifier():
        raise OpenQwenError(f"No module '{name}' is installed.", do="install it, or leave it out")
    path = Path(spec.origin)
    path = path.parent if spec.submodule_search_locations else path
    libraries = path.parent / f"{name}.libs"
    paths = [path, *([libraries] if libraries.is_dir() else [])]
    for owner in metadata.packages_distributions().get(name, ()):  # a module may ask for a version
        paths += path.parent.glob(f"{owner.replace('-', '_')}-*.dist-info")
    return [str(path) for path in paths]


def _memory(data: bytes) -> int:
    """A descriptor of a file in memory that holds `data`."""
    descriptor = os.memfd_create("openqwen")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _kill(processes: Sequence[int], handles: Sequence[int]) -> None:
    """Kill a run. Numbers are this process's only where there are no handles."""
    for number in handles or processes:
        with suppress(ProcessLookupError):
            if handles:
                signal.pidfd_send_signal(number, signal.SIGKILL)
            else:
                os.kill(number, signal.SIGKILL)


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
    descriptors.clear()
