"""The annotation site under load: next task with fifteen annotators, export, memory.

    .venv/bin/python benchmarks/annotation.py --tasks 100000 --people 15 --seconds 60 --rankings 50000
    .venv/bin/python benchmarks/annotation.py --seconds 600 --rankings 1000    # memory

Starts `openqwen annotate` as a process of its own on a new project in a temporary folder, and prints
one line of JSON: seconds of the import, percentiles of POST /api/next and of an answer in
milliseconds once all have logged in, answers a second, the server's memory over time in MB, seconds
of an export of so many rankings. --database URL measures PostgreSQL.
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
from openqwen.instruct.collaborate.answers import check_complete
from openqwen.instruct.collaborate.events import LogEvent, record_all
from openqwen.instruct.collaborate.export import export_bytes
from openqwen.instruct.collaborate.read_tasks import import_file
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.support.files import write_jsonl
from openqwen.support.progress import progress

BLOCK = 500  # answers of one transaction
PASSWORD = "a long password"
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be"]


def make_tasks(count):
    """Tasks of about 1,300 characters."""
    rng = random.Random(0)
    for n in range(count):
        words = " ".join(rng.choices(WORDS, k=60))
        responses = [{"text": f"{r} {words}", "origin": {"model": f"m{r}"}} for r in range(4)]
        yield {"id": f"t{n}", "prompt": f"{n}: {words}", "responses": responses}


def annotator(url, token, seconds, times, logged_in):
    """One person: log in, wait for the others, then take a task, answer it, think."""
    with httpx.Client(base_url=url, timeout=60) as http:
        body = {"name": f"P{token[:8]}", "password": PASSWORD}
        me = http.post(f"/api/invitations/{token}/accept", json=body).raise_for_status().json()
        http.headers["X-CSRF-Token"] = me["csrf"]
        rng = random.Random(token)
        logged_in.wait()  # a password's hash takes 0.2 s of a CPU, by design
        end = time.monotonic() + seconds
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
        logged_in = threading.Barrier(len(tokens) + 1)
        given = (seconds, times, logged_in)
        crowd = [threading.Thread(target=annotator, args=(url, t, *given)) for t in tokens]
        for thread in crowd:
            thread.daemon = True
            thread.start()
        logged_in.wait(120)
        begun, sizes = time.monotonic(), []
        with progress("annotators", seconds, "seconds") as bar:
            while any(thread.is_alive() for thread in crowd):
                sizes.append(memory(process.pid))
                time.sleep(min(10, seconds / 5))
                done = min(time.monotonic() - begun, seconds)
                bar.advance(done - bar.done, answers=len(times["answer"]), mb=sizes[-1])
        if len(times["answer"]) < len(tokens):
            raise SystemExit("annotators failed: see the errors above")
        result["answers_per_second"] = round(len(times["answer"]) / seconds, 1)
        result["next_ms"] = percentiles(times["next"])
        result["answer_ms"] = percentiles(times["answer"])
        result["memory_mb"] = sizes
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def rank_many(site, tasks, count):
    """Answers to the last tasks, as an import records them: only to have something to export."""
    with site.database.write() as connection:
        person = accounts.add_person(connection, "Filler", "annotator", "human")
    rng = random.Random(1)
    with progress("rankings", count, "answers") as bar:
        for start in range(0, count, BLOCK):
            given = []
            for n in range(start, min(start + BLOCK, count)):
                order = rng.sample(range(4), 4)
                ranks = [[response] for response in rng.sample(range(4), 4)]
                new = {"answer": check_complete({"ranks": ranks}, 4, site.project), "slot": 0}
                task = f"t{tasks - 1 - n}"  # those that the people above have not reached
                given.append(LogEvent("answered", person, task, 1, order, new=new, seconds=1.0))
            with site.database.write() as connection:
                record_all(connection, given)
            bar.advance(len(given))


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
    if options.rankings + options.people * options.seconds / options.think > options.tasks:
        parser.error("there are too few tasks for these people and rankings")
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
        rank_many(site, options.tasks, options.rankings)
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
