"""The tree of tags, and what people change in it: merge, rename, move, drop and undo.

`tree.json` is what a model and the aggregation made. The edits are a file of their own, JSON Lines
that are only appended: the tree that people see is a fold over it. Edits name tags by their name,
or by a form of it as a model wrote it, so that they apply again to the tree of a later run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl, write_json
from openqwen.support.settings import Settings, validate

TREE = "tree.json"
EDITS = "edits.jsonl"  # beside it, what people have changed
_FORMAT = 1


class TagEdit(Settings):
    """One change of the tree by a person.

    merge: the instructions of `tag` get the tag `into`, and its children move there.
    rename: `tag` is called `name`. move: `tag` stands below `parent`, or at the top without one.
    drop: no instruction has `tag`; its children move up. undo: the edit with the number `undoes`
    (its line, counted from 0), or the last one that holds, does not hold; where that is an undo,
    what it undid holds again, at its old place. key: of the request that brought the edit.
    """

    edit: Literal["merge", "rename", "move", "drop", "undo"]
    tag: str = Field("", max_length=200)
    into: str = Field("", max_length=200)
    name: str = Field("", max_length=200)
    parent: str | None = Field(None, max_length=200)
    undoes: int | None = Field(None, ge=0)
    by: str = Field("", max_length=200)
    at: str = Field("", max_length=40)
    key: str = Field("", max_length=64)


@dataclass
class TagNode:
    """A tag.

    count: instructions that have it. parent: the name of the tag above it. forms: how models wrote
    it, and how many instructions have each. explanations: some that models gave. examples: ids of
    some instructions.
    """

    name: str
    count: int = 0
    parent: str | None = None
    forms: dict[str, int] = field(default_factory=dict)
    explanations: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


@dataclass
class TagTree:
    """Tags by name, the most frequent first; steps: counts before and after each aggregation.

    places: the numbers of the instructions that have a form; without them the count of a merged tag
    is not exact.
    """

    nodes: dict[str, TagNode]
    steps: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> "TagTree":
        """Read `tree.json`, or that of a folder."""
        path = path / TREE if path.is_dir() else path
        value = read_json(path)
        try:
            if value["format"] != _FORMAT:
                raise OpenQwenError("This tree of tags has another format.", path, "tag again")
            nodes = [TagNode(**node) for node in value["tags"]]
            return cls({node.name: node for node in nodes}, value["steps"])
        except (KeyError, TypeError):
            raise OpenQwenError("This is no tree of tags.", path, "give a tag artifact") from None

    def write(self, folder: Path) -> None:
        """Write `tree.json`."""
        tags = [asdict(node) for node in self.nodes.values()]
        write_json(folder / TREE, {"format": _FORMAT, "steps": self.steps, "tags": tags})

    def find(self, text: str) -> TagNode | None:
        """The tag of a name or of a form."""
        if text in self.nodes:
            return self.nodes[text]
        return next((node for node in self.nodes.values() if text in node.forms), None)

    def tags_of(self, raw: Iterable[Iterable[str]]) -> list[list[str]]:
        """The tags of instructions, from how a model wrote them; each once."""
        names = {form: name for name, node in self.nodes.items() for form in node.forms}
        return [list(dict.fromkeys(names[f] for f in forms if f in names)) for forms in raw]

    def copy(self) -> "TagTree":
        """A tree that can be changed without a change of this one."""
        nodes = {name: replace(node, forms=dict(node.forms)) for name, node in self.nodes.items()}
        return TagTree(nodes, self.steps, self.places)

    def place(self, raw: Iterable[Iterable[str]]) -> None:
        """Note which instructions have which forms, and count the instructions of each tag."""
        found: dict[str, list[int]] = {}
        for number, forms in enumerate(raw):
            for form in set(forms):
                found.setdefault(form, []).append(number)
        self.places = {form: np.array(some, np.int32) for form, some in found.items()}
        for node in self.nodes.values():
            node.count = len(self.instructions_of(node))

    def instructions_of(self, node: TagNode) -> np.ndarray:
        """The numbers of the instructions that have a tag, in order."""
        some = [self.places[form] for form in node.forms if form in self.places]
        return np.unique(np.concatenate(some)) if some else np.zeros(0, np.int32)

    def apply(self, edit: TagEdit) -> None:
        """Change the tree.

        Raises:
            OpenQwenError: the edit cannot be applied; the tree is as before.
        """
        node = self._known(edit.tag)
        if edit.edit == "merge":
            into = self._known(edit.into)
            if into is node:
                raise OpenQwenError("A tag cannot be merged into itself.", edit.tag)
            if node.name in self._above(into):
                into.parent = node.parent
            self._remove(node, into.name)
            into.forms.update(node.forms)
            into.explanations = [*into.explanations, *node.explanations]
            into.examples = [*into.examples, *node.examples]
            more = max(into.count, node.count)
            into.count = len(self.instructions_of(into)) if self.places else more
        elif edit.edit == "rename":
            self._rename(node, " ".join(edit.name.split()))
        elif edit.edit == "move":
            parent = None if edit.parent is None else self._known(edit.parent)
            if parent is node or (parent and node.name in self._above(parent)):
                raise OpenQwenError("A tag cannot stand below itself.", edit.tag)
            node.parent = parent.name if parent else None
        elif edit.edit == "drop":
            self._remove(node, node.parent)

    def _known(self, text: str) -> TagNode:
        node = self.find(text)
        if node is None:
            raise OpenQwenError(f"There is no tag '{text}'.", do="name a tag of this tree")
        return node

    def _above(self, node: TagNode) -> list[str]:
        names = []
        while node.parent is not None:
            names.append(node.parent)
            node = self.nodes[node.parent]
        return names

    def _remove(self, node: TagNode, heir: str | None) -> None:
        del self.nodes[node.name]
        for other in self.nodes.values():
            if other.parent == node.name:
                other.parent = heir if heir != other.name else node.parent

    def _rename(self, node: TagNode, name: str) -> None:
        if not name:
            raise OpenQwenError("A tag needs a name.", node.name)
        if self.nodes.get(name, node) is not node:
            raise OpenQwenError(f"There is a tag '{name}' already.", do="merge the two")
        self.nodes = {name if n is node else n.name: n for n in self.nodes.values()}
        for other in self.nodes.values():
            if other.parent == node.name:
                other.parent = name
        node.name = name


def read_edits(path: Path) -> list[TagEdit]:
    """The edits of a file, in order; none where there is no file.

    Raises:
        OpenQwenError: a line is no edit.
    """
    lines: Sequence[Mapping[str, Any]] = list(read_jsonl(path)) if path.exists() else []
    return [validate(TagEdit, line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


class EditHistory(NamedTuple):
    """What became of edits, by their numbers.

    active: those that hold. undone: the others, and the undo of each. faults: why an edit, or an
    undo, has no effect.
    """

    active: dict[int, TagEdit]
    undone: dict[int, int]
    faults: dict[int, str]


def history(edits: Sequence[TagEdit]) -> EditHistory:
    """Which edits hold."""
    undone: dict[int, int] = {}
    undid: dict[int, int] = {}
    faults: dict[int, str] = {}
    active: set[int] = set()
    for number, edit in enumerate(edits):
        if edit.edit != "undo":
            active.add(number)
            continue
        target = edit.undoes if edit.undoes is not None else max(active, default=-1)
        if target in active:
            active.remove(target)
            undone[target], undid[number] = number, target
        elif target in undid:
            again = undid.pop(target)
            del undone[again]
            active.add(again)
        else:
            faults[number] = "there is nothing to undo"
    return EditHistory({number: edits[number] for number in sorted(active)}, undone, faults)


def fold(tree: TagTree, edits: Sequence[TagEdit]) -> EditHistory:
    """Apply the edits that hold to a tree."""
    found = history(edits)
    for number, edit in found.active.items():
        try:
            tree.apply(edit)
        except OpenQwenError as error:
            found.faults[number] = error.what
    return found


def apply_edits(tree: TagTree, edits: Sequence[TagEdit]) -> list[str]:
    """Apply the edits that hold to a tree; returns why some could not be applied."""
    faults = fold(tree, edits).faults
    names = {number: f"{edits[number].edit} '{edits[number].tag}'" for number in faults}
    return [f"edit {number}, {names[number]}: {what}" for number, what in sorted(faults.items())]
