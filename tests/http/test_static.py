"""Files of a page: types, the policy that keeps other code out, and the tag that spares a body."""

import pytest
from fastapi import FastAPI

from openqwen.http.gate import Gate
from openqwen.http.static import PageFiles


@pytest.fixture
def app(tmp_path):
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("let x;")
    (tmp_path / "secret.py").write_text("no")
    app = FastAPI()
    files = PageFiles(tmp_path)
    files.install(app)
    assert files.paths == {"/", "/app.js"}
    return Gate(app, ["key"], ["localhost"], files.paths, 100, 1.0)


def test_files_and_their_headers(ask, app):
    response = ask(app, "GET", "/")
    assert (response.text, response.headers["content-type"]) == (
        "<p>page</p>",
        "text/html; charset=utf-8",
    )
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-cache"
    assert ask(app, "GET", "/app.js").headers["content-type"].startswith("text/javascript")
    for path in ("/secret.py", "/index.html"):
        assert ask(app, "GET", path, headers={"x-api-key": "key"}).status_code == 404


def test_an_unchanged_file_is_not_sent_again(ask, app):
    tag = ask(app, "GET", "/").headers["etag"]
    for known in (tag, f'"other", {tag}', "*"):
        again = ask(app, "GET", "/", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert ask(app, "GET", "/", headers={"if-none-match": '"other"'}).status_code == 200
    assert ask(app, "GET", "/app.js").headers["etag"] != tag
