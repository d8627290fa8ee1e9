"""The sandbox's server and its client, against the local pool and SandboxFusion's published shapes."""

import asyncio
import base64
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from openqwen.http.server import gated, listen, url_of, uvicorn_server
from openqwen.sandbox import Limits, Pool, Program, RemotePool, best_tier, open_pool, remote
from openqwen.sandbox.languages import available
from openqwen.serve.sandbox import sandbox_application
from openqwen.serve.settings import SandboxConfig
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Task
from openqwen.tasks import grade as grade_answers

pytestmark = pytest.mark.skipif(best_tier() == "none", reason="this machine has no sandbox")
TIER = best_tier()


class Running:
    """The server on a free port, in a thread."""

    def __init__(self, keys=(), **options):
        self.config = SandboxConfig(port=0, workers=2, tier=TIER, **options)
        self.pool = Pool(2, tier=TIER)
        listener = listen("127.0.0.1", 0)
        self.url = url_of(listener)
        app = gated(
            sandbox_application(self.pool, self.config), self.config, list(keys), frozenset()
        )
        self.server = uvicorn_server(app, 5.0, 1.0)
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve([listener])), daemon=True
        )
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def run(self, **body):
        return self.http.post("/run_code", json={"language": "python", **body})

    def fault(self, **body):
        answer = self.run(**body)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["message"]

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(10)
        self.pool.close()


@pytest.fixture(scope="module")
def server():
    running = Running()
    yield running
    running.close()


@pytest.fixture
def start():
    running = []

    def make(**options):
        running.append(Running(**options))
        return running[-1]

    yield make
    for one in running:
        one.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "backoff", lambda attempt, requested=None: 0.01)


# Fields and values as the repository bytedance/SandboxFusion publishes them (469de08):
# sandbox/server/sandbox_api.py, sandbox/runners/types.py. None stands beside optional ones.
RESPONSE = {
    "status": {str},
    "message": {str},
    "compile_result": {dict, type(None)},
    "run_result": {dict, type(None)},
    "executor_pod_name": {str, type(None)},
    "files": {dict},
}
RESULT = {
    "status": {str},
    "execution_time": {float, type(None)},
    "return_code": {int, type(None)},
    "stdout": {str, type(None)},
    "stderr": {str, type(None)},
}
CPP = "#include <iostream>\n#include <cassert>\nint main() { %s return 0; }"
# What its tests (sandbox/tests/runners) ask, and what they expect:
# request, status, result's status, a part of standard output or error.
PUBLISHED = [
    ({"code": "print(123)", "run_timeout": 5}, "Success", "Finished", "123"),
    (
        {"code": "import time; time.sleep(0.2)", "run_timeout": 0.1},
        "Failed",
        "TimeLimitExceeded",
        "",
    ),
    ({"code": "assert 1 == 2", "run_timeout": 5}, "Failed", "Finished", "AssertionError"),
    ({"code": "int a = 1", "run_timeout": 5}, "Failed", "Finished", "SyntaxError: invalid syntax"),
    (
        {
            "code": 'print(open("dir1/dir2/dir3/flag").read())',
            "files": {"dir1/dir2/dir3/flag": base64.b64encode(b"a test").decode(), "no": None},
        },
        "Success",
        "Finished",
        "a test",
    ),
    ({"code": "print(int(input()))", "stdin": "65535"}, "Success", "Finished", "65535\n"),
    ({"code": CPP % 'std::cout << "123";', "language": "cpp"}, "Success", "Finished", "123"),
    ({"code": CPP % "assert(1 == 2);", "language": "cpp"}, "Failed", "Finished", "Assertion"),
    ({"code": "echo 123", "language": "bash"}, "Success", "Finished", "123"),
    ({"code": "console.log(123)", "language": "nodejs"}, "Success", "Finished", "123"),
]


@pytest.mark.parametrize(("request_", "status", "ended", "said"), PUBLISHED)
def test_requests_and_responses_have_sandboxfusions_shapes(server, request_, status, ended, said):
    language = {"nodejs": "javascript"}.get(request_.get("language"), request_.get("language"))
    if language and language not in available():
        pytest.skip(f"{language} is not installed")
    all_fields = {"compile_timeout": 10, "memory_limit_MB": -1, "fetch_files": [], "args": []}
    answer = server.run(**all_fields | {"stdin": None, "files": {}} | request_)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    for name, kinds in RESPONSE.items():
        assert type(body[name]) in kinds, name
    assert set(body) - set(RESPONSE) == {"verdict"}
    for result in (body["compile_result"], body["run_result"]):
        for name, value in (result or {}).items():
            assert type(value) in RESULT[name], name
    result = body["run_result"]
    assert (body["status"], result["status"]) == (status, ended)
    assert said in result["stdout"] + result["stderr"]
    if request_.get("language") == "cpp":
        assert body["compile_result"]["status"] == "Finished"


def test_a_program_that_does_not_compile_has_no_run_result(server):
    body = server.run(code="int main() {", language="cpp").json()
    assert (body["status"], body["run_result"]) == ("Failed", None)
    assert body["compile_result"]["return_code"] == 1
    assert "error" in body["compile_result"]["stderr"]


def test_sandboxfusions_own_client(server):
    """Its package, where it can be imported (pip install sandbox-fusion)."""
    fusion = pytest.importorskip("sandbox_fusion", reason="sandbox-fusion is not installed")
    for given, status, ended, said in PUBLISHED:
        request = fusion.RunCodeRequest(**{"language": "python", **given})
        if request.language == "nodejs" and "javascript" not in available():
            continue
        found = fusion.run_code(request, server.url, max_attempts=1)
        assert (found.status.value, found.run_result.status.value) == (status, ended)
        assert said in found.run_result.stdout + found.run_result.stderr
        mapping = fusion.models.SummaryMapping(Success="S", Failed="F")
        assert fusion.summary_run_code_result(found, mapping) == status[0]


PROGRAMS = [
    Program("print(6 * 7)"),
    Program("import sys; sys.exit(3)"),
    Program("print(open('a/b', 'rb').read(), input())", "é\n", {"a/b": b"\xff\x00"}),
    Program("def f(x): return x + 1", tests="assert f(1) == 2"),
    Program("def f(x): return x + 2", tests="assert f(1) == 2"),
    Program("def f(x): return x", tests="def check(g):\n    assert g(5) == 5", entry="f"),
    Program("import os; os._exit(0)", tests="assert f(1) == 2"),
    Program("while True: pass", limits=Limits(seconds=1)),
    Program("x = 'a' * 10**9", limits=Limits(memory_mb=128)),
    Program("print('a' * 10**6)", limits=Limits(output_kb=16)),
    Program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    Program("echo $((6 * 7)); exit 4", language="bash"),
    Program("int main() {", language="c"),
]


def test_the_client_gives_the_verdicts_of_the_local_pool(server):
    def told(verdict):
        reason = verdict.reason if verdict.status != "timeout" else ""  # by CPU time or the clock
        return verdict.status, verdict.stdout, verdict.stderr, reason, verdict.exit_status

    local = server.pool.run(PROGRAMS)
    with RemotePool([server.url]) as pool:
        far = pool.run(PROGRAMS)
    for program, here, there in zip(PROGRAMS, local, far):
        assert told(here) == told(there), program
    assert {verdict.status for verdict in far} >= {
        "passed",
        "failed",
        "timeout",
        "memory",
        "output",
    }


def test_a_program_that_cannot_be_run_is_refused_as_the_local_pool_does(server):
    with RemotePool([server.url]) as pool:
        for program in (Program("", files={"../a": ""}), Program("", language="cobol")):
            with pytest.raises(OpenQwenError):
                server.pool.run([program])
            with pytest.raises(OpenQwenError, match="refuses a program"):
                pool.run([program])


def test_limits_of_what_clients_may_ask(server):
    assert "seconds must be" in server.fault(code="", run_timeout=1e6)
    assert "seconds must be" in server.fault(code="", run_timeout=0)
    assert "memory_mb must be" in server.fault(code="", memory_limit_MB=10**9)
    assert "processes must be" in server.fault(code="", limits={"processes": -1})
    assert "not base64" in server.fault(code="", files={"a": "*"})
    assert "'ruby'" in server.fault(code="", language="ruby")
    assert "print what you need" in server.fault(code="", fetch_files=["a"])
    assert "valid file name" in server.fault(code="", files={"/etc/x": ""})
    assert "code" in server.fault(code=None)
    assert server.http.post("/run_code", content=b"{}").status_code == 400
    page = server.http.post(
        "/run_code", content=b"{}", headers={"origin": "http://e", "content-type": "text/plain"}
    )
    assert "Content-Type" in page.text
    assert server.http.get("/v1/ping").json() == "pong"
    assert server.http.get("/health").json()["tier"] == TIER
    assert server.http.post("/run_jupyter", json={}).status_code == 404


def test_keys_body_sizes_and_hosts(start):
    one = start(keys=["secret"], max_body=1000)
    assert one.run(code="").status_code == 401
    one.http.headers["authorization"] = "Bearer secret"
    assert one.run(code="").json()["status"] == "Success"
    assert one.run(code="#" * 1000).status_code == 413
    with RemotePool([one.url], key="secret") as pool:
        assert pool.run([Program("")])[0].passed
    with RemotePool([one.url], key="wrong") as pool, pytest.raises(OpenQwenError, match="API key"):
        pool.run([Program("")])
    open_one = start()
    assert open_one.http.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_a_full_server_says_when_to_come_back_and_has_room_again(start):
    one = start(queue=2)
    slow = {"code": "import time; time.sleep(1.5)", "run_timeout": 5}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(one.run(**slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while one.pool._idle:
        time.sleep(0.01)
    third = one.run(code="")
    assert (third.status_code, third.json()["error"]["code"]) == (429, "queue_full")
    assert int(third.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert one.run(code="").status_code == 200


def test_a_place_is_taken_until_the_program_has_ended_though_the_client_left(start):
    one = start(queue=1)
    with pytest.raises(httpx.ReadTimeout):
        one.http.post(
            "/run_code",
            json={"code": "import time; time.sleep(2)", "language": "python"},
            timeout=0.5,
        )
    assert one.run(code="").status_code == 429
    with RemotePool([one.url], retries=1000) as pool:
        assert pool.run([Program("print(1)")])[0].stdout == "1\n"


class Foreign(ThreadingHTTPServer):
    """A server with SandboxFusion's shapes that knows no tests: it runs `code` and nothing else.

    answers: (status, body, headers) to give in place of running, one a request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Runner)
        self.answers, self.seen = [], []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Runner(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        status, value, headers = 200, None, {}
        if self.server.answers:
            status, value, headers = self.server.answers.pop(0)
        if value is None:
            value = self.ran(body)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def ran(self, body):
        done = subprocess.run(
            [sys.executable, "-I", "-c", body["code"]], capture_output=True, text=True
        )
        code = done.returncode
        run = {"status": "Finished", "execution_time": 0.1, "return_code": code}
        run |= {"stdout": done.stdout, "stderr": done.stderr}
        status = "Failed" if code else "Success"
        return {"status": status, "message": "", "compile_result": None, "run_result": run}


@pytest.fixture
def foreign():
    servers = [Foreign(), Foreign()]
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def test_tests_at_a_server_of_sandboxfusion(foreign):
    one = foreign[0]
    with RemotePool([one.url]) as pool:
        verdicts = pool.run(PROGRAMS[:2] + PROGRAMS[3:7])
    assert [v.status for v in verdicts] == [
        "passed", "failed", "passed", "failed", "passed", "failed",
    ]  # fmt: skip
    assert verdicts[0].stdout == "42\n"
    assert verdicts[1].exit_status == 3
    assert verdicts[2].stdout == ""
    assert verdicts[5].reason == "the tests did not end"
    with RemotePool([one.url]) as pool:
        said = pool.run([Program("print('said')\ndef f(x): return 2", tests="assert f(1) == 2")])
    assert (said[0].passed, said[0].stdout) == (True, "said\n")


def test_what_a_server_of_sandboxfusion_says_becomes_a_verdict(foreign):
    def result(**run):
        run = {"status": "Finished", "return_code": 1, "stdout": "", "stderr": ""} | run
        return {"status": "Failed", "message": "", "compile_result": None, "run_result": run}

    one = foreign[0]
    one.answers = [
        (200, result(status="TimeLimitExceeded", return_code=None), {}),
        (200, result(stderr="Traceback\nMemoryError"), {}),
        (200, result(return_code=-11), {}),
        (200, result() | {"run_result": None, "compile_result": {"return_code": 1}}, {}),
        (200, result(stderr="a\nValueError: b"), {}),
    ]
    with RemotePool([one.url], concurrency=1) as pool:
        verdicts = pool.run([Program("")] * 5)
    assert [v.status for v in verdicts] == ["timeout", "memory", "crashed", "failed", "failed"]
    assert [v.reason for v in verdicts[3:]] == ["it does not compile", "ValueError: b"]


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"detail": "x"}, {}),
        (429, {"error": "full"}, {"Retry-After": "0"}),
        (200, {"status": "SandboxError", "message": "no disk"}, {}),
        (200, b"not JSON", {}),
        (200, [1], {}),
        (502, b"<html>", {}),
    ],
)
def test_a_failure_is_tried_again_at_the_next_server(foreign, answer):
    one, other = foreign
    one.answers = [answer] * 9
    with RemotePool([one.url, other.url], retries=1) as pool:
        assert [v.stdout for v in pool.run([Program("print(1)")] * 4)] == ["1\n"] * 4
    assert len(one.seen) == 2
    one.answers = other.answers = [answer] * 99
    with RemotePool([one.url, other.url], retries=3) as pool:
        verdict = pool.run([Program("print(1)")])[0]
    assert verdict.status == "infra"
    assert verdict.reason.startswith("http://127.0.0.1:")


def test_a_dead_and_a_silent_server_are_infra(monkeypatch):
    with RemotePool(["http://127.0.0.1:9"], retries=2) as pool:
        verdict = pool.run([Program("print(1)")])[0]
    assert (verdict.status, "Connect" in verdict.reason) == ("infra", True)
    monkeypatch.setattr(remote, "_EXTRA", 0.1)
    silent = listen("127.0.0.1", 0)
    silent.listen()
    with silent, RemotePool([url_of(silent)], retries=0) as pool:
        verdict = pool.run([Program("", limits=Limits(wall_seconds=0.2))])[0]
    assert (verdict.status, "Timeout" in verdict.reason) == ("infra", True)


def test_an_endless_response_is_not_read(foreign, monkeypatch):
    monkeypatch.setattr(remote, "_LARGEST", 1000)
    foreign[0].answers = [(200, b"x" * 10_000, {})]
    with RemotePool([foreign[0].url], retries=0) as pool:
        assert "MiB" in pool.run([Program("")])[0].reason


@pytest.mark.parametrize("url", ["localhost:1", "ftp://a", "http://", "http://a/?key=1", "a b"])
def test_a_url_that_is_none(url):
    with pytest.raises(OpenQwenError, match="not the URL"):
        RemotePool([url])


def test_the_graders_use_the_servers_that_are_named(server, monkeypatch):
    reference = {"tests": "assert f(1) == 2", "entry": "f"}
    task = Task("t", [{"role": "user", "content": "f"}], "code", reference)
    answers = ["def f(x): return x + 1", "def f(x): return x"]
    monkeypatch.setenv("OPENQWEN_SANDBOX", server.url)
    with open_pool() as pool:
        assert isinstance(pool, RemotePool)
    assert [grade.passed for grade in grade_answers([task] * 2, answers)] == [True, False]
    monkeypatch.setenv("OPENQWEN_SANDBOX", "http://127.0.0.1:9")
    grades = grade_answers([task] * 2, answers)
    assert [grade.status for grade in grades] == ["infra", "infra"]
    monkeypatch.delenv("OPENQWEN_SANDBOX")
    with open_pool() as pool:
        assert isinstance(pool, Pool)


def test_the_command_serves_until_it_is_told_to_end():
    words = ["sandbox", "--serve", "--port", "0", "--workers", "1", "--tier", TIER]
    process = subprocess.Popen(
        [sys.executable, "-m", "openqwen.cli", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in process.stdout if "http://" in line)
        url = line.split()[-1]
        body = {"code": "print(1)", "language": "python"}
        assert httpx.post(f"{url}/run_code", json=body).json()["run_result"]["stdout"] == "1\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
