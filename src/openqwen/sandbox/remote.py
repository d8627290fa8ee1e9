"""A pool of sandboxes on other machines: servers with SandboxFusion's HTTP interface.

Ours (`openqwen sandbox --serve`) run tests in another process than the program, and give whole
verdicts. A server of SandboxFusion has no such tests: they are put behind the program, into the
same process. The verdict then asks for a secret that is printed last, which an exit status cannot
forge, but a program that reads its own source can.
"""

import base64
import itertools
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import httpx

from openqwen.sandbox.limits import NOT_COMPILED, Status, Verdict
from openqwen.sandbox.pool import Pool, Program
from openqwen.sandbox.tiers import best_tier
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import parse_json
from openqwen.support.retry import backoff, retry_after

_LARGEST = 64 << 20  # bytes of a response
_EXTRA = 60.0  # seconds that a program may wait for its turn at the server
_THEIRS = {"javascript": "nodejs"}  # our name of a language -> SandboxFusion's


class _RefusedError(Exception):
    """An attempt failed; another may succeed, after `wait` seconds."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class RemotePool:
    """A `Pool` whose programs run at servers.

    Connection errors, time-outs, status 429 and 5xx are tried again, at the next server. A program
    that no server has run after all attempts has the verdict `infra`.

    Args:
        urls: base URLs of the servers, such as http://127.0.0.1:8080; they take turns.
        key: by default the environment variable OPENQWEN_SANDBOX_KEY.
        concurrency: most programs at once, of all servers.
        retries: most attempts after the first.
    """

    def __init__(
        self, urls: Sequence[str], key: str | None = None, concurrency: int = 16, retries: int = 5
    ):
        self.urls = [_checked(url) for url in urls]
        if not self.urls:
            raise OpenQwenError("No server of sandboxes is named.", do="give its URL")
        self.retries = retries
        key = os.environ.get("OPENQWEN_SANDBOX_KEY", "") if key is None else key
        headers = {"Authorization": f"Bearer {key.strip()}"} if key.strip() else {}
        limits = httpx.Limits(max_connections=concurrency)
        self._http = httpx.Client(headers=headers, limits=limits)
        self._threads = ThreadPoolExecutor(concurrency)
        self._turns = itertools.cycle(range(len(self.urls)))
        self._lock = threading.Lock()
        self._foreign: set[str] = set()  # servers that are not ours

    def run(self, programs: Iterable[Program]) -> list[Verdict]:
        """Run programs; their verdicts in that order. OpenQwenError where a server refuses one."""
        return [future.result() for future in [self.submit(program) for program in programs]]

    def submit(self, program: Program) -> Future[Verdict]:
        """Run a program at one of the servers."""
        return self._threads.submit(self._one, program)

    def close(self) -> None:
        """Give up the programs that wait, and close the connections."""
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def __enter__(self) -> "RemotePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one(self, program: Program) -> Verdict:
        with self._lock:
            turn = next(self._turns)
        reason = ""
        for attempt in range(self.retries + 1):
            url = self.urls[(turn + attempt) % len(self.urls)]
            try:
                return self._attempt(url, program)
            except _RefusedError as error:
                reason = f"{url}: {error}"
                if attempt < self.retries:
                    time.sleep(backoff(attempt, error.wait))
        return Verdict("infra", reason=reason)

    def _attempt(self, url: str, program: Program) -> Verdict:
        secret = secrets.token_hex(16)
        tested = program.tests is not None
        joined = tested and url in self._foreign
        response = self._post(url, _request(program, secret if joined else ""), program)
        if not isinstance(response.get("verdict"), dict):
            self._foreign.add(url)
            if tested and not joined:  # it ran the program, and knows nothing of tests
                return self._attempt(url, program)
        verdict = _verdict(response)
        if verdict.status == "infra":
            raise _RefusedError(verdict.reason)
        return _judged(verdict, secret) if joined else verdict

    def _post(self, url: str, body: dict[str, Any], program: Program) -> dict[str, Any]:
        timeout = httpx.Timeout(program.limits.wall + _EXTRA, connect=10.0)
        try:
            with self._http.stream("POST", f"{url}/run_code", json=body, timeout=timeout) as answer:
                raw = bytearray()
                for part in answer.iter_bytes():
                    raw += part
                    if len(raw) > _LARGEST:
                        raise _RefusedError(f"The response is over {_LARGEST >> 20} MiB.")
        except httpx.HTTPError as error:
            raise _RefusedError(f"{type(error).__name__} {error}".strip()) from None
        said = raw[:500].decode("utf-8", "replace")
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise _RefusedError(f"status {answer.status_code}: {said}", retry_after(answer.headers))
        if not answer.is_success:
            do = "check the program, the URL and OPENQWEN_SANDBOX_KEY"
            raise OpenQwenError(f"The server refuses a program: {said}", f"{url}/run_code", do)
        try:
            value = parse_json(bytes(raw))
        except ValueError as error:
            raise _RefusedError(f"The response is not JSON: {error}.") from None
        if not isinstance(value, dict) or "status" not in value:
            raise _RefusedError(f"The response is none of SandboxFusion's: {said}")
        return value


def open_pool() -> Pool | RemotePool:
    """The pool of this machine in its strongest tier.

    The environment variable OPENQWEN_SANDBOX names servers in its place: URLs with commas between.
    """
    urls = [url for url in os.environ.get("OPENQWEN_SANDBOX", "").split(",") if url.strip()]
    if urls:
        return RemotePool(urls)
    return Pool(tier="process" if best_tier() == "process" else "strict")


def _checked(url: str) -> str:
    parsed = httpx.URL(url.strip())
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
        do = "give one such as http://127.0.0.1:8080"
        raise OpenQwenError("This is not the URL of a server of sandboxes.", url, do)
    return str(parsed).rstrip("/")


def _request(program: Program, secret: str) -> dict[str, Any]:
    """SandboxFusion's request with our fields. secret: the tests go into the program."""
    code = program.source
    if secret:
        call = f"check({program.entry})\n" if _has_check(program) else ""
        code = f"{code}\n{program.tests}\n{call}print({secret!r})"
    stdin = program.stdin
    contents = {name: _bytes(text) for name, text in program.files.items()}
    return {
        "code": code,
        "language": _THEIRS.get(program.language, program.language),
        "stdin": stdin.decode("utf-8", "replace") if isinstance(stdin, bytes) else stdin,
        "files": {name: base64.b64encode(data).decode() for name, data in contents.items()},
        "run_timeout": program.limits.wall,
        "memory_limit_MB": program.limits.memory_mb,
        "limits": asdict(program.limits),
        "tests": None if secret else program.tests,
        "entry": None if secret else program.entry,
    }


def _has_check(program: Program) -> bool:
    defined = re.search(r"^def check\(", program.tests or "", re.MULTILINE)
    return program.entry is not None and defined is not None


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _verdict(response: dict[str, Any]) -> Verdict:
    """A response as a verdict."""
    run = response.get("run_result") or response.get("compile_result") or {}
    ours = response.get("verdict") or {}
    code = ours.get("exit_status", run.get("return_code"))
    wall = float(run.get("execution_time") or 0.0)
    stdout, stderr = str(run.get("stdout") or ""), str(run.get("stderr") or "")
    status, reason = ours.get("status"), str(ours.get("reason", ""))
    if status is None:
        status, reason = _ending(response, run, code, stderr)
    return Verdict(status, stdout, stderr, float(ours.get("seconds", wall)), wall, reason, code)


def _ending(
    response: dict[str, Any], run: dict[str, Any], code: int | None, stderr: str
) -> tuple[Status, str]:
    """How a program ended at a server of SandboxFusion."""
    if response["status"] == "Success":
        return "passed", ""
    if response["status"] != "Failed":
        return "infra", str(response.get("message") or response["status"])[:500]
    if run.get("status") == "TimeLimitExceeded":
        return "timeout", "more than its seconds by the clock"
    if not response.get("run_result"):
        return "failed", NOT_COMPILED
    last = stderr.strip().splitlines()[-1] if stderr.strip() else ""
    if last.startswith("MemoryError") or "std::bad_alloc" in stderr:
        return "memory", "more than its memory"
    if code is not None and code < 0:
        return "crashed", f"killed by signal {-code}"
    return "failed", last[:500] or f"exit status {code}"


def _judged(verdict: Verdict, secret: str) -> Verdict:
    """The verdict of a program with its tests behind it: it passes if the secret came last."""
    stdout, found, rest = verdict.stdout.rpartition(secret)
    if verdict.passed and not (found and not rest.strip()):
        return Verdict("failed", verdict.stdout, verdict.stderr, reason="the tests did not end")
    fields = asdict(verdict) | ({"stdout": stdout} if found else {})
    return Verdict(**fields)
