"""The annotation site under load: next task with fifteen annotators, export, memory.

    .venv/bin/python benchmarks/annotation.py --tasks 100000 --people 15 --seconds 60 --rankings 50000

Starts `openqwen annotate` as a process of its own on a new project in a temporary folder, and prints
one line of JSON: seconds of the import, percentiles of POST /api/next and of an answer in
milliseconds, answers a second, the server's memory over time in MB, seconds of an export of so many
rankings. --database URL measures PostgreSQL.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import httpx
import numpy as np

from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.annotate import answer_event
from openqwen.instruct.collaborate.answers import SLOTS, AnswerBody, check_complete, stored
from openqwen.instruct.collaborate.events import loads
from openqwen.instruct.collaborate.export import export_bytes
from openqwen.instruct.collaborate.queue import lease_next
from openqwen.instruct.collaborate.read_tasks import import_file
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.instruct.collaborate.tables import people
from openqwen.support.files import write_jsonl

PASSWORD = "a long password"
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be"]


def make_tasks(count):
    """Tasks of about 1,300 characters."""
    rng = random.Random(0)
    for n in range(count):
        words = " ".join(rng.choices(WORDS, k=60))
        responses = [{"text": f"{r} {words}", "origin": {"model": f"m{r}"}} for r in range(4)]
        yield {"id": f"t{n}", "prompt": f"{n}: {words}", "responses": responses}


def annotator(url, token, seconds, times):
    """One person: take a task, answer it, think."""
    with httpx.Client(base_url=url, timeout=60) as http:
        body = {"name": f"P{token[:8]}", "password": PASSWORD}
        me = http.post(f"/api/invitations/{token}/accept", json=body).raise_for_status().json()
        http.headers["X-CSRF-Token"] = me["csrf"]
        rng, end = random.Random(token), time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.perf_counter()
            answer = http.post("/api/next", json={})
            times["next"].append(time.perf_counter() - begun)
            task = answer.raise_for_status().json()["task"]
            slots = [response["slot"] for response in task["responses"]]
            rng.shuffle(slots)
            sent = {"lease": task["lease"]["id"], "key": str(uuid.uuid4()), "seconds": 1}
            sent["answer"] = {"ranks": [[slot] for slot in slots]}
            begun = time.perf_counter()
            http.post(f"/api/tasks/{task['id']}/answer", json=sent).raise_for_status()
            times["answer"].append(time.perf_counter() - begun)
            time.sleep(rng.uniform(0, 2 * times["think"]))


def memory(pid):
    """Resident memory of a process in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def percentiles(values):
    """Of seconds, in milliseconds."""
    found = np.percentile(values, [50, 95, 99]) * 1000
    return {f"p{p}": round(float(v), 1) for p, v in zip((50, 95, 99), found)}


def serve(folder, database, tokens, seconds, think, result):
    """Run the server under the annotators."""
    port = 8377
    words = ["annotate", str(folder), "--port", str(port)]
    words += ["--database", database] if database else []
    process = subprocess.Popen(
        [sys.executable, "-m", "openqwen.cli", *words], stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/api/me")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        times = {"next": [], "answer": [], "think": think}
        crowd = [threading.Thread(target=annotator, args=(url, t, seconds, times)) for t in tokens]
        begun = time.monotonic()
        for thread in crowd:
            thread.start()
        sizes = []
        while any(thread.is_alive() for thread in crowd):
            sizes.append(memory(process.pid))
            time.sleep(min(10, seconds / 5))
        result["answers_per_second"] = round(len(times["answer"]) / (time.monotonic() - begun), 1)
        result["next_ms"], result["answer_ms"] = (
            percentiles(times["next"]),
            percentiles(times["answer"]),
        )
        result["memory_mb"] = sizes
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def rank_many(site, count):
    """Answers without HTTP, many in one transaction: only to have something to export."""
    with site.database.write() as connection:
        name = accounts.add_person(connection, "Filler", "annotator", "human")
    rng, done = random.Random(1), 0
    while done < count:
        with site.database.write() as connection:
            person = connection.execute(people.select().where(people.c.id == name)).one()
            for _ in range(min(500, count - done)):
                row = lease_next(connection, person, site.project, time.time())
                order = loads(row.order)
                slots = list(SLOTS[: len(order)])
                rng.shuffle(slots)
                body = AnswerBody(ranks=[[slot] for slot in slots])
                answer = check_complete(stored(body, order, site.project), len(order), site.project)
                answer_event(connection, row, answer, 1.0, None)
                done += 1


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--people", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--think", type=float, default=0.5, help="mean seconds between answers")
    parser.add_argument("--rankings", type=int, default=50_000)
    parser.add_argument("--database", default=None)
    options = parser.parse_args()
    result = {"tasks": options.tasks, "people": options.people, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "project")
        site = Site(folder, AnnotateConfig(database=options.database))
        write_jsonl(Path(place, "tasks.jsonl"), make_tasks(options.tasks))
        begun = time.monotonic()
        import_file(site.database, site.project, Path(place, "tasks.jsonl"))
        result["import_s"] = round(time.monotonic() - begun, 1)
        with site.database.write() as connection:
            tokens = [
                accounts.invite(connection, "annotator", 1, None)["token"]
                for _ in range(options.people)
            ]
        serve(folder, options.database, tokens, options.seconds, options.think, result)
        rank_many(site, options.rankings)
        for name in ("ranks", "preferences", "demonstrations"):
            begun = time.monotonic()
            lines = sum(
                chunk.count(b"\n") for chunk in export_bytes(site.database, site.project, name)
            )
            result[f"export_{name}"] = {
                "seconds": round(time.monotonic() - begun, 2),
                "records": lines,
            }
        begun = time.monotonic()
        site.quality.get()
        result["quality_s"] = round(time.monotonic() - begun, 2)
        site.database.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
