"""Attacks on the annotation site over HTTP: refused, recorded, and nothing leaks."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from annotation import PASSWORD, Visitor, make_tasks
from sqlalchemy import select

from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.events import read_events
from openqwen.instruct.collaborate.routes import application
from openqwen.instruct.collaborate.tables import credentials, invitations, sessions

EVIL = "<script>alert(1)</script>'; DROP TABLE events; -- \u0000 ${7*7} {{7*7}} ../../etc/passwd"


def events(p):
    with p.site.database.read() as connection:
        return list(read_events(connection))


def paths(p):
    """Every route of the API, with names in place of its parameters."""
    found = []
    for route in application(p.site).routes:
        for method in getattr(route, "methods", ()) or ():
            if route.path.startswith("/api/") and method != "HEAD":
                path = route.path
                for name in ("task", "answer", "person", "invitation", "name", "token"):
                    path = path.replace("{" + name + "}", "x")
                found.append((method, path))
    return found


OPEN = {"/api/login", "/api/invitations/x", "/api/invitations/x/accept"}


def test_every_route_wants_a_session_and_a_forged_one_is_refused(place):
    p = place()
    assert len(paths(p)) > 20
    for cookie in (None, "forged", "' OR 1=1 --", ""):
        visitor = Visitor(p.app)
        if cookie:
            visitor.cookies.set(p.site.cookie, cookie)
        for method, path in paths(p):
            if path in OPEN and method != "DELETE":
                continue
            body = {} if method in ("POST", "PUT") else None
            answer = visitor.send(method, path, body)
            assert answer.status_code == 401, (method, path, answer.text)


def test_every_change_wants_the_token_and_the_own_origin(place):
    p = place()
    owner = p.person("Olga", "owner")
    real = owner.csrf
    before = len(events(p))
    for method, path in paths(p):
        if method == "GET" or (path in OPEN and method == "POST"):
            continue
        for csrf, headers in (
            (None, {}),
            ("wrong", {}),
            (real, {"Origin": "http://evil.example"}),
            (real, {"Origin": "null"}),
            (real, {"Origin": "http://localhost.evil.example"}),
        ):
            owner.csrf = csrf
            status, code = owner.code(method, path, {}, headers=headers)
            assert (status, code) in ((403, "csrf"), (403, "wrong_origin")), (method, path, code)
    assert len(events(p)) == before
    for path in ("/api/login", "/api/invitations/x/accept"):
        body = {"name": "Olga", "password": PASSWORD}
        headers = {"Origin": "http://evil.example"}
        assert owner.code("POST", path, body, headers=headers) == (403, "wrong_origin")


def test_a_form_of_another_site_cannot_send_json(place):
    p = place()
    visitor = Visitor(p.app)
    raw = json.dumps({"name": "a", "password": "b"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind, "Origin": "http://localhost"}
        assert visitor.send("POST", "/api/login", content=raw, headers=headers).status_code == 400


def test_roles_are_kept(place):
    p = place()
    ann, rita = p.person("Ann"), p.person("Rita", "reviewer")
    owners = ["/api/people", "/api/invitations", "/api/events", "/api/export/events"]
    for path in owners:
        assert ann.code("GET", path) == (403, "not_allowed")
        assert rita.code("GET", path) == (403, "not_allowed")
    for path in ("/api/quality", "/api/tasks", "/api/tasks/t0"):
        assert ann.code("GET", path) == (403, "not_allowed")
    for path in (f"/api/people/{ann.id}", "/api/invitations"):
        assert ann.code("POST", path, {"role": "owner"}) == (403, "not_allowed")
    assert ann.ok("GET", "/api/me")["person"]["role"] == "annotator"


def test_anothers_task_cannot_be_reached_by_its_number(place):
    p = place(overlap=1)
    p.add(make_tasks(2))
    ann, ben = p.person("Ann"), p.person("Ben")
    hers, his = ann.next(), ben.next()
    assert hers["id"] != his["id"]
    ranks = {"ranks": [["A"], ["B"], ["C"]]}
    for lease in (
        his["lease"]["id"],
        hers["lease"]["id"],
        "1",
        "0",
        "-1",
        "9" * 18,
        "x",
        "1e3",
        "١",
    ):
        body = {"lease": lease, "key": "key-12345678", "answer": ranks}
        path = f"/api/tasks/{his['id']}"
        assert ann.code("POST", f"{path}/answer", body) == (404, "not_found")
        assert ann.code("PUT", f"{path}/draft", {"lease": lease, "answer": ranks}) == (
            404,
            "not_found",
        )
        skip = {"lease": lease, "key": "key-12345678"}
        assert ann.code("POST", f"{path}/skip", skip) == (404, "not_found")
        assert ann.code("POST", f"{path}/reopen", {"key": "key-12345678"}) == (404, "not_found")
    ben.answer(his, ranks["ranks"], "key-of-ben-1")
    ann.answer(hers, ranks["ranks"], "key-of-ben-1")  # keys are each person's own


def test_a_session_of_one_project_is_none_in_another(place):
    p, q = place(), place(folder="second", id="p2")
    ann = p.person("Ann", "owner")
    token = ann.cookies[p.site.cookie]
    thief = Visitor(q.app)
    thief.csrf = ann.csrf
    for name in (p.site.cookie, q.site.cookie):
        thief.cookies.set(name, token)
    assert thief.code("GET", "/api/me") == (401, "not_logged_in")


def test_an_invitation_works_once_and_not_late_and_not_when_revoked(place, monkeypatch):
    p = place()
    owner = p.person("Olga", "owner")

    def token():
        made = owner.ok("POST", "/api/invitations", {"role": "annotator", "days": 1})
        return made["id"], made["link"].rpartition("/")[2]

    body = {"name": "Eve", "password": PASSWORD}
    _, used = token()
    assert Visitor(p.app).ok("GET", f"/api/invitations/{used}")["role"] == "annotator"
    Visitor(p.app).accept(used, "Ann")
    identity, revoked = token()
    owner.ok("DELETE", f"/api/invitations/{identity}")
    _, late = token()
    import time

    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2 * 86_400)
    for bad in (used, revoked, late, "x", "%00", "'--", "a" * 200):
        path = f"/api/invitations/{bad}"
        assert Visitor(p.app).send("GET", path).status_code in (400, 404)
        assert Visitor(p.app).send("POST", f"{path}/accept", body).status_code in (400, 404)
    assert owner.ok("GET", "/api/invitations")["invitations"] == []
    assert {q["name"] for q in owner.ok("GET", "/api/people")["people"]} == {"Olga", "Ann"}


def test_accounts_end_with_their_sessions_and_the_last_owner_stays(place):
    p = place()
    owner, ann = p.person("Olga", "owner"), p.person("Ann")
    owner.ok("POST", f"/api/people/{ann.id}", {"active": False})
    assert ann.code("GET", "/api/me") == (401, "not_logged_in")
    body = {"name": "Ann", "password": PASSWORD}
    assert Visitor(p.app).code("POST", "/api/login", body) == (401, "wrong_password")
    for change in ({"active": False}, {"role": "reviewer"}):
        assert owner.code("POST", f"/api/people/{owner.id}", change) == (409, "last_owner")
    link = owner.ok("POST", f"/api/people/{owner.id}/reset", {})["link"]
    other = Visitor(p.app)
    new = {"name": "ignored", "password": "another password"}
    other.ok("POST", f"/api/invitations/{link.rpartition('/')[2]}/accept", new)
    assert owner.code("GET", "/api/me") == (401, "not_logged_in")  # its sessions have ended
    assert other.ok("GET", "/api/me")["person"]["name"] == "Olga"


def test_thousands_of_log_ins_are_refused_and_neither_hashed_nor_written(place, monkeypatch):
    p = place()
    p.person("Ann")
    hashed = []
    real = accounts._scrypt
    monkeypatch.setattr(accounts, "_scrypt", lambda *a, **k: hashed.append(1) or real(*a, **k))
    visitor, codes = Visitor(p.app, "10.0.0.9"), []
    for n in range(1_000):
        body = {"name": "Ann" if n % 2 else f"user{n}", "password": f"guess {n}"}
        answer = visitor.send("POST", "/api/login", body)
        codes.append(answer.status_code)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
    assert set(codes) == {401, 429}
    assert len(hashed) < 120
    refused = [event for event in events(p) if event.kind == "login_refused"]
    assert 0 < len(refused) < 120
    assert {event.new["reason"] for event in refused} == {"wrong_password", "too_many"}
    body = {"name": "Ann", "password": PASSWORD}
    assert Visitor(p.app, "10.0.0.8").send("POST", "/api/login", body).status_code == 200


def test_passwords_are_hashed_by_two_threads_however_many_ask(monkeypatch):
    threads = set()

    def scrypt(*_, **__):
        threads.add(threading.get_ident())
        return bytes(32)

    monkeypatch.setattr(accounts.hashlib, "scrypt", scrypt)
    with ThreadPoolExecutor(8) as pool:
        hashed = list(pool.map(accounts.hash_password, [PASSWORD] * 40))
    assert len(set(hashed)) == 40  # each has a salt of its own
    assert 1 <= len(threads) <= 2


def test_an_unknown_name_takes_as_much_work_as_a_wrong_password(place, monkeypatch):
    p = place()
    p.person("Ann")
    hashed = []
    real = accounts._scrypt
    monkeypatch.setattr(accounts, "_scrypt", lambda *a, **k: hashed.append(a) or real(*a, **k))
    answers = [
        Visitor(p.app).send("POST", "/api/login", {"name": name, "password": "wrong password"})
        for name in ("Ann", "Nobody")
    ]
    assert len(hashed) == 2
    assert answers[0].json() == answers[1].json()


def test_a_session_cannot_flood_the_site(place):
    p = place()
    ann = p.person("Ann")
    p.site.requests = accounts.RateLimit(50, 1e6)
    codes = {ann.send("GET", "/api/mine").status_code for _ in range(60)}
    assert codes == {200, 429}


def test_a_huge_comment_is_refused(place):
    p = place()
    p.add(make_tasks(1))
    ann = p.person("Ann")
    task = ann.next()
    answer = {"ranks": [["A"], ["B"], ["C"]], "comment": "c" * 10_000_000}
    body = {"lease": task["lease"]["id"], "key": "key-12345678", "answer": answer}
    assert ann.send("POST", "/api/tasks/t0/answer", body).status_code == 413
    answer["comment"] = "c" * 10_001
    assert ann.send("POST", "/api/tasks/t0/answer", body).status_code == 400
    assert ann.next()["draft"] is None


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/cron.d/x.jsonl",
        "..\\..\\x.jsonl",
        "/etc/passwd",
        "x.py",
        "x.jsonl/../../y",
        ".jsonl",
        "a\nb.jsonl",
    ],
)
def test_the_name_of_an_upload_is_no_path(place, tmp_path, name):
    p = place()
    owner = p.person("Olga", "owner")
    before = sorted(q for q in tmp_path.rglob("*") if "annotations.db" not in q.name)
    raw = b'{"prompt": "Q", "responses": ["a", "b"]}\n'
    headers = {"Content-Type": "application/octet-stream"}
    answer = owner.send("POST", "/api/import", content=raw, params={"name": name}, headers=headers)
    assert answer.status_code in (200, 400)
    assert sorted(q for q in tmp_path.rglob("*") if "annotations.db" not in q.name) == before
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] == "unknown_form"


def test_uploads_that_are_broken_say_where(place):
    p = place()
    owner = p.person("Olga", "owner")
    headers = {"Content-Type": "application/octet-stream"}

    def upload(raw, name="up.jsonl"):
        return owner.send(
            "POST", "/api/import", content=raw, params={"name": name}, headers=headers
        )

    good = '{"prompt": "Q", "responses": ["a", "b"]}\n'
    bad = '{"prompt": "Q", "responses": ["a"]}\n{"prompt": "Q", "responses": ["a", "a"]}\n'
    report = upload(good + bad).json()
    assert (report["added"], report["refused"]) == (1, 2)
    assert [fault["where"] for fault in report["faults"]] == [
        "up.jsonl, record 2",
        "up.jsonl, record 3",
    ]
    for raw in (b"", b"{", b"\xff\xfe", b"[1]", b"PAR1", b'{"a": 1}'):
        for name in ("up.jsonl", "up.json", "up.parquet", "up.jsonl.gz"):
            answer = upload(raw, name)
            assert answer.status_code == 400, (raw, name, answer.text)
            assert "/tmp" not in answer.text


def test_html_sql_and_control_characters_are_text_in_every_field(place):
    p = place(overlap=1)
    record = {
        "id": EVIL,
        "prompt": EVIL,
        "responses": [{"text": EVIL, "origin": {"model": EVIL}}, EVIL + "2"],
    }
    p.add([record])
    owner = p.person("Olga", "owner")
    task = owner.next()
    assert task["prompt"][0]["content"] == EVIL
    assert {r["text"] for r in task["responses"]} == {EVIL, EVIL + "2"}
    owner.answer(task, [["A"], ["B"]], comment=EVIL, demonstration={"from": "A", "text": EVIL})
    shown = owner.ok("GET", f"/api/tasks/{task['id']}")
    assert shown["answers"][0]["comment"] == EVIL
    assert shown["answers"][0]["demonstration"]["text"] == EVIL
    for method, path, body in (
        ("POST", "/api/login", {"name": EVIL, "password": EVIL}),
        ("GET", "/api/tasks?text=%25%27%3B--", None),
        ("GET", "/api/tasks?text=%00", None),
        ("GET", "/api/tasks/%27%20OR%201=1", None),
        ("GET", "/api/tasks/%00", None),
        ("GET", "/api/export/%27", None),
        ("POST", f"/api/people/{EVIL[:30]}", {"role": "owner"}),
        ("POST", "/api/tasks/x/skip", {"lease": "1", "key": "key-12345678", "reason": EVIL}),
    ):
        answer = owner.send(method, path, body)
        assert answer.status_code in (200, 400, 401, 404), (path, answer.text)
        assert "sql" not in answer.text.lower()
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert [event for event in events(p) if event.kind == "answered"]


@pytest.mark.parametrize("name", ["", " ", "a\u200bb", "a\u202eb", "x" * 61, "a\u0000b"])
def test_names_that_deceive_are_refused(place, name):
    p = place()
    with p.site.database.write() as connection:
        token = accounts.invite(connection, "annotator", 1, None)["token"]
    body = {"name": name, "password": PASSWORD}
    visitor = Visitor(p.app)
    assert visitor.send("POST", f"/api/invitations/{token}/accept", body).status_code == 400
    p.person("Ann")
    body["name"] = "\uff21nn "  # a wide A
    assert visitor.code("POST", f"/api/invitations/{token}/accept", body) == (409, "name_taken")
    assert visitor.code(
        "POST", f"/api/invitations/{token}/accept", body | {"password": "short"}
    ) == (400, "weak_password")


def test_the_log_and_the_exports_hold_no_secret(place):
    p = place()
    owner = p.person("Olga", "owner")
    made = owner.ok("POST", "/api/invitations", {"role": "annotator", "days": 1})
    text = owner.send("GET", "/api/export/events").text
    with p.site.database.read() as connection:
        secrets = [
            *connection.execute(select(credentials.c.hash)).scalars(),
            *connection.execute(select(sessions.c.hash)).scalars(),
            *connection.execute(select(sessions.c.csrf)).scalars(),
            *connection.execute(select(invitations.c.hash)).scalars(),
        ]
    secrets += [PASSWORD, made["link"].rpartition("/")[2], owner.cookies[p.site.cookie], owner.csrf]
    assert all(secret not in text for secret in secrets)
    with p.site.database.read() as connection:
        stored = list(connection.execute(select(sessions.c.hash)).scalars())
    assert owner.cookies[p.site.cookie] not in stored


def test_headers_and_cookies_are_strict(place):
    p = place()
    with p.site.database.write() as connection:
        token = accounts.invite(connection, "annotator", 1, None)["token"]
    body = {"name": "Ann", "password": PASSWORD}
    answer = Visitor(p.app).send("POST", f"/api/invitations/{token}/accept", body)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    bad = Visitor(p.app).send("GET", "/api/me", headers={"Host": "evil.example"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (403, "host_not_allowed")
