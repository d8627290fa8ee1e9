"""A project's site, asked over HTTP without a network, and people who visit it."""

import asyncio
import uuid

import httpx
import pytest

pytest.importorskip("sqlalchemy", reason="the annotation site needs openqwen[annotate]")

from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.app import gated
from openqwen.instruct.collaborate.read_tasks import import_file
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.support.files import write_jsonl

PASSWORD = "a good password"
PROJECT = """\
id: {id}
title: Test
overlap: {overlap}
gold_share: {gold_share}
best: {best}
ties: {ties}
demonstrations: {demonstrations}
reveal: {reveal}
lease_minutes: 30
criteria: [{{id: helpful, low: 1, high: 5}}]
flags: [{{id: unsafe}}]
minimum: {minimum}
barred: [unsafe]
"""
DEFAULTS = {
    "id": "p1",
    "overlap": 2,
    "gold_share": 0,
    "best": "null",
    "ties": "true",
    "demonstrations": "optional",
    "reveal": "false",
    "minimum": "{}",
}


def make_tasks(count, responses=3, start=0):
    return [
        {
            "id": f"t{n}",
            "prompt": f"Question {n}",
            "responses": [
                {"text": f"Response {r} to {n}", "origin": {"model": f"m{r}"}}
                for r in range(responses)
            ],
        }
        for n in range(start, start + count)
    ]


class Visitor:
    """A browser: it keeps cookies and sends the CSRF token."""

    def __init__(self, app, address="127.0.0.1"):
        self.csrf = None
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 1))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.cookies = self.http.cookies
        self.loop = asyncio.new_event_loop()

    def send(self, method, path, json=None, headers=None, **options):
        sent = {"X-CSRF-Token": self.csrf} if self.csrf else {}
        sent |= headers or {}
        request = self.http.request(method, path, json=json, headers=sent, **options)
        return self.loop.run_until_complete(request)

    def ok(self, method, path, json=None, **options):
        answer = self.send(method, path, json, **options)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        found = answer.json()
        if "csrf" in found:
            self.csrf = found["csrf"]
        return found

    def code(self, method, path, json=None, **options):
        answer = self.send(method, path, json, **options)
        assert answer.status_code >= 400, answer.text
        return answer.status_code, answer.json()["error"]["code"]

    def accept(self, token, name):
        me = self.ok(
            "POST", f"/api/invitations/{token}/accept", {"name": name, "password": PASSWORD}
        )
        self.id = me["person"]["id"]
        return self

    def next(self):
        return self.ok("POST", "/api/next", {})["task"]

    def answer(self, task, ranks, key=None, seconds=3.0, **fields):
        body = {"lease": task["lease"]["id"], "key": key or str(uuid.uuid4()), "seconds": seconds}
        body["answer"] = {"ranks": ranks, **fields}
        return self.ok("POST", f"/api/tasks/{task['id']}/answer", body)


class Place:
    """A project in a folder, served."""

    def __init__(self, folder, database=None, **settings):
        folder.mkdir(exist_ok=True)
        file = folder / "project.yaml"
        if not file.exists():
            file.write_text(PROJECT.format(**DEFAULTS | settings))
        self.folder = folder
        self.site = Site(folder, AnnotateConfig(database=database))
        self.app = gated(self.site)
        self.owner = None

    def add(self, records, name="tasks.jsonl"):
        path = self.folder.parent / name
        write_jsonl(path, records)
        return import_file(self.site.database, self.site.project, path)

    def person(self, name, role="annotator"):
        with self.site.database.write() as connection:
            token = accounts.invite(connection, role, 1, None)["token"]
        return Visitor(self.app).accept(token, name)
