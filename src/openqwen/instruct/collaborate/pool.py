"""Pools of instructions: what the steps before annotation read and write."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openqwen.instruct.synthesize.method import Item, Method
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_jsonl
from openqwen.support.records import read_records
from openqwen.tokenizer.messages import Record, prompt

POOL = "instructions.jsonl"


@dataclass(frozen=True)
class Instruction:
    """An instruction of a pool.

    id: its own, else "FILE#NUMBER". text: of the user's first message. raw: the tags as the model
    wrote them. tags: the names that aggregation gave them. record: all of it.
    """

    id: str
    text: str
    raw: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    record: Record = field(default_factory=dict)

    def as_record(self, **values: Any) -> dict[str, Any]:
        """The record of the pool's file, with some fields replaced."""
        asked = [{"role": "user", "content": self.text}]
        kept = {
            key: self.record[key] for key in ("raw", "completeness", "level") if key in self.record
        }
        origin = {"origin": self.record["origin"]} if "origin" in self.record else {}
        return {"id": self.id, "prompt": asked} | kept | values | origin

    def ancestry(self) -> dict[str, Any]:
        """What a record made of it keeps of its own origin."""
        given = self.record.get("origin")
        return {"instruction": given} if isinstance(given, dict) else {}


class PoolMethod(Method):
    """A method of synthesis with one item an instruction."""

    def __init__(self, config: Any, pool: Sequence[Instruction]):
        super().__init__(config)
        self.pool = pool

    def items(self) -> Iterable[Item]:
        """The instructions, in order."""
        for instruction in self.pool:
            yield Item(instruction.id, instruction)


def read_pool(source: Path) -> list[Instruction]:
    """The instructions of prompts, demonstrations, tasks or of an earlier step; each text once.

    Raises:
        OpenQwenError: a record has no prompt, two have the same id, or there is no instruction.
    """
    found: dict[str, Instruction] = {}
    places: dict[str, str] = {}
    for number, (where, record) in enumerate(read_records(source), 1):
        try:
            messages, _ = prompt(record)
        except OpenQwenError as error:
            raise OpenQwenError(error.what, where, error.do) from None
        user = [m["content"].strip() for m in messages if m["role"] == "user"]
        if not any(user):
            continue
        identity = record.get("id")
        identity = identity if isinstance(identity, str) else f"{source.name}#{number}"
        if identity in places:
            what = f"Two instructions have the id '{identity}'."
            raise OpenQwenError(what, f"{places[identity]}; {where}", "give each its own")
        text = next(text for text in user if text)
        if text not in found:
            places[identity] = where
            found[text] = Instruction(identity, text, _raw(record), _tags(record), record)
    if not found:
        raise OpenQwenError("There are no instructions.", source, "give a file of prompts")
    return list(found.values())


def _raw(record: Record) -> tuple[str, ...]:
    given = record.get("raw")
    entries = given if isinstance(given, list) else []
    return tuple(
        str(entry["tag"]) for entry in entries if isinstance(entry, dict) and "tag" in entry
    )


def _tags(record: Record) -> tuple[str, ...]:
    given = record.get("tags")
    return tuple(map(str, given)) if isinstance(given, list) else ()


def write_pool(folder: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write the pool of a step's artifact; returns its size."""
    return write_jsonl(folder / POOL, records)
