"""Selection: InsTag's sampling, scores, coverage, near-duplicates, edits of the tree."""

import json
import math
import os
import re
import subprocess
import sys

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_runs import lines
from scripted import number

from openqwen.cli import main
from openqwen.instruct.collaborate.pool import read_pool
from openqwen.instruct.collaborate.select import complexity_first, coverage, scores
from openqwen.instruct.collaborate.tree import TagNode, TagTree
from openqwen.support.errors import OpenQwenError

TAGS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=25)


def published(tags, size):
    """Algorithm 1 of the paper, line by line."""
    rest = sorted(range(len(tags)), key=lambda q: -len(set(tags[q])))
    taken = []
    while len(taken) < size:
        round_tags, before = set(), len(taken)
        for query in list(rest):
            if len(round_tags | set(tags[query])) > len(round_tags):
                taken.append(query)
                round_tags |= set(tags[query])
                rest.remove(query)
                if len(taken) == size:
                    break
        if len(taken) == before:  # the paper assumes that every query has a tag
            break
    return taken


@settings(deadline=None)  # the machine may be busy
@given(TAGS, st.integers(1, 30))
def test_the_sampling_is_the_published_one(tags, size):
    assert complexity_first(tags, size) == published(tags, size)


def test_an_example_by_hand():
    tags = [["a"], ["a", "b", "c"], ["c", "d"], ["a", "b"], ["d"], []]
    # Round 1: abc, cd (d is new); ab, a and d add nothing. Round 2: ab, d. Round 3: a.
    assert complexity_first(tags, 9) == [1, 2, 3, 4, 0]
    assert complexity_first(tags, 3) == [1, 2, 3]
    assert coverage(tags, [1, 2]) == [0.75, 1.0]
    assert coverage([[], []], [0]) == [0.0]


def test_the_same_tag_for_all_is_a_queue():
    assert complexity_first([["x"]] * 3_000, 2_000) == list(range(2_000))


def tagged(tmp_path, rows, name="instructions.jsonl"):
    folder = tmp_path / "tagged"
    folder.mkdir(exist_ok=True)
    records = [
        {"id": f"i{n}", "prompt": text, "tags": tags, "raw": [{"tag": t} for t in tags], **more}
        for n, (text, tags, more) in enumerate(rows)
    ]
    lines(folder / name, records)
    forms = {tag for _, tags, _ in rows for tag in tags}
    TagTree({t: TagNode(t, 1, forms={t: 1}) for t in sorted(forms)}).write(folder)
    return folder


def said(*parts):
    return " ".join(f"w{number(*parts, k)}" for k in range(6))


def pool(tmp_path):
    rows = [
        (f"Write {said(word, n)}.", ["write", word], {"completeness": n % 11})
        for n, word in enumerate(["river", "city", "moon", "king", "ship"] * 8)
    ]
    return tagged(tmp_path, [*rows, ("What?", [], {})])


def select(tmp_path, folder, *more):
    out = tmp_path / "chosen"
    status = main(["instructions", "select", str(folder), "--output", str(out), *more])
    if status:
        return status, None, []
    manifest = json.loads((out / "manifest.json").read_text())
    return 0, manifest["metrics"], [json.loads(x) for x in (out / "instructions.jsonl").open()]


def test_a_selection_from_the_command_line(tmp_path):
    status, metrics, chosen = select(tmp_path, pool(tmp_path), "--count", "6")
    assert status == 0
    assert [one["id"] for one in chosen] == ["i0", "i1", "i2", "i3", "i4", "i5"]
    assert metrics["coverage"] == 1.0
    assert 0 < metrics["random_coverage"] < 1
    assert chosen[0]["scores"]["complexity"] == 2
    assert chosen[1]["scores"]["completeness"] == 1
    rows = [json.loads(x) for x in (tmp_path / "chosen" / "scores.jsonl").open()]
    assert len(rows) == 41
    assert rows[-1]["dropped"] == "no tags"
    assert sum(row["selected"] for row in rows) == 6
    page = (tmp_path / "chosen" / "report.html").read_text()
    assert "6 of 41 instructions" in page
    assert "polyline" in page


def test_bounds_leave_out_and_an_empty_selection_says_why(tmp_path, capsys):
    folder = pool(tmp_path)
    _, _, chosen = select(tmp_path, folder, "--count", "99", "--least-completeness", "8")
    assert {one["completeness"] for one in chosen} == {8, 9, 10}
    bounds = ["--least-diversity", "50"]
    assert (
        main(["instructions", "select", str(folder), "--output", str(tmp_path / "x"), *bounds]) == 1
    )
    assert "40 tag diversity, 1 no tags" in capsys.readouterr().err


def test_near_duplicates_are_left_out(tmp_path):
    text = "Please explain to me in simple words how a steam engine of the last century works"
    rows = [(text + end, ["explain"], {}) for end in (".", "!", " today.")]
    rows.append(("Name three rivers of Asia that flow to the north.", ["list"], {}))
    _, metrics, chosen = select(tmp_path, tagged(tmp_path, rows))
    assert {one["id"] for one in chosen} <= {"i0", "i2", "i3"}
    assert metrics["near_duplicates"] >= 1
    assert "i1" not in {one["id"] for one in chosen}


def test_edits_of_the_tree_change_the_selection(tmp_path):
    folder = pool(tmp_path)
    edits = [{"edit": "merge", "tag": w, "into": "river"} for w in ("city", "moon", "king")]
    edits.append({"edit": "drop", "tag": "write"})
    path = lines(tmp_path / "edits.jsonl", edits)
    _, metrics, chosen = select(tmp_path, folder, "--count", "2", "--edits", str(path))
    assert [one["tags"] for one in chosen] == [["river"], ["ship"]]
    assert metrics["coverage"] == 1.0


def test_the_tree_that_people_refined_on_the_page_is_used(tmp_path, capsys):
    """From the command that serves the page to the selection, without a flag."""
    folder = pool(tmp_path)
    _, _, before = select(tmp_path, folder, "--count", "2")
    assert ["river"] not in [one["tags"] for one in before]
    command = [sys.executable, "-m", "openqwen.cli", "instructions", "tree", folder, "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    url = next(m[0] for line in server.stdout if (m := re.search(r"http://\S+", line)))
    edits = [{"edit": "merge", "tag": w, "into": "river"} for w in ("city", "moon", "king")]
    edits.append({"edit": "drop", "tag": "write"})
    body = {"key": "all of them", "after": 0, "by": "ann", "edits": edits}
    assert httpx.post(f"{url}/api/edits", json=body).status_code == 200
    server.terminate()
    server.wait(30)
    capsys.readouterr()
    output = tmp_path / "refined"
    words = ["instructions", "select", str(folder), "--output", str(output), "--count", "2"]
    assert main(words) == 0
    assert "4 edits of the tree of tags hold" in capsys.readouterr().err
    assert [one.tags for one in read_pool(output / "instructions.jsonl")] == [("river",), ("ship",)]
    # A file alone does not say which edits belong to it.
    words[2], words[4] = str(folder / "instructions.jsonl"), str(tmp_path / "unrefined")
    assert main(words) == 0
    assert "edits of the tree are not used" in capsys.readouterr().err
    # The selection depends on the edits: it is not reused after another one.
    with open(folder / "edits.jsonl", "a") as file:
        file.write('{"edit": "undo"}\n')
    words[2], words[4] = str(folder), str(output)
    assert main(words) == 1
    assert "instructions" in capsys.readouterr().err


def test_scores_have_their_closed_forms(tmp_path):
    rows = [("red red stone", ["x", "y"], {}), ("red tree", ["x"], {}), ("old tree", [], {})]
    folder = tagged(tmp_path, rows)
    found = read_pool(folder / "instructions.jsonl")
    one, two, three = scores(found, [i.tags for i in found])
    log = math.log2
    assert one == (
        2,
        pytest.approx((log(1.5) + log(3)) / 2),
        pytest.approx(log(1.5) + log(3)),
        None,
    )
    assert two.richness == pytest.approx(2 * log(1.5))
    assert three[:2] == (0, 0.0)


def test_pools_that_cannot_be_read(tmp_path):
    with pytest.raises(OpenQwenError, match="no instructions"):
        read_pool(lines(tmp_path / "empty.jsonl", []))
    twice = [{"id": "a", "prompt": "One?"}, {"id": "a", "prompt": "Two?"}]
    with pytest.raises(OpenQwenError, match="the id 'a'"):
        read_pool(lines(tmp_path / "twice.jsonl", twice))
    same = [{"prompt": "One?"}, {"prompt": " One? "}, {"question": "Two?", "answer": "2"}]
    assert [i.id for i in read_pool(lines(tmp_path / "p.jsonl", same))] == [
        "p.jsonl#1",
        "p.jsonl#3",
    ]
