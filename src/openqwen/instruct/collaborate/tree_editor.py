"""A tree of tags that several people edit at once, and the file of their edits."""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from openqwen.http.errors import ApiError
from openqwen.instruct.collaborate.pool import POOL, read_pool
from openqwen.instruct.collaborate.tree import EDITS, EditHistory, TagEdit, TagTree, fold
from openqwen.instruct.synthesize.journal import Journal
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import validate

Json = dict[str, Any]
_LONGEST = 2_000  # characters of an instruction that are shown
_SHOWN = 20  # instructions of a tag at a time
_RECENT = 200  # edits of the history at a time


class EditRequest(BaseModel):
    """Edits that belong together: all are made, or none.

    key: the request's own; one that comes again is not made again. after: how many edits its author
    has seen. by: the author's name.
    """

    model_config = ConfigDict(extra="forbid")

    key: str = Field(min_length=8, max_length=64)
    after: int = Field(ge=0)
    by: str = Field("", max_length=200)
    edits: list[TagEdit] = Field(min_length=1, max_length=500)


class TreeEditor:
    """The tree of an artifact of `instructions tag`, with the edits of its file applied.

    Methods may be called from several threads. Another process cannot open the same file.

    Args:
        folder: the artifact.
        edits: the file of edits; by default `edits.jsonl` of the folder.

    Raises:
        OpenQwenError: the folder has no tree, or the file cannot be read or written.
    """

    def __init__(self, folder: Path, edits: Path | None = None):
        self.path = edits or folder / EDITS
        self._lock = threading.Lock()
        self._original = TagTree.read(folder)
        pool = read_pool(folder / POOL)
        self._texts = [(one.id, one.text[:_LONGEST], len(one.text)) for one in pool]
        self._original.place(instruction.raw for instruction in pool)
        self._journal = Journal(self.path, flush=0)
        try:
            lines = [value for _, value in self._journal.lines()]
            places = (f"{self.path}:{number}" for number in range(1, len(lines) + 1))
            self._edits = [validate(TagEdit, *pair) for pair in zip(lines, places)]
        except OpenQwenError:
            self._journal.close()
            raise
        self._keys = Counter(edit.key for edit in self._edits)
        self._tree, self._history = self._folded(self._edits)

    def close(self) -> None:
        """Release the file of edits; one without edits is removed, as if it had not been opened."""
        self._journal.close()
        if not self._edits:
            self.path.unlink(missing_ok=True)

    def _folded(self, edits: Sequence[TagEdit]) -> tuple[TagTree, EditHistory]:
        tree = self._original.copy()
        return tree, fold(tree, edits)

    def edit(self, request: EditRequest) -> None:
        """Make edits; they are on the disk when this returns.

        Raises:
            ApiError: 409 where an edit cannot be applied, or somebody has changed its tags since;
                503 where the file cannot be written.
        """
        with self._lock:
            who, when = " ".join(request.by.split()), datetime.now(UTC).isoformat()
            known = self._keys[request.key]  # a kill may have come between two lines
            stamp = {"by": who, "at": when, "key": request.key}
            new = [edit.model_copy(update=stamp) for edit in request.edits[known:]]
            if not new:
                return
            tree, found = self._tried(new, request)
            try:
                for edit in new:
                    self._journal.append(edit.model_dump(exclude_defaults=True))
                    self._edits.append(edit)
                    self._keys[request.key] += 1
            except OpenQwenError as error:
                self._tree, self._history = self._folded(self._edits)
                raise ApiError(
                    503, f"{error.what} Nothing more is saved.", code="storage"
                ) from None
            self._tree, self._history = tree, found

    def _tried(self, new: list[TagEdit], request: EditRequest) -> tuple[TagTree, EditHistory]:
        """The tree and the history with more edits."""
        undoes = any(edit.edit == "undo" for edit in new)
        start = len(self._edits)
        if not undoes:
            self._check(new, request)
        tree, found = self._folded([*self._edits, *new]) if undoes else self._extended(new)
        for number in range(start, start + len(new)):
            if number in found.faults:
                raise ApiError(409, found.faults[number], code="not_applied")
        return tree, found

    def _extended(self, new: Sequence[TagEdit]) -> tuple[TagTree, EditHistory]:
        """The same as `_folded` for edits that undo nothing, in less time."""
        tree = self._tree.copy()
        active, undone, faults = self._history
        active = dict(active)
        for number, edit in enumerate(new, len(self._edits)):
            for name in _named(edit):
                if name not in tree.nodes:  # a form of another tag is not meant
                    raise ApiError(409, f"There is no tag '{name}' now.", code="conflict")
            try:
                tree.apply(edit)
            except OpenQwenError as error:
                raise ApiError(409, error.what, code="not_applied") from None
            active[number] = edit
        return tree, EditHistory(active, undone, faults)

    def _check(self, new: Iterable[TagEdit], request: EditRequest) -> None:
        """Refuse edits of tags that have changed since their author saw them."""
        for number in range(request.after, len(self._edits)):
            other = self._changed_by(number)
            if other is None or self._edits[number].key == request.key:
                continue
            for edit in new:
                if {other.tag, other.name} - {""} & _named(edit) or other.into == edit.tag:
                    what = f"'{other.tag}' has changed meanwhile."
                    raise ApiError(409, what, code="conflict")

    def _changed_by(self, number: int) -> TagEdit | None:
        """The edit that an edit makes, undoes or makes again; None where it does nothing."""
        edit = self._edits[number]
        while edit.edit == "undo":
            if number in self._history.faults:  # such as an undo of itself, in a file of others
                return None
            active = self._history.active
            number = edit.undoes if edit.undoes is not None else max(active, default=0)
            edit = self._edits[number]
        return edit

    def state(self, by: str = "", version: int | None = None) -> Json:
        """The tree and the recent edits; only the version where it is `version`.

        by: whose edits `undo` and `redo` name: the numbers to undo, the last one first.
        """
        with self._lock:
            if version == len(self._edits):
                return {"version": version}
            tags = [
                [node.name, node.count, node.parent, *(form for form in node.forms)]
                for node in self._tree.nodes.values()
            ]
            undo, redo = self._steps(" ".join(by.split()))
            found = {"version": len(self._edits), "tags": tags, "undo": undo, "redo": redo}
            return found | {"history": self._entries(len(self._edits))}

    def earlier(self, before: int) -> Json:
        """Edits before one, the last one first."""
        with self._lock:
            return {"history": self._entries(before)}

    def _entries(self, before: int) -> list[Json]:
        """Edits that are no undo, the last one first, each with what became of it."""
        entries: list[Json] = []
        for number in range(min(before, len(self._edits)) - 1, -1, -1):
            edit = self._edits[number]
            if len(entries) == _RECENT:
                break
            if edit.edit == "undo":
                continue
            entry = edit.model_dump(exclude_defaults=True, exclude={"key"}) | {"number": number}
            if number in self._history.undone:
                undo = self._history.undone[number]
                entry["undone"] = {"number": undo} | self._edits[undo].model_dump(
                    include={"by", "at"}
                )
            elif number in self._history.faults:
                entry["fault"] = self._history.faults[number]
            entries.append(entry)
        return entries

    def _steps(self, by: str) -> tuple[list[int], list[int]]:
        """What a person's next undo and redo undo."""
        mine = [number for number, edit in self._history.active.items() if edit.by == by]
        undos = [n for n in sorted(self._history.undone.values()) if self._edits[n].by == by]
        own = (n for n, edit in enumerate(self._edits) if edit.by == by and edit.edit != "undo")
        last = max(own, default=-1)
        return self._together(mine), self._together([n for n in undos if n > last])

    def _together(self, numbers: list[int]) -> list[int]:
        """Of numbers in order, the last one and those of its request, the last one first."""
        key = self._edits[numbers[-1]].key if numbers else ""
        same = [n for n in numbers if key and self._edits[n].key == key]
        return same[::-1] or numbers[-1:]

    def tag(self, name: str, offset: int = 0) -> Json:
        """A tag's forms, its explanations, and some of its instructions.

        Raises:
            ApiError: 404 where there is no such tag.
        """
        with self._lock:
            node = self._tree.nodes.get(name)
            if node is None:
                raise ApiError(404, f"There is no tag '{name}' now.")
            numbers = self._tree.instructions_of(node)[offset : offset + _SHOWN].tolist()
            found: Json = {"name": name, "count": node.count, "parent": node.parent}
            found["forms"] = sorted(node.forms.items(), key=lambda pair: -pair[1])[:100]
            found["explanations"] = list(dict.fromkeys(node.explanations))[:10]
        shown = [dict(zip(("id", "text", "characters"), self._texts[n])) for n in numbers]
        return found | {"offset": offset, "instructions": shown}


def _named(edit: TagEdit) -> set[str]:
    """The tags that an edit names."""
    return {edit.tag, edit.into, edit.parent or ""} - {""}
