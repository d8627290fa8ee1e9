"""Several people edit a tree of tags: counts, conflicts, keys, undo and redo, the file."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tag_trees import RAW, artifact

from openqwen.http.errors import ApiError
from openqwen.instruct.collaborate.tree import TagTree, apply_edits, read_edits
from openqwen.instruct.collaborate.tree_editor import EditRequest, TreeEditor
from openqwen.support.errors import OpenQwenError

NAMES = ["math", "algebra", "maths", "poem", "style"]


@pytest.fixture
def folder(tmp_path):
    return artifact(tmp_path / "tagged")


@pytest.fixture
def editor(folder):
    editor = TreeEditor(folder)
    yield editor
    editor.close()


def request(*edits, by="ann", key=None, after=10_000):
    request.made += 1
    key = key or f"key-{request.made:06}"
    given = [edit if isinstance(edit, dict) else {"edit": "undo", "undoes": edit} for edit in edits]
    return EditRequest(key=key, after=after, by=by, edits=given)


request.made = 0


def drop(tag):
    return {"edit": "drop", "tag": tag}


def merge(tag, into):
    return {"edit": "merge", "tag": tag, "into": into}


def rename(tag, name):
    return {"edit": "rename", "tag": tag, "name": name}


def move(tag, parent=None):
    return {"edit": "move", "tag": tag, "parent": parent}


def counts(editor):
    return {name: count for name, count, *_ in editor.state()["tags"]}


def refused(editor, *edits, status=409, **values):
    before = editor.path.read_bytes(), editor.state("ann")
    with pytest.raises(ApiError) as caught:
        editor.edit(request(*edits, **values))
    assert caught.value.status == status
    assert (editor.path.read_bytes(), editor.state("ann")) == before
    return caught.value


def test_counts_are_exact_after_a_merge(editor):
    assert counts(editor) == {"math": 4, "algebra": 3, "maths": 2, "poem": 2, "style": 2}
    editor.edit(request(merge("maths", "math"), drop("poem")))
    assert counts(editor) == {"math": 5, "algebra": 3, "style": 2}  # not 6: one has both
    found = editor.tag("math")
    assert (found["forms"], found["count"]) == ([("Math", 4), ("Maths", 2)], 5)
    assert found["explanations"] == ["About numbers."]
    assert [one["id"] for one in found["instructions"]] == ["i0", "i1", "i2", "i3", "i4"]
    assert [one["id"] for one in editor.tag("math", 4)["instructions"]] == ["i4"]
    with pytest.raises(ApiError) as caught:
        editor.tag("maths")
    assert caught.value.status == 404


def test_a_request_is_made_once(editor):
    one = request(merge("maths", "math"), drop("style"), key="only-once")
    for _ in range(3):
        editor.edit(one)
    assert editor.state()["version"] == 2
    assert [edit.by for edit in read_edits(editor.path)] == ["ann", "ann"]


def test_a_request_that_a_kill_cut_is_completed_when_it_comes_again(folder):
    one = request(merge("maths", "math"), drop("style"), key="was-cut-off")
    editor = TreeEditor(folder)
    editor.edit(one)
    editor.close()
    lines = editor.path.read_bytes().splitlines(keepends=True)
    editor.path.write_bytes(lines[0] + lines[1][:20])  # half of a line is no line
    editor = TreeEditor(folder)
    assert editor.state()["version"] == 1
    editor.edit(one)
    assert counts(editor) == {"math": 5, "algebra": 3, "poem": 2}
    editor.close()
    assert [edit.edit for edit in read_edits(editor.path)] == ["merge", "drop"]


def test_all_edits_of_a_request_are_made_or_none(editor):
    error = refused(editor, drop("style"), move("math", "algebra"))
    assert "below itself" in error.message


def test_edits_of_a_tag_that_somebody_has_changed_are_refused(editor):
    editor.edit(request(rename("maths", "numbers"), by="bob"))
    assert refused(editor, drop("maths"), after=0).code == "conflict"
    assert refused(editor, merge("math", "maths"), after=0).code == "conflict"
    assert refused(editor, move("math", "maths"), after=0).code == "conflict"
    editor.edit(request(rename("poem", "maths"), by="bob"))
    assert refused(editor, drop("maths"), after=0).code == "conflict"  # it is another one now
    editor.edit(request(drop("maths"), after=2))
    editor.edit(request(0, by="bob"))
    assert refused(editor, drop("maths"), after=3).code == "conflict"  # bob's undo is a change too
    editor.edit(request(merge("style", "math"), by="bob"))
    assert refused(editor, drop("math"), after=4).code == "conflict"  # it has more instructions now
    editor.edit(request(move("algebra", "math"), merge("poem", "math"), after=9))


def test_merges_of_two_people_into_one_tag_are_no_conflict(editor):
    editor.edit(request(merge("maths", "math"), by="bob"))
    editor.edit(request(merge("algebra", "math"), after=0))
    assert counts(editor)["math"] == 5


def test_a_form_of_another_tag_is_not_meant(editor):
    """An edit of a file may name a form; on the page it would change another tag than is seen."""
    assert "no tag 'Maths'" in refused(editor, drop("Maths")).message


def test_undo_and_redo_of_ones_own_edits(editor):
    editor.edit(request(merge("maths", "math"), drop("style")))
    editor.edit(request(rename("poem", "verse"), by="bob"))
    editor.edit(request(rename("math", "mathematics")))
    first = editor.state("ann")
    assert (first["undo"], first["redo"]) == ([3], [])
    assert editor.state("bob")["undo"] == [2]
    editor.edit(request(*first["undo"]))
    second = editor.state("ann")
    assert (second["undo"], second["redo"]) == ([1, 0], [4])
    editor.edit(request(*second["undo"]))
    third = editor.state("ann")
    assert (third["undo"], third["redo"]) == ([], [6, 5])
    assert counts(editor) == {"math": 4, "algebra": 3, "maths": 2, "verse": 2, "style": 2}
    editor.edit(request(*third["redo"]))
    assert editor.state("ann")["redo"] == [4]
    editor.edit(request(*editor.state("ann")["redo"]))
    assert editor.state("ann")["tags"] == first["tags"]
    editor.edit(request(*editor.state("ann")["undo"]))
    editor.edit(request(drop("algebra")))
    assert editor.state("ann")["redo"] == []  # a new edit ends the redo


def test_the_history_says_who_what_and_what_became_of_it(editor):
    editor.edit(request(rename("math", "mathematics")))
    editor.edit(request(merge("maths", "mathematics"), by="bob"))
    editor.edit(request(0, by="  cy  "))
    newest, first = editor.state()["history"]
    assert (first["number"], first["by"], first["name"]) == (0, "ann", "mathematics")
    assert first["undone"]["by"] == "cy"
    assert first["undone"]["number"] == 2
    assert first["at"] <= first["undone"]["at"]
    assert newest["fault"] == "There is no tag 'mathematics'."
    assert editor.earlier(1)["history"] == [first]
    assert "nothing to undo" in refused(editor, 0).message
    editor.edit(request(2))
    assert all("fault" not in entry for entry in editor.state()["history"])


def test_another_process_cannot_open_the_file(editor, folder):
    code = "import sys; from pathlib import Path\n"
    code += "from openqwen.instruct.collaborate.tree_editor import TreeEditor\n"
    code += "TreeEditor(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert "Another run writes to this file" in done.stderr


def test_a_file_of_an_earlier_run_applies(tmp_path, folder):
    path = tmp_path / "earlier.jsonl"
    path.write_text('{"edit": "drop", "tag": "Poem"}\n{"edit": "drop", "tag": "gone"}\n')
    editor = TreeEditor(folder, path)
    assert "poem" not in counts(editor)
    assert [entry.get("fault") for entry in editor.state()["history"]] == [
        "There is no tag 'gone'.",
        None,
    ]
    editor.close()
    path.write_text('{"edit": "explode"}\n')
    with pytest.raises(OpenQwenError, match="edit is 'explode'"):
        TreeEditor(folder, path)
    assert not (folder / "edits.jsonl").exists()


def test_a_full_disk_is_not_a_refusal(editor, monkeypatch):
    """The page keeps an edit that may succeed later; one that is refused it gives up."""
    written = editor._journal.append

    def full(value):
        if value["edit"] == "drop":
            raise OpenQwenError("There is no space left.")
        return written(value)

    monkeypatch.setattr(editor._journal, "append", full)
    one = request(merge("maths", "math"), drop("style"), key="disk-is-full")
    with pytest.raises(ApiError) as caught:
        editor.edit(one)
    assert (caught.value.status, caught.value.code) == (503, "storage")
    assert counts(editor)["math"] == 5  # what the file has is what is shown
    monkeypatch.setattr(editor._journal, "append", written)
    editor.edit(one)
    assert [edit.edit for edit in read_edits(editor.path)] == ["merge", "drop"]


def test_people_at_once_lose_nothing(editor):
    def work(person):
        for number in range(10):
            editor.edit(request(rename(NAMES[person], f"{NAMES[person]}{number}")))
            editor.edit(request(rename(f"{NAMES[person]}{number}", NAMES[person])))

    request.made += 1_000
    threads = [threading.Thread(target=work, args=[person]) for person in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert editor.state()["version"] == 100
    assert len(read_edits(editor.path)) == 100
    assert sorted(counts(editor)) == sorted(NAMES)


EDITS = st.one_of(
    st.builds(drop, st.sampled_from(NAMES)),
    st.builds(merge, st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.builds(rename, st.sampled_from(NAMES), st.sampled_from([*NAMES, "new"])),
    st.builds(move, st.sampled_from(NAMES), st.none() | st.sampled_from(NAMES)),
    st.integers(0, 12),
)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.lists(EDITS, min_size=1, max_size=3), max_size=8))
def test_what_is_shown_is_the_fold_over_the_file(tmp_path_factory, requests):
    """Edit by edit, after opening the file again, and for who reads it by itself, as select does."""
    folder = artifact(tmp_path_factory.mktemp("tree") / "tagged")
    editor = TreeEditor(folder)
    for edits in requests:
        with suppress(ApiError):
            editor.edit(request(*edits))
    shown = editor.state("ann")
    editor.close()
    again = TreeEditor(folder)
    assert again.state("ann") == shown
    again.close()
    tree = TagTree.read(folder)
    apply_edits(tree, read_edits(folder / "edits.jsonl"))
    assert [tag[0] for tag in shown["tags"]] == list(tree.nodes)
    assert [tag[2] for tag in shown["tags"]] == [node.parent for node in tree.nodes.values()]
    tags = tree.tags_of(RAW)
    assert {tag[0]: tag[1] for tag in shown["tags"]} == {
        name: sum(name in some for some in tags) for name in tree.nodes
    }


@settings(deadline=None)  # the machine may be busy
@given(st.lists(EDITS, min_size=1, max_size=8))
def test_redo_gives_what_was_before_the_undo(tmp_path_factory, edits):
    editor = TreeEditor(artifact(tmp_path_factory.mktemp("tree") / "tagged"))
    for edit in edits:
        with suppress(ApiError):
            editor.edit(request(edit))
    before = {name: asdict(node) for name, node in editor._tree.nodes.items()}
    done = 0
    while undo := editor.state("ann")["undo"]:
        editor.edit(request(*undo))
        done += 1
    assert sorted(counts(editor)) == sorted(NAMES)
    for _ in range(done):
        editor.edit(request(*editor.state("ann")["redo"]))
    assert {name: asdict(node) for name, node in editor._tree.nodes.items()} == before
    editor.close()


@pytest.mark.parametrize("undoes", [0, 1, 7])
def test_a_file_whose_undo_names_itself_or_a_later_edit_is_read(folder, undoes):
    lines = [{"edit": "undo", "undoes": undoes}, {"edit": "undo"}, drop("poem")]
    (folder / "edits.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    editor = TreeEditor(folder)
    editor.edit(request(drop("style"), after=0))
    with pytest.raises(ApiError, match=r"There is no tag 'poem'|changed meanwhile"):
        editor.edit(request(rename("poem", "verse"), after=0))
    editor.close()
