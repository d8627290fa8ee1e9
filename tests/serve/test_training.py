"""What a trainer needs of the server: paused, resumed, given new weights, and every token says
which made it.
"""

import json
import subprocess
import sys
import threading

import pytest
from serving import save

from openqwen.model import Qwen2


def test_weights_change_while_answers_are_made(start, tiny, tokenizer, tmp_path):
    save(Qwen2, tmp_path / "3", tokenizer, seed=5)
    (tmp_path / "4").mkdir()
    server = start(tiny, "--weights", tmp_path)
    body = {
        "prompt": "x",
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
    }
    old = server.http.post("/v1/completions", json=body).json()["choices"][0]
    frames, some = [], threading.Event()

    def read():
        with server.http.stream(
            "POST", "/v1/completions", json=body | {"stream": True}
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    frames.append(json.loads(line[6:])["choices"][0])
                if len(frames) > 20:
                    some.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert some.wait(30)
    assert server.http.post("/pause").json()["paused"]
    assert server.http.get("/health").json()["status"] == "paused"
    assert server.http.post("/update_weights", json={"version": 3}).json() == {"version": 3}
    assert server.http.post("/update_weights", json={"version": 9}).status_code == 404
    assert server.http.post("/update_weights", json={"version": 4}).status_code == 400
    assert not server.http.post("/resume").json()["paused"]
    reading.join()
    versions = [version for frame in frames for version in frame["token_versions"]]
    ids = [token for frame in frames for token in frame["token_ids"]]
    change = versions.index(3)
    assert versions == [0] * change + [3] * (400 - change)
    assert ids[:change] == old["token_ids"][:change]
    assert ids != old["token_ids"]
    new = server.http.post("/v1/completions", json=body).json()
    assert new["choices"][0]["token_versions"] == [3] * 400
    assert new["system_fingerprint"].endswith("-3")
    fresh = start(tmp_path / "3").http.post("/v1/completions", json=body).json()
    assert fresh["choices"][0]["token_ids"] == new["choices"][0]["token_ids"]
    assert server.metric("openqwen:weights_version") == 3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_are_served_and_changed(start, tiny, tokenizer, tmp_path, kind):
    new = save(Qwen2, tmp_path / "1", tokenizer, seed=5)
    server = start(tiny, "--quantize", kind, "--weights", tmp_path, "--engine.cache", "int8")
    assert f"; {kind}; " in server.log
    body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    old = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert server.http.post("/update_weights", json={"version": 1}).json() == {"version": 1}
    text = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text != old
    fresh = start(new, "--quantize", kind, "--engine.cache", "int8")
    assert fresh.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == text


def test_a_missing_library_is_named():
    code = (
        "import sys; sys.modules['fastapi'] = None; from openqwen.cli import main; "
        "sys.exit(main(['serve', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Serving needs the library fastapi" in done.stderr
    assert "openqwen[serve]" in done.stderr
