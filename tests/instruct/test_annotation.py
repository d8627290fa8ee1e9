"""The annotation site over HTTP: queue, drafts, answers, undo, review, imports, exports, replay."""

import random
import threading
import time

import pytest
from annotation import PASSWORD, Place, make_tasks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select

from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.events import read_events, rebuild
from openqwen.instruct.collaborate.export import EXPORTS
from openqwen.instruct.collaborate.tables import STATE, work
from openqwen.support.errors import OpenQwenError


def state(site):
    """Every row of the state tables."""
    with site.database.read() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(select(table)).all()))
            for table in STATE
        }


def check_replay(site):
    """The fold of the log equals the tables."""
    before = state(site)
    with site.database.write() as connection:
        rebuild(connection)
    assert state(site) == before
    with site.database.read() as connection:
        numbers = [e.seq for e in read_events(connection)]
    assert numbers == list(range(1, len(numbers) + 1))


def exported(site, name):
    with site.database.read() as connection:
        return list(EXPORTS[name](connection, site.project))


def test_an_answer_goes_from_the_page_to_the_export(place):
    p = place()
    p.add(make_tasks(1))
    ann, ben = p.person("Ann"), p.person("Ben")
    for person in (ann, ben):
        task = person.next()
        text = {r["slot"]: r["text"] for r in task["responses"]}
        slots = {t: s for s, t in text.items()}
        best, *rest = (slots[f"Response {r} to 0"] for r in (2, 0, 1))
        demonstration = {"from": best, "text": "Better"} if person is ann else None
        scores = {best: {"helpful": 5}}
        person.answer(task, [[best], rest], scores=scores, comment="c", demonstration=demonstration)
    assert ann.ok("POST", "/api/next", {})["reason"] == "none_left"
    (ranks,) = exported(p.site, "ranks")
    assert [answer["ranks"] for answer in ranks["answers"]] == [[[2], [0, 1]]] * 2
    assert ranks["responses"][0]["index"] == 2
    assert [answer["scores"] for answer in ranks["answers"]] == [{"2": {"helpful": 5.0}}] * 2
    pairs = {(q["a"], q["b"]): q for q in exported(p.site, "pairs")}
    assert (pairs[0, 2]["b_wins"], pairs[0, 2]["count"], pairs[0, 2]["margin"]) == (2, 2, -1)
    assert (pairs[0, 1]["ties"], pairs[0, 1]["margin"]) == (2, 0)
    chosen = [
        (q["chosen"][0]["content"], q["rejected"][0]["content"])
        for q in exported(p.site, "preferences")
    ]
    assert sorted(chosen) == [
        ("Response 2 to 0", "Response 0 to 0"),
        ("Response 2 to 0", "Response 1 to 0"),
    ]
    (d,) = exported(p.site, "demonstrations")
    assert [m["content"] for m in d["messages"]] == ["Question 0", "Better"]
    assert d["origin"]["response"] == {"model": "m2"}
    check_replay(p.site)


def test_the_page_sees_no_model_and_the_drawn_order_is_in_the_log(place):
    p = place(overlap=8)
    p.add(make_tasks(1, responses=6))
    orders = set()
    for n in range(8):
        answer = p.person(f"P{n}").send("POST", "/api/next", {})
        assert "m1" not in answer.text.replace("Response", "")
        orders.add(tuple(r["text"] for r in answer.json()["task"]["responses"]))
    assert len(orders) > 4
    with p.site.database.read() as connection:
        opened = [e for e in read_events(connection) if e.kind == "opened"]
    assert {tuple(f"Response {r} to 0" for r in e.order) for e in opened} == orders


def test_a_key_is_counted_once_and_a_second_window_is_told(place):
    p = place()
    p.add(make_tasks(2))
    ann = p.person("Ann")
    task = ann.next()
    ranks = [["A"], ["B"], ["C"]]
    first = ann.answer(task, ranks, "key-12345678")
    again = ann.answer(task, [["C"], ["B"], ["A"]], "key-12345678")
    assert (first["repeated"], again["repeated"], again["seq"]) == (False, True, first["seq"])
    body = {
        "lease": task["lease"]["id"],
        "key": "key-another-1",
        "answer": {"ranks": [["C", "B", "A"]]},
    }
    assert ann.code("POST", f"/api/tasks/{task['id']}/answer", body) == (409, "already_answered")
    with p.site.database.read() as connection:
        kinds = [e.kind for e in read_events(connection)]
        (copy,) = [e for e in read_events(connection) if e.kind == "refused_copy"]
    assert kinds.count("answered") == 1
    assert copy.new["answer"]["ranks"] == [[0, 1, 2]]
    check_replay(p.site)


def test_a_draft_comes_back_in_every_window_and_undo_brings_the_answer_back(place):
    p = place()
    p.add(make_tasks(2))
    ann = p.person("Ann")
    task = ann.next()
    path = f"/api/tasks/{task['id']}"
    body = {
        "lease": task["lease"]["id"],
        "answer": {"ranks": [["B"]], "comment": "half"},
        "seconds": 4,
    }
    ann.ok("PUT", f"{path}/draft", body)
    ann.ok("PUT", f"{path}/draft", body | {"answer": {"comment": "more"}})
    again = ann.next()
    assert (again["id"], again["responses"]) == (task["id"], task["responses"])
    assert again["draft"]["answer"] == {"ranks": [["B"]], "comment": "more"}
    ann.answer(again, [["C"], ["A", "B"]])
    assert ann.next()["id"] != task["id"]
    back = ann.ok("POST", f"{path}/reopen", {"key": "undo-123456"})["task"]
    assert back["draft"]["answer"]["ranks"] == [["C"], ["A", "B"]]
    assert ann.next()["id"] == task["id"]
    ann.answer(back, [["A"], ["B"], ["C"]])
    mine = ann.ok("GET", "/api/mine")["answers"]
    assert [(m["task"], m["status"]) for m in mine] == [(task["id"], "answered")]
    check_replay(p.site)


def test_a_skipped_task_goes_to_others_and_not_to_me(place):
    p = place(overlap=1)
    p.add(make_tasks(1))
    ann, ben = p.person("Ann"), p.person("Ben")
    task = ann.next()
    assert ben.ok("POST", "/api/next", {})["reason"] == "all_leased"
    body = {"lease": task["lease"]["id"], "key": "skip-123456", "reason": "I know no Latin"}
    ann.ok("POST", f"/api/tasks/{task['id']}/skip", body)
    assert ann.ok("POST", f"/api/tasks/{task['id']}/skip", body)["repeated"]
    assert ann.ok("POST", "/api/next", {})["reason"] == "none_left"
    assert ben.next()["id"] == task["id"]
    check_replay(p.site)


def test_a_lease_that_has_run_out_loses_the_place_but_no_answer(place, monkeypatch):
    p = place(overlap=1)
    p.add(make_tasks(1))
    ann, ben, cem = (p.person(name) for name in ("Ann", "Ben", "Cem"))
    task = ann.next()
    lease = task["lease"]["id"]
    ann.ok("PUT", "/api/tasks/t0/draft", {"lease": lease, "answer": {"comment": "kept"}})
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 31 * 60)
    other = ben.next()
    ben.answer(other, [["A"], ["B"], ["C"]])
    assert ann.answer(task, [["C"], ["B"], ["A"]])["extra"] is True
    assert cem.ok("POST", "/api/next", {})["task"] is None
    assert len(exported(p.site, "ranks")[0]["answers"]) == 2
    check_replay(p.site)


def test_a_clock_that_jumps_changes_no_order(place, monkeypatch):
    p = place(overlap=1)
    p.add(make_tasks(3))
    ann, ben = p.person("Ann"), p.person("Ben")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10**9)  # forward by 30 years
    assert ann.send("POST", "/api/next", {}).status_code == 401  # the session has run out
    ann.csrf = None
    ann.ok("POST", "/api/login", {"name": "Ann", "password": PASSWORD})
    held = ann.next()
    monkeypatch.setattr(time, "time", real)  # and back: the lease would last for 30 years
    ben.csrf = None
    ben.ok("POST", "/api/login", {"name": "Ben", "password": PASSWORD})
    ids = set()
    for _ in range(3):
        task = ben.next()
        ids.add(task["id"])
        ben.answer(task, [["A"], ["B"], ["C"]])
    assert held["id"] in ids
    check_replay(p.site)


def test_fifteen_at_once_never_hold_the_same_place(place):
    p = place(overlap=3)
    p.add(make_tasks(20))
    crowd = [p.person(f"P{n}") for n in range(15)]
    given, failures = [], []

    def work_on(person, seed):
        rng = random.Random(seed)
        try:
            while (task := person.next()) is not None:
                slots = [r["slot"] for r in task["responses"]]
                rng.shuffle(slots)
                person.answer(task, [[slot] for slot in slots])
                given.append((task["id"], person.id))
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work_on, args=(v, n)) for n, v in enumerate(crowd)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(given) == len(set(given)) == 60
    with p.site.database.read() as connection:
        rows = connection.execute(select(work.c.task, work.c.slot)).all()
    assert sorted(rows) == sorted((f"t{n}", s) for n in range(20) for s in range(3))
    check_replay(p.site)


def test_priorities_come_first_and_gold_tasks_are_everybodys(place):
    p = place(overlap=1, gold_share=0.5)
    records = make_tasks(6)
    records[4]["priority"] = 5
    records[5]["gold"] = [[0], [1], [2]]
    p.add(records)
    seen = {}
    for name in ("Ann", "Ben"):
        person, seen[name] = p.person(name), []
        while (task := person.next()) is not None:
            seen[name].append(task["id"])
            text = sorted(task["responses"], key=lambda r: r["text"])
            person.answer(task, [[r["slot"]] for r in text])
            if len(seen[name]) == 4 and name == "Ann":
                break
    assert next(t for t in seen["Ann"] if t != "t5") == "t4"
    assert "t5" in seen["Ben"]
    assert sorted(t for t in seen["Ann"] + seen["Ben"] if t != "t5") == [
        "t0",
        "t1",
        "t2",
        "t3",
        "t4",
    ]
    numbers = p.person("Olga", "owner").ok("GET", "/api/quality")
    gold = {q["name"]: q["gold"] for q in numbers["people"]}
    assert gold["Ben"] == {"right": 3, "of": 3}
    assert numbers["alpha"]["why_code"] == "no_variation" or numbers["alpha"]["value"] == 1
    check_replay(p.site)


def test_only_the_best_few_are_ranked(place):
    p = place(best=2, overlap=1)
    p.add(make_tasks(1, responses=4))
    ann = p.person("Ann")
    task = ann.next()
    body = {"lease": task["lease"]["id"], "key": "key-12345678", "answer": {"ranks": [["A"]]}}
    assert ann.code("POST", "/api/tasks/t0/answer", body) == (400, "invalid_answer")
    ann.answer(task, [["A"], ["B"]])
    pairs = exported(p.site, "pairs")
    assert len(pairs) == 5  # the two that were left out were not compared


@pytest.mark.parametrize(
    ("answer", "param"),
    [
        ({"ranks": [["A"], ["B"]]}, "answer.ranks"),
        ({"ranks": [["A"], ["B"], ["C"], ["D"]]}, "answer.ranks"),
        ({"ranks": [["A"], ["B"], ["C", "A"]]}, "answer.ranks"),
        ({"ranks": [["A", "B", "C"]], "scores": {"A": {"helpful": 6}}}, "answer.scores"),
        ({"ranks": [["A", "B", "C"]], "scores": {"A": {"kind": 1}}}, "answer.scores"),
        ({"ranks": [["A", "B", "C"]], "flags": {"A": ["rude"]}}, "answer.flags"),
        ({"ranks": [["A", "B", "C"]], "flags": {"Z": ["unsafe"]}}, "answer.flags"),
        ({"ranks": [["A", "B", "C"]], "comment": "c" * 10_001}, "answer.comment"),
        (
            {"ranks": [["A", "B", "C"]], "demonstration": {"from": "A", "text": " "}},
            "answer.demonstration",
        ),
        ({"ranks": [["A", "B", "C"]], "stars": 5}, "answer.stars"),
    ],
)
def test_an_answer_that_says_something_impossible_is_refused(place, answer, param):
    p = place()
    p.add(make_tasks(1))
    ann = p.person("Ann")
    task = ann.next()
    body = {"lease": task["lease"]["id"], "key": "key-12345678", "answer": answer}
    refused = ann.send("POST", "/api/tasks/t0/answer", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_nobody_sees_answers_before_their_own_and_who_looked_gets_no_task(place):
    p = place(overlap=3)
    p.add(make_tasks(2))
    ann, rita = p.person("Ann"), p.person("Rita", "reviewer")
    ann.answer(ann.next(), [["A"], ["B"], ["C"]])
    assert ann.code("GET", "/api/tasks/t0") == (403, "not_allowed")
    task = rita.next()
    assert rita.code("GET", f"/api/tasks/{task['id']}") == (403, "answer_first")
    other = "t1" if task["id"] == "t0" else "t0"
    rita.ok("GET", f"/api/tasks/{other}")
    rita.answer(task, [["A"], ["B"], ["C"]])
    assert rita.next() is None
    assert len(rita.ok("GET", "/api/tasks/t0")["answers"]) == 2
    check_replay(p.site)


def test_a_refused_answer_returns_to_its_person_and_leaves_the_export(place):
    p = place(overlap=1)
    p.add(make_tasks(1))
    ann, rita = p.person("Ann"), p.person("Rita", "reviewer")
    ann.answer(ann.next(), [["A"], ["B"], ["C"]])
    path = f"/api/tasks/t0/answers/{ann.id}/verdict"
    rita.ok("POST", path, {"accepted": False, "comment": "Look again", "key": "verdict-1"})
    assert exported(p.site, "preferences") == []
    task = ann.next()
    assert (task["id"], task["comment"]) == ("t0", "Look again")
    assert task["draft"]["answer"]["ranks"] == [["A"], ["B"], ["C"]]
    ann.answer(task, [["C"], ["B"], ["A"]])
    rita.ok("POST", path, {"accepted": True, "comment": "", "key": "verdict-2"})
    assert ann.ok("GET", "/api/mine")["answers"][0]["verdict"]["accepted"] is True
    assert len(exported(p.site, "preferences")) == 3
    check_replay(p.site)


def test_a_task_whose_content_changes_is_asked_anew(place):
    p = place(overlap=1)
    p.add(make_tasks(2))
    ann, ben = p.person("Ann"), p.person("Ben")
    first = ann.next()
    ann.answer(first, [["A"], ["B"], ["C"]])
    held = ben.next()
    changed = [task | {"prompt": "Other"} for task in make_tasks(2)]
    report = p.add(changed)
    assert (report.added, report.changed, report.same) == (0, 2, 0)
    assert (lambda r: (r.changed, r.same))(p.add(changed)) == (0, 2)
    ben.answer(held, [["A"], ["B"], ["C"]])  # to the earlier version: kept, not counted
    assert exported(p.site, "ranks") == []
    assert {ann.next()["version"], ben.next()["version"]} == {2}
    check_replay(p.site)


def test_a_demonstration_needs_its_minimum_and_no_barred_flag(place):
    p = place(overlap=1, minimum="{helpful: 4}")
    p.add(make_tasks(5))
    ann = p.person("Ann")
    wanted = [  # fields of the answer, whether the best becomes a demonstration
        ({"scores": {"A": {"helpful": 4}}}, True),
        ({"scores": {"A": {"helpful": 3}}}, False),
        ({}, False),
        ({"scores": {"A": {"helpful": 5}}, "flags": {"A": ["unsafe"]}}, False),
        ({"scores": {"A": {"helpful": 5}}, "none_good": True}, False),
    ]
    good = set()
    for fields, is_good in wanted:
        task = ann.next()
        ann.answer(task, [["A"], ["B", "C"]], **fields)
        good |= {task["id"]} if is_good else set()
    found = exported(p.site, "demonstrations")
    assert {d["origin"]["task"] for d in found} == good
    assert all(d["origin"]["edited"] is False for d in found)


RANKS = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.integers(0, k - 1), min_size=k, max_size=k).map(lambda tiers: (k, tiers))
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(RANKS, st.integers(0, 10**6)), min_size=1, max_size=6), st.integers(1, 3))
def test_drawn_rankings_equal_the_export(tmp_path_factory, drawn, people):
    """Everybody ranks every task at random, ties too; the export says so to the last tie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "_COST", {"n": 16, "r": 1, "p": 1})
        check_drawn(tmp_path_factory, drawn, people)


def check_drawn(tmp_path_factory, drawn, people):
    p = Place(tmp_path_factory.mktemp("drawn") / "p", overlap=people)
    p.add([make_tasks(1, k, start=n)[0] for n, ((k, _), _) in enumerate(drawn)])
    wanted = {}
    for number in range(people):
        person = p.person(f"P{number}")
        while (task := person.next()) is not None:
            (k, tiers), seed = drawn[int(task["id"][1:])]
            tiers = random.Random(seed + number).sample(tiers, k)
            groups = {}
            for response, tier in enumerate(tiers):
                groups.setdefault(tier, []).append(response)
            ranks = [groups[tier] for tier in sorted(groups)]
            slot = {int(r["text"].split()[1]): r["slot"] for r in task["responses"]}
            person.answer(task, [[slot[r] for r in tier] for tier in ranks])
            wanted[task["id"], person.id] = ranks
    found = {
        (task["id"], answer["person"]): answer["ranks"]
        for task in exported(p.site, "ranks")
        for answer in task["answers"]
    }
    assert found == wanted
    check_replay(p.site)
    p.site.database.close()


def test_one_annotator_is_told_that_there_is_no_agreement(place):
    p = place()
    p.add(make_tasks(2))
    owner = p.person("Olga", "owner")
    owner.answer(owner.next(), [["A"], ["B"], ["C"]])
    alpha = owner.ok("GET", "/api/quality")["alpha"]
    assert (alpha["value"], alpha["why_code"]) == (None, "one_annotator")


def test_an_empty_project_says_so(place):
    p = place()
    owner = p.person("Olga", "owner")
    assert owner.ok("POST", "/api/next", {})["reason"] == "none_left"
    numbers = owner.ok("GET", "/api/quality")
    assert numbers["progress"]["tasks"] == 0
    for name in EXPORTS:
        assert owner.send("GET", f"/api/export/{name}").status_code == 200
    with pytest.raises(OpenQwenError, match="no task"):
        p.add([])


def test_the_next_task_is_found_by_indices_whatever_a_person_has_done(place):
    """No query of `next` reads a whole table: 100,000 tasks must not make it slow."""
    p = place(overlap=2, gold_share=0.5)
    records = make_tasks(40)
    records[39]["gold"] = [[0], [1], [2]]
    p.add(records)
    ann, ben = p.person("Ann"), p.person("Ben")
    ben.next()
    for _ in range(20):
        ann.answer(ann.next(), [["A"], ["B"], ["C"]])
    seen = []
    engine = p.site.database.engine
    listen = lambda c, cursor, statement, values, *rest: seen.append((statement, values))
    event.listen(engine, "before_cursor_execute", listen)
    ann.next()
    event.remove(engine, "before_cursor_execute", listen)
    read = [(s, v) for s, v in seen if s.startswith("SELECT")]
    assert len(read) > 8
    with p.site.database.read() as connection:
        for statement, values in read:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
            for row in plan:
                step = row[3]
                whole = step.startswith("SCAN") and "INDEX tasks_waiting" not in step
                # Few leases are open at a time: their index may be read whole.
                small = "work_leases" in step or "anon" in step or "CONSTANT" in step
                assert not whole or small, (step, statement)


def test_who_skipped_or_lost_a_task_and_then_looked_at_it_cannot_answer_it(place, monkeypatch):
    p = place(overlap=1)
    p.add(make_tasks(2))
    rita = p.person("Rita", "reviewer")
    task = rita.next()
    body = {"lease": task["lease"]["id"], "key": "skip-123456", "reason": ""}
    rita.ok("POST", f"/api/tasks/{task['id']}/skip", body)
    rita.ok("GET", f"/api/tasks/{task['id']}")
    answer = {"lease": task["lease"]["id"], "key": "key-12345678"}
    answer["answer"] = {"ranks": [["A"], ["B"], ["C"]]}
    path = f"/api/tasks/{task['id']}"
    assert rita.code("POST", f"{path}/answer", answer) == (409, "already_answered")
    assert rita.code("POST", f"{path}/reopen", {"key": "key-reopen-1"}) == (404, "not_found")
    assert rita.next()["id"] != task["id"]
    check_replay(p.site)


def test_a_draft_after_the_lease_takes_the_place_again(place, monkeypatch):
    p = place(overlap=1)
    p.add(make_tasks(1))
    ann, ben, cem = (p.person(name) for name in ("Ann", "Ben", "Cem"))
    task = ann.next()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 31 * 60)
    ben.answer(ben.next(), [["A"], ["B"], ["C"]])  # Ann's lease ends; Ben takes the place
    draft = {"lease": task["lease"]["id"], "answer": {"comment": "late"}}
    lease = ann.ok("PUT", "/api/tasks/t0/draft", draft)["lease"]
    assert lease["seconds"] > 60
    assert ann.next()["draft"]["answer"] == {"comment": "late"}
    assert cem.ok("POST", "/api/next", {})["reason"] == "none_left"
    check_replay(p.site)
