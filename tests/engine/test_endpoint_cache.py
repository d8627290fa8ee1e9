"""`Endpoint`'s cache and its arguments."""

import math
import os
import subprocess
import sys
import time

import pytest

from hostile import completion, status
from openqwen.engine import Endpoint, Sampling, endpoint
from openqwen.support.errors import OpenQwenError


def texts(outputs):
    return [output.text for output in outputs]


def test_cached_answers_are_not_asked_again(server, tmp_path):
    def respond(handler, body):
        handler.say(200, completion(f"{body['prompt']} {len(server.seen)}"))

    server.respond = respond
    drawn = Sampling(temperature=1.0)
    model = Endpoint(server.url, "m", concurrency=1, cache=tmp_path / "new" / "cache")
    assert texts(model.generate(["a", "b"])) == ["a 1", "b 2"]
    assert texts(model.generate(["b", "a"])) == ["b 2", "a 1"]  # greedy: the place does not matter
    assert texts(model.generate(["a"], drawn)) == ["a 3"]
    assert texts(model.generate(["a"], drawn, seeds=[5])) == ["a 4"]
    assert texts(model.generate(["a", "a"], drawn, seeds=[5, 0])) == ["a 4", "a 3"]
    other = Endpoint(server.url, "other", cache=model.cache)
    assert texts(other.generate(["a"])) == ["a 5"]
    for file in model.cache.glob("*.json"):
        file.write_text(file.read_text()[:-9])  # damaged
    assert texts(model.generate(["a"])) == ["a 6"]
    assert texts(model.generate(["a"])) == ["a 6"]
    assert not [path for path in model.cache.iterdir() if path.suffix != ".json"]


def test_the_cache_outlives_a_kill(server, tmp_path):
    def respond(handler, body):
        if body["prompt"] == "last":
            time.sleep(20)
        handler.say(200, completion(body["prompt"]))

    server.respond = respond
    prompts = [*map(str, range(20)), "last"]
    code = (
        "from openqwen.engine import Endpoint\n"
        f"model = Endpoint({server.url!r}, 'm', concurrency=4, cache={str(tmp_path)!r})\n"
        f"model.generate({prompts})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while len(list(tmp_path.glob("*.json"))) < 20:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    server.respond = lambda handler, body: handler.say(200, completion(body["prompt"]))
    server.seen.clear()
    assert texts(Endpoint(server.url, "m", cache=tmp_path).generate(prompts)) == prompts
    assert [body["prompt"] for _, body in server.seen] == ["last"]


def test_a_full_disk_and_a_file_in_the_way(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OpenQwenError, match="cache folder cannot be made"):
        Endpoint(server.url, "m", cache=tmp_path / "file")

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    model = Endpoint(server.url, "m", cache=tmp_path)
    monkeypatch.setattr(endpoint.json, "dump", full)
    with pytest.raises(OpenQwenError, match="no space left"):
        model.generate(["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000/v1", "localhost:8000", "ftp://host/v1", "http://", "http:///v1"),
        *("http://a b/v1", "http://user:hidden@host/v1", "http://host/v1?key=hidden", None),
        "http://host/v1/chat/completions",
    ],
)
def test_urls_that_cannot_be_used(url):
    with pytest.raises(OpenQwenError, match="where: Endpoint, url") as caught:
        Endpoint(url, "m")
    assert "hidden" not in str(caught.value)


def test_a_slash_at_the_end_is_no_matter(server):
    assert texts(Endpoint(server.url + "/", "m").generate(["a"])) == ["yes"]
    assert server.seen[0][0] == "/v1/completions"


@pytest.mark.parametrize(
    "options",
    [{"model": ""}, {"concurrency": 0}, {"timeout": 0}, {"timeout": math.nan}, {"retries": -1}],
)
def test_arguments_out_of_range(options):
    with pytest.raises(OpenQwenError, match=f"{next(iter(options))} cannot be"):
        Endpoint(**{"url": "http://host/v1", "model": "m"} | options)


def test_the_key_is_sent_and_never_shown(server, monkeypatch, tmp_path, capsys, caplog):
    caplog.set_level("DEBUG")
    key = "sk-hidden"
    echo = status(401, f"Incorrect API key provided: {key}")
    server.script = [echo]
    model = Endpoint(server.url, "m", api_key=key, cache=tmp_path)
    with pytest.raises(OpenQwenError, match=r"401.*provided: ") as caught:
        model.generate(["a"])
    model.generate(["a"])
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {key}"] * 2
    shown = [str(caught.value), repr(model), caplog.text, *capsys.readouterr()]
    shown += [path.name + path.read_text() for path in tmp_path.iterdir()]
    assert not [text for text in shown if key in text]
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    Endpoint(server.url, "m").generate(["a"])
    assert server.headers[-1]["Authorization"] == "Bearer from-environment"
    Endpoint(server.url, "m", api_key="").generate(["a"])
    assert "Authorization" not in server.headers[-1]
    with pytest.raises(OpenQwenError, match="The key holds") as caught:
        Endpoint(server.url, "m", api_key=f"{key}\r\nX: y")
    assert key not in str(caught.value)


def test_the_import_loads_no_torch():
    code = "import sys; from openqwen.engine import Endpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
