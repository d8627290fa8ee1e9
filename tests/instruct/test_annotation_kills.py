"""The server is killed (kill -9) again and again under ten annotators: no answer is lost or doubled."""

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections import Counter

import httpx
import pytest
from annotation import DEFAULTS, PROJECT, make_tasks
from postgres import new_database, server

from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.app import annotate
from openqwen.instruct.collaborate.events import read_events
from openqwen.instruct.collaborate.read_tasks import import_file
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.support.files import write_jsonl

KILLS = 20
PEOPLE = 10


class KilledServer:
    """`openqwen annotate` as a process, on one port, started again after each kill.

    Its processes are forked from one that has loaded the code, so that a start is quick.
    """

    def __init__(self, folder, database):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments = (str(folder), AnnotateConfig(port=self.port, database=database))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([annotate.__module__])

    def start(self):
        self.process = self.context.Process(target=annotate, args=self.arguments)
        self.process.start()
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.is_alive(), "the server did not start"
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError("the server did not answer")

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


class Annotator(threading.Thread):
    """Answers until it is told to stop; sends again, with the same key, whatever went wrong."""

    def __init__(self, url, cookies, csrf, stop):
        super().__init__(daemon=True)
        self.url, self.cookies, self.csrf, self.stop = url, cookies, csrf, stop
        self.done = 0
        self.sent, self.again, self.failure = {}, 0, None

    def run(self):
        try:
            headers = {"X-CSRF-Token": self.csrf}
            with httpx.Client(
                base_url=self.url, cookies=self.cookies, headers=headers, timeout=10
            ) as self.http:
                self.work()
        except Exception as error:
            self.failure = error

    def work(self):
        rng = random.Random(self.csrf)
        while not self.stop.is_set():
            task = self.post("/api/next", {})["task"]
            if task is None:
                return
            slots = [response["slot"] for response in task["responses"]]
            rng.shuffle(slots)
            ranks = [slots] if rng.random() < 0.2 else [[slots[0]], slots[1:]]
            numbers = {r["slot"]: int(r["text"].split()[1]) for r in task["responses"]}
            key = str(uuid.uuid4())
            self.sent[key] = (task["id"], [sorted(numbers[s] for s in tier) for tier in ranks])
            body = {
                "lease": task["lease"]["id"],
                "key": key,
                "seconds": 1,
                "answer": {"ranks": ranks},
            }
            self.post(f"/api/tasks/{task['id']}/answer", body)
            self.done += 1

    def post(self, path, body):
        while True:
            try:
                answer = self.http.post(path, json=body)
            except httpx.TransportError:
                self.again += 1
                time.sleep(0.05)
                continue
            if answer.status_code in (429, 503):
                time.sleep(0.1)
                continue
            assert answer.status_code == 200, (path, answer.text)
            return answer.json()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_killed_twenty_times_nothing_is_lost_and_nothing_counted_twice(tmp_path, kind):
    if kind == "sqlite":
        check(tmp_path, None)
    else:
        with server() as folder:  # with fsync, as it is by default
            check(tmp_path, new_database(folder, "kills"))


def check(tmp_path, database):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "project.yaml").write_text(PROJECT.format(**DEFAULTS | {"overlap": 3}))
    site = Site(folder, AnnotateConfig(database=database))
    write_jsonl(tmp_path / "tasks.jsonl", make_tasks(4_000))
    import_file(site.database, site.project, tmp_path / "tasks.jsonl")
    visitors = []  # logged in already: a password's hash takes longer than a server lives here
    with site.database.write() as connection:
        for n in range(PEOPLE):
            person = accounts.add_person(connection, f"P{n}", "annotator", "human")
            token = accounts.start_session(connection, person, 24)
            csrf = accounts.find_session(connection, token).csrf
            visitors.append(({site.cookie: token}, csrf))
    running, stop = KilledServer(folder, database), threading.Event()
    running.start()
    crowd = [Annotator(running.url, *visitor, stop) for visitor in visitors]
    for annotator in crowd:
        annotator.start()
    rng = random.Random(0)
    for _ in range(KILLS):
        enough = sum(annotator.done for annotator in crowd) + 10
        end = time.monotonic() + 60
        while sum(annotator.done for annotator in crowd) < enough and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        running.kill()
        running.start()
    time.sleep(1)
    stop.set()
    for annotator in crowd:
        annotator.join(60)
    running.kill()
    assert [annotator.failure for annotator in crowd] == [None] * PEOPLE
    assert sum(annotator.again for annotator in crowd) >= KILLS, "the kills hit nobody"

    with site.database.read() as connection:
        events = list(read_events(connection))
    answered = [event for event in events if event.kind == "answered"]
    found = {event.key: (event.task, event.new["answer"]["ranks"]) for event in answered}
    sent = {key: value for annotator in crowd for key, value in annotator.sent.items()}
    assert found == sent, "an answer was lost, changed or never sent"
    assert len(answered) == len(found) > 5 * KILLS
    each = Counter((event.task, event.person) for event in answered)
    assert max(each.values()) == 1
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    places = Counter((event.task, event.new["slot"]) for event in answered)
    assert max(places.values()) == 1

    from test_annotation import check_replay, exported

    check_replay(site)
    ranks = {
        (t["id"], a["person"]): a["ranks"] for t in exported(site, "ranks") for a in t["answers"]
    }
    assert len(ranks) == len(answered)
    print(json.dumps({"answers": len(answered), "sent again": sum(a.again for a in crowd)}))
    site.database.close()
