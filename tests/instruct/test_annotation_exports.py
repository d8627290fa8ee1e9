"""What the exports of the annotation site are read by: training, and another project."""

import json

import pytest
from annotation import PASSWORD, make_tasks
from test_annotation import exported, state

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.messages import demonstration, preference


def test_exports_are_what_training_reads(place, tmp_path):
    p = place(overlap=1)
    p.add(make_tasks(3))
    ann = p.person("Ann")
    while (task := ann.next()) is not None:
        ann.answer(task, [["A"], ["B"], ["C"]])
    assert all(preference(record).prompt for record in exported(p.site, "preferences"))
    assert all(len(demonstration(record)[0]) == 2 for record in exported(p.site, "demonstrations"))


def test_an_export_of_events_fills_a_new_project(place, tmp_path):
    p = place(overlap=1)
    p.add(make_tasks(3))
    ann = p.person("Ann")
    ann.answer(ann.next(), [["B"], ["A", "C"]])
    owner = p.person("Olga", "owner")
    raw = owner.send("GET", "/api/export/events")
    assert raw.headers["content-disposition"] == 'attachment; filename="events.jsonl"'
    assert PASSWORD not in raw.text
    assert "scrypt" not in raw.text
    q = place(folder="second")
    q.add([json.loads(line) for line in raw.text.splitlines()], "events.jsonl")
    assert state(q.site) == state(p.site)
    assert exported(q.site, "ranks") == exported(p.site, "ranks")
    with pytest.raises(OpenQwenError, match="in use"):
        q.add([json.loads(line) for line in raw.text.splitlines()], "events.jsonl")
