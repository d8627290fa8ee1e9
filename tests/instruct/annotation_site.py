"""An annotation site in a thread, and people who use it in Chromium, for tests of its pages."""

import asyncio
import json
import threading
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from openqwen.http.server import listen, open_url, uvicorn_server
from openqwen.instruct.collaborate.accounts import invite_first_owner
from openqwen.instruct.collaborate.app import gated
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site

PASSWORD = "a long password"
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
SETTINGS = {
    "title": "Capitals",
    "guidelines": "# What is good\n\n- **Correct** first.\n- Then short.",
    "overlap": 2,
    "criteria": [{"id": "helpful", "name": "Helpful", "low": 1, "high": 5}],
    "flags": [{"id": "unsafe", "name": "Unsafe"}],
}


def task(name, count=3, prompt=None, text="Answer"):
    """A task whose responses name themselves: `t1 response 0`."""
    prompt = prompt or f"Question {name}"
    responses = [
        {"id": str(n), "text": f"{text} ({name} response {n})", "origin": {"model": f"model-{n}"}}
        for n in range(count)
    ]
    return {"id": name, "prompt": [{"role": "user", "content": prompt}], "responses": responses}


class LiveSite:
    """A project that is served. owner: a client with the owner's session."""

    def __init__(self, folder, tasks, **settings):
        folder.mkdir()
        given = {"id": "tested", **SETTINGS, **settings}
        (folder / "project.yaml").write_text(yaml.safe_dump(given))
        self.site = Site(folder, AnnotateConfig(port=0))
        self.listener = listen("127.0.0.1", 0)
        self.url = open_url(self.listener)
        self.server = uvicorn_server(gated(self.site), 5.0, 1.0)
        run = lambda: asyncio.run(self.server.serve([self.listener]))
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        with self.site.database.write() as connection:
            token = invite_first_owner(connection)
        self.owner = self.join(token, "Owner")
        lines = "".join(json.dumps(one) + "\n" for one in tasks)
        report = self.post("import?name=tasks.jsonl", content=lines.encode())
        assert report["added"] == len(tasks), report

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.site.database.close()

    def join(self, link, name):
        """A client of a new person."""
        client = httpx.Client(base_url=self.url + "/api/", timeout=30)
        path = f"invitations/{link.rpartition('/')[2]}/accept"
        answer = client.post(path, json={"name": name, "password": PASSWORD})
        assert answer.status_code == 200, answer.text
        client.headers["X-CSRF-Token"] = answer.json()["csrf"]
        return client

    def post(self, path, body=None, client=None, content=None):
        client = client or self.owner
        kind = {"Content-Type": "application/octet-stream"} if content is not None else {}
        given = {"content": content} if content is not None else {"json": body or {}}
        answer = client.post(path, headers=kind, **given)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path, client=None):
        answer = (client or self.owner).get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def invite(self, role="annotator"):
        return self.post("invitations", {"role": role, "days": 7})["link"]

    def export(self, kind):
        answer = self.owner.get(f"export/{kind}")
        assert answer.status_code == 200, answer.text
        return [json.loads(line) for line in answer.text.splitlines()]

    def answers(self):
        """(person's id, task) → tiers of response numbers, by the events."""
        found = {}
        for event in self.export("events"):
            if event["kind"] == "answered":
                place = (event["person"], event["task"])
                found.setdefault(place, []).append(event["new"]["answer"])
        return found

    def visitor(self, browser, name, role="annotator", **options):
        """A page of a new person, logged in; its context closes with `page.context.close()`."""
        client = self.join(self.invite(role), name)
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        context.set_default_timeout(15_000)
        context.add_cookies(
            [
                {"name": cookie.name, "value": cookie.value, "url": self.url}
                for cookie in client.cookies.jar
            ]
        )
        page = context.new_page()
        page.person = self.get("me", client)["person"]["id"]
        page.client = client
        return page


def watched(page, site):
    """Faults of a page: what it throws, breaks of its policy, requests to other servers."""
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None,
    )
    host = urlsplit(site.url).netloc
    page.on(
        "request",
        lambda request: (
            faults.append(request.url) if urlsplit(request.url).netloc not in (host, "") else None
        ),
    )
    return faults


@pytest.fixture
def live(tmp_path):
    """A function that serves tasks under settings."""
    sites = []

    def start(tasks, **settings):
        sites.append(LiveSite(tmp_path / f"project{len(sites)}", tasks, **settings))
        return sites[-1]

    yield start
    for site in sites:
        site.close()


@pytest.fixture
def visit(chromium):
    """A function that lets a person visit a site; no page may throw, run a text, or ask others."""
    pages = []

    def start(site, name="Ada", role="annotator", **options):
        page = site.visitor(chromium, name, role, **options)
        pages.append((page, watched(page, site)))
        page.goto(site.url)
        page.locator("#main h1").wait_for()
        return page

    yield start
    for page, faults in pages:
        assert faults == []
        assert not page.evaluate("window.hacked")
        page.context.close()


def new_task(page):
    """The number of responses of the task that is shown."""
    page.locator(".card").first.wait_for()
    return page.locator(".card").count()


def place(page, letter, number):
    card = page.get_by_label(f"Response {letter}", exact=True)
    card.get_by_role("radio", name=f"Place {number}", exact=True).click()


def submitted(page):
    """Submit, and wait until the server has the answer."""
    with page.expect_response(lambda response: response.url.endswith("/answer")) as caught:
        page.locator("#submit").click()
    assert caught.value.status == 200, caught.value.text()
