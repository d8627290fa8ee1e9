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


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write documents in their order; the same documents give the same bytes. Returns how many."""
    rows: list[Document] = []
    count = size = 0
    with disk_errors(path), pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for document in documents:
            meta = json.dumps(document["meta"], ensure_ascii=False, sort_keys=True)
            rows.append({**document, "meta": meta})
            count += 1
            size += utf8_size(document["text"])
            if len(rows) == _ROWS or size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    return count


def read_documents(path: Path) -> Iterator[Document]:
    """Documents in their order, one row group in memory at a time.

    Raises OpenQwenError where the file is damaged.
    """
    with _damage_named(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_READ_ROWS, columns=list(_COLUMNS)):
            for document in batch.to_pylist():
                yield {**document, "meta": json.loads(document["meta"])}


def count_documents(path: Path) -> int:
    """How many documents a file holds, from its footer alone."""
    with _damage_named(path):
        return pq.read_metadata(path).num_rows


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
