"""Hub ids: a cache laid out as the real one, a server that answers as the real one does, and what
goes wrong.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"words",
}


def ask(sources, home, **environment):
    """What `local` gives or says of each, in a process of its own: the library reads its
    environment on import.
    """
    code = (
        "import sys; from openqwen.support.hub import local; from openqwen.support.errors import "
        "OpenQwenError\n"
        "for source in sys.argv[1:]:\n"
        "    try: print(local(source), end='\\0')\n"
        "    except OpenQwenError as error: print(error, end='\\0')"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    command = [sys.executable, "-c", code, *sources]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=home, env=variables, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.fixture
def cache(tmp_path):
    """A repository as `hf download` leaves it: blobs, a snapshot of links to them, and the branch's
    commit.
    """
    repository = tmp_path / "hub" / "models--Qwen--Tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    for number, (name, data) in enumerate(FILES.items()):
        (repository / "blobs" / str(number)).write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_what_was_fetched_before_is_found_without_a_network(cache):
    snapshot = str(cache / "hub" / "models--Qwen--Tiny" / "snapshots" / COMMIT)
    assert ask(["Qwen/Tiny", f"Qwen/Tiny@{COMMIT}", "Qwen/Tiny@main"], cache) == [snapshot] * 3


def test_a_path_that_exists_is_never_an_id(cache):
    (cache / "Qwen" / "Tiny").mkdir(parents=True)
    never = ["tiny", "/no/where", "./no/where", "../no/where", "a/b/c", "a/b.gguf/"]
    assert ask(["Qwen/Tiny", *never], cache) == ["Qwen/Tiny", *(str(Path(path)) for path in never)]


def test_offline_and_not_in_the_cache_or_never_an_id(cache):
    absent = ["Qwen/Other", "Qwen/Tiny@other"]
    *said, refused = ask([*absent, "a--b/c"], cache)
    for source, text in zip(absent, said):
        assert f"There is no path '{source}'" in text
        assert "HF_HUB_OFFLINE" in text
    assert "cannot be downloaded" in refused


@pytest.fixture
def hub():
    """(address, answers): a server that gives each path its (status, headers, body), as the hub's
    API does.
    """
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers.get(
                self.path.partition("?")[0], answers.get("*", (404, {}, b""))
            )
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def json_answer(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def test_only_the_files_of_a_checkpoint_are_fetched(tmp_path, hub):
    address, answers = hub
    api = "/api/models/Qwen/Tiny"
    siblings = [{"rfilename": name} for name in FILES]
    info = json_answer(
        {"id": "Qwen/Tiny", "modelId": "Qwen/Tiny", "sha": COMMIT, "siblings": siblings}
    )
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": name}
        for name, data in FILES.items()
    ]
    answers |= {f"{api}/revision/main": info, f"{api}/revision/{COMMIT}": info, api: info}
    answers |= {f"{api}/tree/{COMMIT}": json_answer(tree), f"{api}/tree/main": json_answer(tree)}
    for name, data in FILES.items():
        answers[f"/Qwen/Tiny/resolve/{COMMIT}/{name}"] = (
            200,
            {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT},
            data,
        )
    folder = Path(*ask(["Qwen/Tiny"], tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=address))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert ask(["Qwen/Tiny"], tmp_path) == [str(folder)]


REFUSALS = [
    (401, "RepoNotFound", "no such repository"),
    (404, "RepoNotFound", "no such repository"),
    (404, "RevisionNotFound", "has no revision 'v9'"),
    (403, "GatedRepo", "accepted its terms"),
    (418, "", "cannot be"),
]


def test_what_the_hub_refuses_is_said(tmp_path, hub):
    address, answers = hub
    for number, (status, code, _) in enumerate(REFUSALS):
        headers = {"X-Error-Code": code} if code else {}
        answers[f"/api/models/Qwen/Tiny{number}/revision/v9"] = status, headers, b""
    sources = [f"Qwen/Tiny{number}@v9" for number in range(len(REFUSALS))]
    said = ask(sources, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
    for source, text, (_, _, told) in zip(sources, said, REFUSALS):
        assert told in text
        assert source.partition("@")[0] in text


def test_a_server_that_is_not_there(tmp_path):
    [said] = ask(["Qwen/Tiny"], tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in said
