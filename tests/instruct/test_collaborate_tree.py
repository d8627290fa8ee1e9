"""The tree of tags and its history: every edit, undo, and a later run."""

from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.instruct.collaborate.tree import (
    TagEdit,
    TagNode,
    TagTree,
    apply_edits,
    history,
    read_edits,
)
from openqwen.support.errors import OpenQwenError

NAMES = ["math", "algebra", "maths", "poem", "style"]
RAW = [["Math", "Algebra"], ["math!", "Maths"], ["Poem", "style"], ["Math"], ["Poem"]]


def tree():
    nodes = [
        TagNode("math", 3, forms={"Math": 2, "math!": 1}),
        TagNode("poem", 2, forms={"Poem": 2}),
        TagNode("algebra", 1, "math", {"Algebra": 1}),
        TagNode("maths", 1, forms={"Maths": 1}),
        TagNode("style", 1, "poem", {"style": 1}),
    ]
    return TagTree({node.name: node for node in nodes})


def edit(kind, **values):
    return TagEdit(edit=kind, **values)


def plain(one):
    return {name: asdict(node) for name, node in one.nodes.items()}


def changed(*edits):
    one = tree()
    assert apply_edits(one, edits) == []
    return one


def test_a_merge_takes_forms_and_children():
    one = changed(edit("merge", tag="math", into="maths"))
    assert "math" not in one.nodes
    assert one.nodes["maths"].forms == {"Maths": 1, "Math": 2, "math!": 1}
    assert one.nodes["algebra"].parent == "maths"
    assert one.nodes["maths"].count == 3  # the larger one, while nobody knows which have both
    one.place(RAW)
    assert one.nodes["maths"].count == 3  # not 4: one instruction had both
    assert one.tags_of(RAW)[1] == ["maths"]


def test_a_merge_into_a_descendant():
    one = changed(
        edit("move", tag="maths", parent="algebra"), edit("merge", tag="math", into="maths")
    )
    assert one.nodes["maths"].parent is None
    assert one.nodes["algebra"].parent == "maths"


def test_rename_move_and_drop():
    one = changed(
        edit("rename", tag="math", name="  mathematics "),
        edit("move", tag="poem", parent="mathematics"),
        edit("drop", tag="poem"),
    )
    assert one.nodes["algebra"].parent == "mathematics"
    assert one.nodes["style"].parent == "mathematics"  # it moved up
    assert one.tags_of(RAW)[2] == ["style"]
    assert changed(edit("move", tag="algebra")).nodes["algebra"].parent is None


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (edit("merge", tag="math", into="math"), "into itself"),
        (edit("merge", tag="math", into="physics"), "no tag 'physics'"),
        (edit("rename", tag="math", name="poem"), "already"),
        (edit("rename", tag="math", name=" "), "needs a name"),
        (edit("move", tag="math", parent="algebra"), "below itself"),
        (edit("move", tag="math", parent="math"), "below itself"),
        (edit("drop", tag="physics"), "no tag"),
        (edit("undo"), "nothing to undo"),
        (edit("undo", undoes=7), "nothing to undo"),
    ],
)
def test_an_edit_that_cannot_be_applied_changes_nothing(bad, what):
    one = tree()
    (note,) = apply_edits(one, [bad])
    assert what in note
    assert plain(one) == plain(tree())


def test_an_undo_can_be_undone():
    merge, drop = edit("merge", tag="maths", into="math"), edit("drop", tag="poem")
    edits = [merge, drop, edit("undo", undoes=0)]
    found = history(edits)
    assert (list(found.active), found.undone, found.faults) == ([1], {0: 2}, {})
    again = [*edits, edit("undo", undoes=2)]
    assert list(history(again).active) == [0, 1]  # the merge is at its old place
    assert plain(changed(*again)) == plain(changed(merge, drop))
    assert history([*again, edit("undo", undoes=2)]).faults == {4: "there is nothing to undo"}
    assert list(history([*again, edit("undo", undoes=0)]).active) == [1]


def test_a_copy_is_changed_alone():
    one = tree()
    apply_edits(one.copy(), [edit("merge", tag="maths", into="math"), edit("drop", tag="poem")])
    assert plain(one) == plain(tree())


def test_edits_are_read_from_a_file(tmp_path):
    path = tmp_path / "edits.jsonl"
    assert read_edits(path) == []
    path.write_text('{"edit": "drop", "tag": "poem"}\n')
    assert read_edits(path) == [edit("drop", tag="poem")]
    path.write_text('{"edit": "explode"}\n')
    with pytest.raises(OpenQwenError, match="edit is 'explode'"):
        read_edits(path)


def test_edits_apply_to_the_tree_of_a_later_run():
    later = TagTree({"mathematics": TagNode("mathematics", 5, forms={"Mathematics": 4, "Math": 1})})
    notes = apply_edits(
        later, [edit("rename", tag="Math", name="numbers"), edit("drop", tag="poem")]
    )
    assert list(later.nodes) == ["numbers"]
    assert notes == ["edit 1, drop 'poem': There is no tag 'poem'."]


EDITS = st.builds(
    TagEdit,
    edit=st.sampled_from(["merge", "rename", "move", "drop", "undo"]),
    tag=st.sampled_from(NAMES),
    into=st.sampled_from(NAMES),
    name=st.sampled_from([*NAMES, "new"]),
    parent=st.none() | st.sampled_from(NAMES),
    undoes=st.none() | st.integers(0, 9),
)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(EDITS, max_size=10))
def test_whatever_people_do_it_stays_a_tree(edits):
    one = tree()
    apply_edits(one, edits)
    forms = [form for node in one.nodes.values() for form in node.forms]
    assert len(forms) == len(set(forms))
    for name, node in one.nodes.items():
        assert node.name == name
        above, seen = node.parent, {name}
        while above is not None:
            assert above not in seen
            seen.add(above)
            above = one.nodes[above].parent


@settings(deadline=None)  # the machine may be busy
@given(st.lists(EDITS.filter(lambda e: e.edit != "undo"), max_size=6))
def test_undoing_everything_gives_the_first_tree(edits):
    one = tree()
    apply_edits(one, [*edits, *(edit("undo") for _ in edits)])
    assert plain(one) == plain(tree())


def test_a_tree_is_written_and_read(tmp_path):
    one = tree()
    one.steps = [{"step": "raw", "tags": 5}]
    one.write(tmp_path)
    again = TagTree.read(tmp_path)
    assert plain(again) == plain(one)
    assert again.steps == one.steps
    assert plain(again.copy()) == plain(TagTree.read(tmp_path / "tree.json"))
    (tmp_path / "tree.json").write_text("[]")
    with pytest.raises(OpenQwenError, match="no tree"):
        TagTree.read(tmp_path)
