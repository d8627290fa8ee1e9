"""Documents at rest: Parquet with id, text, source, language, and meta as JSON text."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openqwen.support.errors import OpenQwenError, disk_errors

_COLUMNS = ("id", "text", "source", "language", "meta")
_SCHEMA = pa.schema(
    [(column, pa.large_string() if column == "text" else pa.string()) for column in _COLUMNS]
)
_ROWS = 1000  # documents in a row group


def write_documents(path: Path, documents: Iterable[dict[str, Any]]) -> int:
    """Write documents in their order; the same documents give the same bytes. Returns how many."""
    count = 0
    rows: list[dict[str, Any]] = []
    with disk_errors(path), pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for document in documents:
            meta = json.dumps(document["meta"], ensure_ascii=False, sort_keys=True)
            rows.append({**document, "meta": meta})
            count += 1
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    return count


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """Documents in their order, one row group in memory at a time; a damaged file is an
    OpenQwenError.
    """
    with _damage_named(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS, columns=list(_COLUMNS)):
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


def halves(
    documents: Iterable[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every other document of each source, the first one to the first half: for development and for
    the last word.
    """
    split: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    seen: Counter[str] = Counter()
    for document in documents:
        split[seen[document["source"]] % 2].append(document)
        seen[document["source"]] += 1
    return split
