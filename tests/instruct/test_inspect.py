"""The data page's index, filters and routes, on files of every form, broken and hostile ones too."""

import asyncio
import gzip
import json
import os
import random

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openqwen.corpus.documents import write_documents
from openqwen.http.server import gated
from openqwen.instruct.inspect import index as index_module
from openqwen.instruct.inspect.app import DataPage, application, page_files
from openqwen.instruct.inspect.describe import describe, facets, grade, shown, tags
from openqwen.instruct.inspect.settings import InspectConfig
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_jsonl
from openqwen.tasks import Task
from openqwen.tasks.files import write_tasks

D = {
    "messages": [{"role": "user", "content": "Sort"}, {"role": "assistant", "content": "a b c"}],
    "origin": {"method": "rejection", "model": "tiny", "kind": "words", "score": 0.5},
}
P = {
    "prompt": [{"role": "user", "content": "Add 1 and 2"}],
    "chosen": [{"role": "assistant", "content": "It is 3"}],
    "rejected": [{"role": "assistant", "content": "It is 4"}],
    "origin": {"method": "execution", "tags": ["sum", "easy"]},
}
TASK = {"id": "t", "prompt": P["prompt"], "grader": "math", "reference": {"answer": "3"}}
DOCUMENT = {"id": "d", "text": "床前明月光", "source": "poems", "language": "zh", "meta": {}}


class Client:
    """The page's server, asked without a network."""

    def __init__(self, path, tmp_path, keys=(), **options):
        self.config = InspectConfig(cache=tmp_path / "cache", **options)
        self.page = DataPage(str(path), self.config)
        self.app = gated(application(self.page), self.config, list(keys), page_files().paths)

    def send(self, method, path, **options):
        async def go():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.request(method, path, **options)

        return asyncio.run(go())

    def get(self, path, **params):
        answer = self.send("GET", f"/api/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def numbers(self, **params):
        return [record["number"] for record in self.get("records", **params)["records"]]

    def fault(self, path, **params):
        answer = self.send("GET", f"/api/{path}", params=params)
        return answer.status_code, answer.json()["error"]["message"]


@pytest.fixture
def client(tmp_path):
    def make(records, name="data.jsonl", **options):
        path = tmp_path / name
        if isinstance(records, bytes):
            path.write_bytes(records)
        else:
            write_jsonl(path, records)
        return Client(path, tmp_path, **options)

    return make


@pytest.mark.parametrize(
    ("record", "form", "said"),
    [
        (D, "demonstration", ["Sort", "a b c"]),
        (P, "preference", ["Add 1 and 2", "It is 3", "It is 4"]),
        (TASK, "task", ["Add 1 and 2"]),
        (DOCUMENT, "document", ["床前明月光"]),
        ({"prompt": P["prompt"]}, "prompt", ["Add 1 and 2"]),
        ({"instruction": "a", "input": "b", "output": "c"}, "demonstration", ["a\nb", "c"]),
        ({"question": "a", "answer": "b"}, "demonstration", ["a", "b"]),
        ({"prompt": "a", "completion": "b"}, "demonstration", ["a", "b"]),
        ({"conversations": [{"from": "human", "value": "a"}]}, "demonstration", ["a"]),
        ({"chosen": "q? yes", "rejected": "q? no"}, "preference", ["q?", " yes", " no"]),
        ({"item": "i", "reason": "right: no", "text": "x"}, "quarantined", ["x"]),
        ({"messages": 3}, "other", []),
        ({"messages": [{"role": "user", "content": {}}], "text": 7}, "other", []),
        ({"grader": "math", "prompt": None}, "other", []),
        ({}, "other", []),
    ],
)
def test_every_form_is_known(record, form, said):
    parts = describe(record)
    assert (parts.form, list(parts.texts())) == (form, said)
    assert json.loads(json.dumps(shown(record)))["form"] == form


def test_where_the_facets_tags_and_grades_come_from():
    record = {"origin": {"method": "m", "task": "k", "tags": ["a", {"tag": "b"}, 3, "a"]}}
    assert facets(record, "other")["method"] == "m"
    assert facets(record, "other")["kind"] == "k"
    assert tags(record) == ["a", "b"]
    assert facets({"meta": '{"model": "x"}', "source": 5}, "document")["model"] == "x"
    assert facets({"reason": "tests: they fail on 3"}, "other")["reason"] == "tests"
    assert grade({"grade": {"score": 0.5}}) == 0.5
    assert grade({"passed": True, "origin": {"score": 2}}) == 1.0
    assert grade({"score": float("1e308"), "origin": {"reward": -2}}) == -2
    assert grade({"score": "high"}) is None


def test_decisions_of_the_corpus_are_filtered_by_step_and_rule():
    row = {"id": "a", "step": "near", "rule": "near-duplicate", "why": "like b", "kept": False}
    assert (describe(row).form, describe(row).text) == ("decision", "near-duplicate: like b")
    found = facets(row, "decision")
    assert (found["kind"], found["reason"]) == ("near", "near-duplicate")


def test_filters_and_their_counts(client):
    page = client([D, P, TASK, DOCUMENT, D | {"origin": {}}])
    assert page.numbers() == [1, 2, 3, 4, 5]
    assert page.numbers(form="task") == [3]
    assert page.numbers(method="") == [3, 4, 5]
    assert page.numbers(method="execution", tag="sum") == [2]
    assert page.numbers(tag="no such") == []
    assert page.numbers(grade_from=0.4, grade_to=0.5) == [1]
    assert page.numbers(characters_to=5) == [4]
    assert page.numbers(sort="longest")[0] == 2
    assert page.numbers(sort="best")[0] == page.numbers(sort="worst")[0] == 1
    assert page.numbers(offset=1, limit=2) == [2, 3]
    found = page.get("statistics")
    assert found["counts"]["form"]["values"][0] == ["demonstration", 2]
    assert found["counts"]["tag"]["values"] == [["easy", 1], ["sum", 1]]
    assert sum(found["characters"]["counts"]) == found["total"] == 5
    assert found["grade"]["quartiles"] == [0.5] * 5
    assert page.get("statistics", method="nobody")["total"] == 0
    first = page.get("records")["records"][0]
    assert (first["method"], first["grade"], first["preview"]) == ("rejection", 0.5, "Sort")


def test_duplicates_are_found_by_text_and_by_prompt(client):
    again = json.loads(json.dumps(D).replace("a b c", " A  b c"))
    other = json.loads(json.dumps(D).replace("a b c", "another answer"))
    page = client([D, again, other, DOCUMENT])
    assert page.numbers(duplicates="text") == [1, 2]
    assert page.numbers(duplicates="later") == [2]
    assert page.numbers(duplicates="prompt") == [1, 2, 3]
    assert page.numbers(duplicates="unique") == [3, 4]
    assert page.get("statistics")["duplicates"] == {"text": 2, "prompt": 3, "later": 1, "unique": 2}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("sort", [1]), ("SOR", [1]), ("ort", []), ('"is 3"', [2]), ('"3 is"', []), ("is it 3", [2]),
        ("明月", [4]), ('"月光"', [4]), ("光月", []), ("t-1", [3]), ("NOT OR AND", []),
        ('" 3', [2]), ("3) OR (1", []), ("3) (is", [2]), ("add -2 *", [2, 3]),
    ],
)  # fmt: skip
def test_search(client, text, numbers):
    page = client([D, P, TASK | {"id": "t-1"}, DOCUMENT])
    assert page.numbers(text=text) == numbers


def test_search_for_nothing_that_can_be_found(client):
    page = client([D])
    assert page.fault("records", text="== !") == (400, "Search for letters or digits.")
    assert page.fault("records", text="x" * 1001)[0] == 400
    assert page.numbers(text="  ") == [1]


def test_one_record_and_its_neighbours_under_the_filters(client):
    page = client([D, P, D | {"id": "other"}, TASK])
    record = page.get("records/3", form="demonstration")
    assert (record["previous"], record["next"], record["place"]) == (1, None, 1)
    assert [m["text"] for m in record["messages"]] == ["Sort", "a b c"]
    assert page.get("records/1", sort="longest")["next"] == 3
    assert page.get("records/2")["rejected"]["text"] == "It is 4"
    assert page.fault("records/5") == (404, "There is no record 5, only 1 to 4.")
    for number in ("0", "-1", "x", "9" * 30, "..%2f..%2fetc%2fpasswd"):
        assert page.fault(f"records/{number}")[0] in (400, 404)
    raw = page.send("GET", "/api/records/2/raw")
    assert raw.json() == P
    assert raw.headers["content-disposition"].startswith("attachment")
    assert raw.headers["content-type"] == "application/octet-stream"


def test_walking_by_next_gives_the_list_in_every_order(client):
    source = random.Random(0)
    records = [
        {"text": "x" * source.randrange(4), "score": source.choice([1, 2, None])} for _ in range(30)
    ]
    page = client(records)
    for order in ("number", "longest", "shortest", "best", "worst"):
        listed = page.numbers(sort=order)
        walked = [listed[0]]
        while (after := page.get(f"records/{walked[-1]}", sort=order))["next"] is not None:
            assert after["place"] == len(walked) - 1
            walked.append(after["next"])
        assert walked == listed
        assert page.get(f"records/{listed[3]}", sort=order)["previous"] == listed[2]


def test_all_files_that_the_readers_know(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in (D, P)).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.rstrip())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    (tmp_path / "d.json").write_text(json.dumps([D, P]))
    names = ("messages", "prompt", "chosen", "rejected", "origin")
    rows = [{name: record.get(name) for name in names} for record in (D, P)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    (tmp_path / "f.json").write_bytes(lines)
    for path in sorted(tmp_path.glob("*.*")):
        page = Client(path, tmp_path)
        assert page.get("source")["records"] == 2, path
        first, second = (page.get(f"records/{n}") for n in (1, 2))
        assert (first["form"], second["chosen"]["text"]) == ("demonstration", "It is 3")
        raw = page.send("GET", "/api/records/2/raw").json()
        assert {name: raw[name] for name in ("prompt", "chosen")} == {
            name: P[name] for name in ("prompt", "chosen")
        }


def test_a_folder_with_documents_of_the_corpus_stage_and_tasks(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_documents(folder / "train.parquet", [DOCUMENT | {"meta": {"profile": "text"}}] * 3)
    write_documents(folder / "heldout.parquet", [DOCUMENT | {"id": "held"}])
    write_tasks(folder / "tasks.jsonl", [Task("t", P["prompt"], "math", {"answer": "3"})])
    (folder / "corpus.json").write_text("{}")
    (folder / ".aside.jsonl").write_text("{}\n")
    page = Client(folder, tmp_path)
    assert page.get("source")["records"] == 5
    assert page.get("records/1")["file"].endswith("heldout.parquet")
    assert json.loads(page.get("records/3")["fields"]["text"])["meta"] == '{"profile": "text"}'
    assert page.numbers(form="task") == [2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenQwenError, match="no data files"):
        Client(tmp_path / "empty", tmp_path)


def test_broken_lines_are_shown_and_not_lost(client):
    deep = b"[" * 5000 + b"]" * 5000
    page = client(
        b'{"text": "a"}\n\n{"text": \n[1]\n{"text": "\xff"}\n{"text": NaN}\n{"a": '
        + deep
        + b'}\r\n{"text": "\\ud800"}\n{"text": "last"}'
    )
    faults = [record["fault"] for record in page.get("records")["records"]]
    assert [bool(fault) for fault in faults] == [False] + [True] * 6 + [False]
    assert "not an object" in faults[2]
    assert page.get("records/2")["raw"] == '{"text": '
    assert page.get("records/2")["line"] == 3
    assert page.get("records/4")["raw"] == '{"text": "\ufffd"}'
    assert page.get("records/8")["text"]["text"] == "last"
    assert page.numbers(form="broken") == [2, 3, 4, 5, 6, 7]


def test_a_record_of_50_megabytes(client):
    text = "word " * (10 << 20)
    page = client([DOCUMENT, {"text": text, "more": ["y" * 300_000]}, D])
    answer = page.send("GET", "/api/records/2")
    assert len(answer.content) < 500_000
    assert answer.json()["text"]["characters"] == len(text)
    assert answer.json()["text"]["cut"]
    assert len(page.send("GET", "/api/records/2/raw").content) > len(text)
    assert page.get("records/3")["form"] == "demonstration"


def test_a_line_that_is_too_long_is_never_read_whole(client, monkeypatch):
    monkeypatch.setattr(index_module, "_BEGINNING", 100)
    line = json.dumps({"text": "x" * 5000}).encode()
    for name, packed in (("a.jsonl", lambda b: b), ("a.jsonl.gz", gzip.compress)):
        data = b'{"text": "before"}\n' + line + b"\n" + b'{"text": "after"}\n' + line
        page = client(packed(data), name, longest=1000)
        record = page.get("records/2")
        assert "--longest" in record["fault"]
        assert record["raw"] == line[:100].decode()
        assert page.get("records/3")["text"]["text"] == "after"
        assert page.get("source")["records"] == 4


def test_a_cut_archive_shows_what_came_before(client):
    source = random.Random(0)
    lines = "".join(json.dumps({"text": source.randbytes(40).hex()}) + "\n" for _ in range(40_000))
    page = client(gzip.compress(lines.encode())[:-100_000], "a.jsonl.gz")
    count = page.get("source")["records"]
    assert 10 < count < 40_000
    assert "cannot be read on" in page.get(f"records/{count}")["fault"]
    assert page.get("records/10")["form"] == "document"


def test_a_file_that_grows_changes_or_vanishes(client, tmp_path):
    page = client([D, P])
    path = tmp_path / "data.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps(TASK) + "\n")
    assert page.get("source")["changed"] == "grown"
    assert page.get("records/2")["form"] == "preference"
    assert page.send("POST", "/api/read-again", json={}).json()["records"] == 3
    assert page.get("source")["changed"] == ""
    write_jsonl(path, [P, D, TASK])
    os.utime(path, ns=(1, 1))
    assert page.get("source")["changed"] == "changed"
    status, said = page.fault("records/1")
    assert (status, "another record" in said) == (409, True)
    path.unlink()
    assert page.get("source")["changed"] == "gone"
    assert page.fault("records/1")[0] == 409
    assert page.numbers() == [1, 2, 3]
    assert page.send("POST", "/api/read-again", json={}).status_code == 400
    assert page.numbers() == [1, 2, 3]


def test_reading_again_takes_a_body_of_json(client):
    page = client([D])
    for options in ({"content": "{}", "headers": {"origin": "http://evil"}}, {"content": b"x"}):
        assert page.send("POST", "/api/read-again", **options).status_code == 400


def test_the_index_is_made_once_and_never_found_half_made(client, tmp_path, monkeypatch):
    made = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda *a: (made.append(1), build(*a)))
    client([D])
    Client(tmp_path / "data.jsonl", tmp_path)
    assert len(made) == 1
    write_jsonl(tmp_path / "data.jsonl", [D, D])

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module._Builder, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Client(tmp_path / "data.jsonl", tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    old = next((tmp_path / "cache").iterdir())
    os.utime(old, (0, 0))
    monkeypatch.undo()
    Client(tmp_path / "data.jsonl", tmp_path)
    assert old not in list((tmp_path / "cache").iterdir())


def test_keys_hosts_methods_and_policy(client):
    page = client([D], keys=["secret"])
    assert page.send("GET", "/api/source").status_code == 401
    assert page.send("GET", "/api/records/1/raw").status_code == 401
    allowed = page.send("GET", "/api/source", headers={"authorization": "Bearer secret"})
    assert allowed.status_code == 200
    opened = page.send("GET", "/")
    assert "script-src 'self'" in opened.headers["content-security-policy"]
    page = client([D])
    assert page.send("GET", "/api/source", headers={"host": "evil.example"}).status_code == 403
    assert page.send("GET", "/api/read-again").status_code == 405
    assert page.fault("records", bogus="1")[0] == 400
    assert page.fault("records", sort="number; DROP TABLE records")[0] == 400
    assert page.numbers(method="' OR 1=1 --") == []


def test_a_slow_query_ends(client):
    page = client([{"text": f"word{n}"} for n in range(3000)], query_seconds=1e-9)
    status, said = page.fault("statistics")
    assert (status, "took more than" in said) == (503, True)


def test_many_records_with_the_same_text_are_counted_quickly(client):
    page = client([DOCUMENT] * 20_000)
    assert page.get("statistics")["duplicates"]["later"] == 19_999


def test_the_index_agrees_with_the_file(client):
    """Every record lies where the index says, also behind blank lines and all kinds of ends."""
    source = random.Random(1)
    texts = [
        "".join(source.choices("aé床\u2028\u0085 \\n", k=source.randrange(60))) for _ in range(300)
    ]
    lines = [json.dumps({"text": text}, ensure_ascii=source.random() < 0.5) for text in texts]
    data = "".join(line + source.choice(["\n", "\r\n", "\n\n", " \n"]) for line in lines)
    page = client(data.encode())
    raw = [page.send("GET", f"/api/records/{n + 1}/raw").json() for n in range(len(texts))]
    assert [record["text"] for record in raw] == texts
