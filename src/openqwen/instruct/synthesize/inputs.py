"""What methods read: documents, questions, conversations, and lists of phrases."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openqwen.corpus.read import FolderReader
from openqwen.instruct.synthesize.method import Item, Message
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import notice
from openqwen.support.records import read_records
from openqwen.tokenizer.messages import demonstration, preference, prompt

DATA = Path(__file__).with_name("data")
_LARGEST = 64_000_000  # bytes of a document


@dataclass(frozen=True)
class Question:
    """A question of a user. id: the record that it comes from, "FILE#NUMBER"."""

    id: str
    text: str


@dataclass(frozen=True)
class Exchange:
    """A conversation up to its last answer.

    prompt: the messages before the answer. rejected: a worse answer, in a file of preferences.
    """

    prompt: list[Message]
    answer: str
    rejected: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the last message before the answer."""
        return self.prompt[-1]["content"]


def phrases(name: str, language: str, given: Path | None) -> list[str]:
    """The lines of a user's text file, or the shipped list of that name in a language.

    Raises:
        OpenQwenError: the file cannot be read, or is empty.
    """
    if given is None:
        shipped = yaml.safe_load((DATA / f"{name}.yaml").read_text(encoding="utf-8"))
        return [str(line) for line in shipped[language]]
    try:
        lines = given.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OpenQwenError(f"This file cannot be read: {error}", given) from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise OpenQwenError("This file has no lines.", given, "write one a line")
    return found


def questions(path: Path) -> list[Question]:
    """The first questions of prompts, demonstrations or tasks; no question comes twice.

    Raises:
        OpenQwenError: a record has no prompt, or there is none.
    """
    found: dict[str, Question] = {}
    for number, (where, record) in enumerate(read_records(path), 1):
        try:
            messages, _ = prompt(record)
        except OpenQwenError as error:
            raise OpenQwenError(error.what, where, error.do) from None
        user = [m["content"] for m in messages if m["role"] == "user" and m["content"].strip()]
        if user:
            text = user[0].strip()
            found.setdefault(text, Question(f"{path.name}#{number}", text))
    if not found:
        raise OpenQwenError("There are no questions.", path, "give a file of prompts")
    return list(found.values())


def exchanges(path: Path) -> Iterator[Item]:
    """The records of a file of demonstrations or preferences, each as an item with an `Exchange`.

    One that cannot be read is an item with its fault.
    """
    for number, (_, record) in enumerate(read_records(path), 1):
        identity = f"{path.name}#{number}"
        try:
            yield Item(identity, _exchange(record))
        except OpenQwenError as error:
            yield Item(identity, None, error.what)


def _exchange(record: dict[str, Any]) -> Exchange:
    rejected = None
    if "rejected" in record:
        asked, chosen, other, tools = preference(record)
        messages, rejected = [*asked, chosen], other["content"].strip()
    else:
        messages, tools = demonstration(record)
    if tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        raise OpenQwenError("This conversation calls tools.")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    if len(plain) < 2 or plain[-2]["role"] != "user" or not plain[-1]["content"].strip():
        raise OpenQwenError("This conversation has no answer to a user.")
    origin = record.get("origin")
    origin = origin if isinstance(origin, dict) else {}
    return Exchange(plain[:-1], plain[-1]["content"].strip(), rejected, origin)


def documents(source: Path) -> Iterator[dict[str, Any]]:
    """The documents of a folder or of one file, in a fixed order: "id", "text", "language".

    Files are read as the `corpus` stage reads them: text, Markdown, HTML, and JSONL or Parquet with
    the field "text". What is skipped is counted in a note.

    Raises:
        OpenQwenError: there is no document.
    """
    folder = source if source.is_dir() else source.parent
    reader = FolderReader(folder, _LARGEST)
    count = 0
    for document in reader if source.is_dir() else reader.read(source, source.name):
        count += 1
        yield document
    for reason, entry in reader.skips.reasons.items():
        notice(f"skipped {entry['count']}: {reason}, such as {entry['examples'][0]}", source)
    if not count:
        raise OpenQwenError("There are no documents.", source, "give a folder or a file of text")
