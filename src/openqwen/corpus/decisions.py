"""Every decision of the corpus stage, in a Parquet file beside the corpus.

A row says which step dropped a document or cut something out of it, by which rule, and the number
that decided. A document without a row passed all steps as it was.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openqwen.corpus.documents import Document
from openqwen.corpus.process import DocumentVerdict
from openqwen.support.errors import disk_errors

DECISIONS = "decisions.parquet"

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("step", pa.string()),
        ("rule", pa.string()),
        ("value", pa.float64()),
        ("why", pa.string()),
        ("kept", pa.bool_()),
    ]
)
_ROWS = 10_000  # of a row group, which is held in memory


def decision_rows(document: Document, verdict: DocumentVerdict) -> list[dict[str, Any]]:
    """What a step did with a document, if it did not just keep it."""
    rows: list[tuple[str, float | None, str, bool]] = []
    if cut := verdict.cut:
        rows.append((cut.rule, float(cut.bytes), cut.why, True))
    if verdict.rule is not None:
        value = None if verdict.value is None else float(verdict.value)
        rows.append((verdict.rule, value, verdict.why, False))
    place = {"id": document["id"], "source": document["source"], "step": verdict.step}
    return [
        {**place, "rule": rule, "value": value, "why": why, "kept": kept}
        for rule, value, why, kept in rows
    ]


class Decisions:
    """Writes decisions in their order, with `with`; the same ones give the same bytes."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._open = ExitStack()

    def __enter__(self) -> "Decisions":
        self._open.enter_context(disk_errors(self._path))
        writer = pq.ParquetWriter(self._path, _SCHEMA, compression="zstd")
        self._writer = self._open.enter_context(writer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        if kind is None:
            self._flush()
        return self._open.__exit__(kind, error, trace)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows that `decision_rows` made."""
        for row in rows:
            self._rows.append(row)
            if len(self._rows) >= _ROWS:
                self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
            self._rows = []
