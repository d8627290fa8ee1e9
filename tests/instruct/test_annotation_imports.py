"""Imports of every form, judges, the command, and databases that are damaged, full or read-only."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest
from annotation import make_tasks
from sqlalchemy import event, select
from test_annotation import check_replay, exported, state

from openqwen.engine import Output
from openqwen.instruct.collaborate.events import read_events
from openqwen.instruct.collaborate.export import write_exports
from openqwen.instruct.collaborate.judge_annotator import ranks_of, run_judge
from openqwen.instruct.collaborate.read_tasks import read_task
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.instruct.collaborate.tables import people
from openqwen.support.errors import OpenQwenError

ASKED = [{"role": "user", "content": "Q"}]
ARGILLA = {
    "id": "r1",
    "fields": {"instruction": "Q", "response1": "one", "response2": "two", "response3": "three"},
    "metadata": {"response2_model": "m2"},
    "suggestions": {},
    "responses": {
        "ranking": [
            {
                "value": ["response2", "response1", "response3"],
                "user_id": "u1",
                "status": "submitted",
            },
            {
                "value": [
                    {"value": "response1", "rank": 1},
                    {"value": "response3", "rank": 1},
                    {"value": "response2", "rank": 2},
                ],
                "user_id": "u2",
            },
        ],
        "comment": [{"value": "fine", "user_id": "u1"}],
    },
}
RANKER = {
    "id": 7,
    "data": {
        "prompt": "Q",
        "items": [{"id": "x", "title": "", "body": "one"}, {"id": "y", "title": "", "body": "two"}],
    },
    "annotations": [
        {
            "completed_by": {"id": 1, "email": "ann@example.org"},
            "was_cancelled": False,
            "result": [{"type": "ranker", "value": {"ranker": {"rank": ["y", "x"]}}}],
        },
        {
            "completed_by": 2,
            "was_cancelled": True,
            "result": [{"value": {"ranker": {"rank": ["x", "y"]}}}],
        },
    ],
}
# The columns of a ranker with <Bucket> tags, and its internal one of items in no bucket.
BUCKETS = RANKER | {
    "annotations": [
        {"completed_by": 4, "result": [{"type": "ranker", "value": {"ranker": columns}}]}
        for columns in ({"biased": ["y"], "relevant": ["x"]}, {"relevant": ["y"], "_": ["x"]})
    ]
}
PAIRWISE = {
    "id": 8,
    "data": {"prompt": "Q", "answer1": "one", "answer2": "two"},
    "annotations": [
        {"completed_by": 3, "result": [{"type": "pairwise", "value": {"selected": "right"}}]}
    ],
}


@pytest.mark.parametrize(
    ("record", "texts", "rankings"),
    [
        ({"prompt": "Q", "responses": ["one", "two"]}, ["one", "two"], []),
        ({"prompt": ASKED, "responses": [{"id": "0", "text": "one", "origin": {"model": "m"}}, {"text": "two"}]}, ["one", "two"], []),
        ({"instruction": "Q", "completions": [{"model": "m", "response": "one"}, {"model": "n", "response": "two"}]}, ["one", "two"], []),
        ({"prompt": "Q", "chosen": "one", "rejected": "two"}, ["one", "two"], []),
        ({"chosen": [*ASKED, {"role": "assistant", "content": "one"}], "rejected": [*ASKED, {"role": "assistant", "content": "two"}]}, ["one", "two"], []),
        ({"prompt": "Q", "response_a": "one", "response_b": "two"}, ["one", "two"], []),
        (ARGILLA, ["one", "two", "three"], [("u1", [[1], [0], [2]], ""), ("u2", [[0, 2], [1]], "")]),
        (RANKER, ["one", "two"], [("ann@example.org", [[1], [0]], "")]),
        (PAIRWISE, ["one", "two"], [("3", [[1], [0]], "")]),
        (BUCKETS, ["one", "two"], []),
    ],
)  # fmt: skip
def test_a_record_of_each_form_is_read(record, texts, rankings):
    task = read_task(record)
    assert task.body["prompt"] == ASKED
    assert [response["text"] for response in task.body["responses"]] == texts
    assert task.rankings == rankings


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Q"}, "no responses"),
        ({"prompt": "Q", "responses": ["one"]}, "2 to 26"),
        ({"prompt": "Q", "responses": ["one", "one"]}, "the same"),
        ({"prompt": "Q", "responses": ["one", " "]}, "empty"),
        ({"prompt": " ", "responses": ["one", "two"]}, "prompt is empty"),
        ({"responses": ["one", "two"]}, "prompt"),
        ({"prompt": "Q", "responses": ["one", 2]}, "neither a text"),
        ({"prompt": "Q", "responses": ["one", {"score": 1}]}, "no text"),
        ({"prompt": "Q", "responses": ["one", "two"], "priority": 10}, "priority"),
        ({"prompt": "Q", "responses": ["one", "two"], "gold": [[0], [2]]}, "0 to 1"),
    ],
)
def test_a_record_that_is_no_task_says_why(record, message):
    with pytest.raises((OpenQwenError, ValueError), match=message):
        read_task(record)


def test_earlier_answers_come_along_once_and_take_their_places(place):
    p = place(overlap=3)
    for _ in range(2):
        report = p.add([ARGILLA, RANKER, PAIRWISE])
    assert (report.same, report.answers) == (3, 0)
    ranks = {t["id"]: [a["ranks"] for a in t["answers"]] for t in exported(p.site, "ranks")}
    assert ranks == {"r1": [[[1], [0], [2]], [[0, 2], [1]]], "7": [[[1], [0]]], "8": [[[1], [0]]]}
    ann = p.person("Ann")
    while (task := ann.next()) is not None:
        ann.answer(task, [[r["slot"]] for r in task["responses"]])
    assert (
        p.person("Ben").ok("POST", "/api/next", {})["left"] == 1
    )  # beside the open one; r1 is full
    check_replay(p.site)


class Judge:
    """A generator: it prefers the longest response, but has no order for one task."""

    def __init__(self):
        self.prompts = []

    def generate(self, prompts, sampling=None, seeds=None, progress=None):
        self.prompts += prompts
        return [Output(self.rank(messages[0]["content"])) for messages in prompts]

    def rank(self, text):
        if "Question 1" in text:
            return "A > B, and C is odd: A > A > C"
        parts = text.partition("# Response ")[2].split("# Response ")
        slots = sorted(
            ((part[0], int(part.split("Response ")[1][0])) for part in parts), key=lambda s: -s[1]
        )
        return "I think.\n" + " > ".join(slot for slot, _ in slots)


def test_a_judge_is_one_more_annotator_and_is_left_out_of_p(place):
    p = place(overlap=1)
    p.add(make_tasks(5))
    judge = Judge()
    counts = run_judge(p.site.database, p.site.project, "judge", 100, judge)
    assert counts == {"answered": 4, "skipped": 1}
    assert "m1" not in judge.prompts[0][0]["content"]
    examples = {p[0]["content"].rpartition("form: ")[2] for p in judge.prompts}
    assert all(ranks_of(example, "ABC") for example in examples)
    assert len(examples) > 1  # a judge that copies it favours no place
    assert exported(p.site, "preferences") == []
    assert run_judge(p.site.database, p.site.project, "judge", 100, judge)["answered"] == 0
    owner = p.person("Olga", "owner")
    while (task := owner.next()) is not None:  # the judge took nobody's place
        text = sorted(task["responses"], key=lambda r: r["text"], reverse=True)
        owner.answer(task, [[r["slot"]] for r in text])
    assert len(exported(p.site, "preferences")) == 15
    numbers = owner.ok("GET", "/api/quality")
    assert numbers["alpha"]["why_code"] == "one_annotator"
    (kappa,) = numbers["kappa"]
    assert (kappa["value"], kappa["pairs"], kappa["tasks"]) == (1.0, 12, 4) or kappa[
        "value"
    ] is None
    with p.site.database.read() as connection:
        kinds = dict(connection.execute(select(people.c.name, people.c.kind)).all())
    assert kinds == {"judge (judge)": "model", "Olga": "human"}
    check_replay(p.site)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("B > A = C", [["B"], ["A", "C"]]),
        ("A > B > C. No: C>B>A", [["C"], ["B"], ["A"]]),
        ("A > B", None),
        ("A > B > C > C", None),
        ("", None),
        ("ABC > B > C", None),
    ],
)
def test_the_last_whole_order_of_an_answer_counts(text, ranks):
    assert ranks_of(text, "ABC") == ranks


def openqwen(*words, cwd):
    command = [sys.executable, "-m", "openqwen.cli", "annotate", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_command_makes_imports_and_exports_a_project(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, [ARGILLA, RANKER])))
    done = openqwen("work", "--import", "tasks.jsonl", "--export", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 tasks added" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"{name}.jsonl"
        for name in ("demonstrations", "events", "models", "pairs", "preferences", "ranks")
    ]
    lines = (tmp_path / "out" / "preferences.jsonl").read_text().splitlines()
    assert all(json.loads(line)["origin"]["method"] == "annotation" for line in lines)
    assert oct((tmp_path / "work" / "annotations.db").stat().st_mode)[-3:] == "600"
    (tmp_path / "work" / "project.yaml").write_text("id: p\noverlop: 3\n")
    done = openqwen("work", "--export", "out", cwd=tmp_path)
    assert (done.returncode, "overlap" in done.stderr) == (1, True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    done = openqwen("other", "--export", "out", cwd=tmp_path)
    assert (done.returncode, "not empty" in done.stderr) == (1, True)


def test_an_export_that_is_interrupted_leaves_the_old_files(place, tmp_path, monkeypatch):
    p = place(overlap=1)
    p.add(make_tasks(2))
    ann = p.person("Ann")
    ann.answer(ann.next(), [["A"], ["B"], ["C"]])
    out = tmp_path / "out"
    write_exports(p.site.database, p.site.project, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    from openqwen.instruct.collaborate import export

    def broken(connection, project):
        yield {"half": True}
        raise KeyboardInterrupt

    monkeypatch.setitem(export.EXPORTS, "preferences", broken)
    with pytest.raises(KeyboardInterrupt):
        write_exports(p.site.database, p.site.project, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_project_copied_while_it_runs_opens_with_all_acknowledged_answers(place, tmp_path):
    p = place(overlap=1)
    p.add(make_tasks(30))
    ann = p.person("Ann")
    for _ in range(10):
        ann.answer(ann.next(), [["A"], ["B"], ["C"]])
    shutil.copytree(p.folder, tmp_path / "copy")  # with the write-ahead log
    copy = Site(tmp_path / "copy", AnnotateConfig())
    assert state(copy) == state(p.site)
    check_replay(copy)
    copy.database.close()


def test_a_damaged_database_is_named_before_anything_is_written(place, tmp_path):
    p = place(overlap=1)
    p.add(make_tasks(200))
    p.site.database.close()
    path = p.folder / "annotations.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw = bytearray(path.read_bytes())
    raw[4096 * 3 : 4096 * 6] = os.urandom(4096 * 3)
    path.write_bytes(raw)
    with pytest.raises(OpenQwenError, match=r"damaged|malformed") as error:
        Site(p.folder, AnnotateConfig())
    assert "export of its events" in str(error.value)
    path.write_bytes(b"no database at all, but a text that is long enough" * 100)
    with pytest.raises(OpenQwenError, match="not a database"):
        Site(p.folder, AnnotateConfig())


def test_a_full_or_read_only_disk_loses_nothing_and_says_so(place):
    p = place(overlap=1)
    p.add(make_tasks(3))
    ann = p.person("Ann")
    task = ann.next()
    body = {
        "lease": task["lease"]["id"],
        "key": "key-12345678",
        "answer": {"ranks": [["A"], ["B"], ["C"]]},
    }
    path = f"/api/tasks/{task['id']}/answer"
    engine = p.site.database.engine
    engine.dispose()

    def limited(connection, _):  # what SQLite does on a full disk, without one
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(engine, "connect", limited)
    big = body | {
        "answer": body["answer"]
        | {"comment": "c" * 9_999, "demonstration": {"from": "A", "text": "d" * 90_000}}
    }
    answer = ann.send("POST", path, big)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage")
    assert answer.headers["retry-after"]
    event.remove(engine, "connect", limited)
    engine.dispose()

    def read_only(connection, _):
        connection.execute("PRAGMA query_only=1")

    event.listen(engine, "connect", read_only)
    assert ann.code("POST", path, body) == (503, "storage")
    event.remove(engine, "connect", read_only)
    engine.dispose()
    assert ann.ok("POST", path, big)["repeated"] is False
    with p.site.database.read() as connection:
        assert [e.kind for e in read_events(connection)].count("answered") == 1
    check_replay(p.site)
