"""Documents at rest: Parquet with id, text, source, language, and meta as JSON text."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from openqwen.support.errors import OpenQwenError, disk_errors

# The files of a corpus artifact.
TRAIN, HELDOUT = "train.parquet", "heldout.parquet"

# {"id", "text", "source", "language", "meta"}; ids are unique within a corpus.
Document = dict[str, Any]

_COLUMNS = ("id", "text", "source", "language", "meta")
_SCHEMA = pa.schema(
    [(column, pa.large_string() if column == "text" else pa.string()) for column in _COLUMNS]
)
# Most documents of a row group, and the bytes of text that close one: writing and reading hold one
# row group in memory.
_ROWS = 1000
_GROUP_BYTES = 64_000_000
_FILE_BYTES = 2_000_000_000  # of text in one file; then the next one begins
_READ_ROWS = 100  # documents that reading turns into Python objects at a time


class DocumentEntry(NamedTuple):
    """A document without its text: what limits, samples and the held-out split are decided by.

    group: documents of one group are held out together. size: bytes of the text.
    """

    id: str
    source: str
    group: str
    size: int

    @classmethod
    def of(cls, document: Document) -> "DocumentEntry":
        """The entry of a document; by default a document is a group of its own."""
        name = document["id"]
        group = document["meta"].get("group") or name
        return cls(name, document["source"], group, utf8_size(document["text"]))


def utf8_size(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def parts(path: Path) -> list[Path]:
    """The files that hold documents together: train.parquet, train-00001.parquet, and so on."""
    found = [path]
    while (following := _part(path, len(found))).exists():
        found.append(following)
    return found


def _part(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number:05}") if number else path


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write documents in their order, to several files where they are large; see `parts`.

    The same documents give the same bytes. Returns how many there are.
    """
    stream = iter(documents)
    count = number = 0
    waiting = next(stream, None)
    while waiting is not None or not number:
        written, waiting = _write_part(_part(path, number), waiting, stream)
        count, number = count + written, number + 1
    for stale in parts(path)[number:]:
        stale.unlink()
    return count


def _write_part(
    path: Path, waiting: Document | None, stream: Iterator[Document]
) -> tuple[int, Document | None]:
    """Write one file: (how many documents, the first one of the next file)."""
    rows: list[Document] = []
    count = size = whole = 0
    with disk_errors(path), pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        while waiting is not None and whole < _FILE_BYTES:
            meta = json.dumps(waiting["meta"], ensure_ascii=False, sort_keys=True)
            rows.append({**waiting, "meta": meta})
            count += 1
            more = utf8_size(waiting["text"])
            size, whole = size + more, whole + more
            if len(rows) == _ROWS or size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                rows, size = [], 0
            waiting = next(stream, None)
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    return count, waiting


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a file and its other parts, in order, one row group in memory at a time.

    Raises OpenQwenError where a file is damaged.
    """
    for part in parts(path):
        with _damage_named(part), pq.ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=list(_COLUMNS)):
                for document in batch.to_pylist():
                    yield {**document, "meta": json.loads(document["meta"])}


def count_documents(path: Path) -> int:
    """How many documents a file and its other parts hold, from their footers alone."""
    count = 0
    for part in parts(path):
        with _damage_named(part):
            count += pq.read_metadata(part).num_rows
    return count


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, json.JSONDecodeError) as error:
        raise OpenQwenError(
            f"The documents cannot be read: {str(error).splitlines()[0]}",
            where=path,
            do="make the corpus again",
        ) from None


def halves(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(development half, test half): the documents of each source alternate."""
    split: tuple[list[Document], list[Document]] = ([], [])
    seen: Counter[str] = Counter()
    for document in documents:
        split[seen[document["source"]] % 2].append(document)
        seen[document["source"]] += 1
    return split
