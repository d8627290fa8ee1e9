"""Which records are shown, in which order, and the numbers about them."""

import re
import sqlite3
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from openqwen.http.errors import ApiError
from openqwen.instruct.inspect.index import FACETS, spaced

_SORT = {  # no two records share (key, number)
    "number": "number",
    "longest": "-characters",
    "shortest": "characters",
    "best": "ifnull(-grade, 9e999)",
    "worst": "ifnull(grade, 9e999)",
}
_DUPLICATES = {
    "text": "copies > 1",
    "prompt": "same_prompt > 1",
    "later": "copies > 1 AND number > first",
    "unique": "copies = 1",
}
_LISTED = (
    "number", "form", "method", "model", "kind", "source", "grade", "characters", "turns", "copies",
    "fault", "preview",
)  # fmt: skip
_MOST_VALUES = 20  # of a facet that are counted by name
_BINS = 24
_PART = re.compile(r'"([^"]+)"|(\S+)')


class Filters(BaseModel):
    """The filters of a request; a facet that is "" asks for records without a value."""

    model_config = ConfigDict(extra="forbid")

    form: str | None = None
    method: str | None = None
    model: str | None = None
    kind: str | None = None
    source: str | None = None
    language: str | None = None
    grader: str | None = None
    reason: str | None = None
    tag: str | None = None
    text: str | None = Field(None, max_length=1000)
    duplicates: Literal["text", "prompt", "later", "unique"] | None = None
    characters_from: int | None = None
    characters_to: int | None = None
    grade_from: float | None = None
    grade_to: float | None = None
    sort: Literal["number", "longest", "shortest", "best", "worst"] = "number"
    offset: int = Field(0, ge=0, lt=1 << 60)
    limit: int = Field(50, ge=1, le=200)

    def where(self) -> tuple[str, list[Any]]:
        """The condition in SQL, and its parameters."""
        parts: list[tuple[str, Any]] = []
        for name in FACETS:
            if (value := getattr(self, name)) is not None:
                parts.append((f"{name} = ?", value))
        for name in ("characters", "grade"):
            if (least := getattr(self, f"{name}_from")) is not None:
                parts.append((f"{name} >= ?", least))
            if (most := getattr(self, f"{name}_to")) is not None:
                parts.append((f"{name} <= ?", most))
        if self.tag is not None:
            parts.append(("number IN (SELECT number FROM tags WHERE tag = ?)", self.tag))
        if self.text and self.text.strip():
            found = "number IN (SELECT rowid FROM words WHERE words MATCH ?)"
            parts.append((found, _match(self.text)))
        conditions = [condition for condition, _ in parts]
        if self.duplicates:
            conditions.append(_DUPLICATES[self.duplicates])
        return " AND ".join(conditions) or "1", [value for _, value in parts]


def _match(text: str) -> str:
    """FTS5's expression: all words, each as the beginning of a word; quoted words together."""
    words = []
    for quoted, word in _PART.findall(text):
        part = spaced(quoted or word).replace('"', " ")
        if any(character.isalnum() for character in part):
            words.append(f'"{part}"' + ("" if quoted else "*"))
    if not words:
        raise ApiError(400, "Search for letters or digits.", "text")
    return " ".join(words)


def listed(connection: sqlite3.Connection, filters: Filters) -> dict[str, Any]:
    """One page of the records that pass, and how many pass."""
    where, values = filters.where()
    total = connection.execute(f"SELECT count(*) FROM records WHERE {where}", values)
    rows = connection.execute(
        f"SELECT {', '.join(_LISTED)} FROM records WHERE {where}"
        f" ORDER BY {_SORT[filters.sort]}, number LIMIT ? OFFSET ?",
        [*values, filters.limit, filters.offset],
    )
    records = [dict(zip(_LISTED, row)) for row in rows]
    return {"total": total.fetchone()[0], "offset": filters.offset, "records": records}


def around(connection: sqlite3.Connection, filters: Filters, number: int) -> dict[str, Any]:
    """The numbers of the records before and after one in the order, and its place (from 0)."""
    where, values = filters.where()
    key = _SORT[filters.sort]
    here = f"(SELECT {key} FROM records WHERE number = ?), ?"
    found: dict[str, Any] = {}
    for name, than, order in (("previous", "<", "DESC"), ("next", ">", "ASC")):
        row = connection.execute(
            f"SELECT number FROM records WHERE {where} AND ({key}, number) {than} ({here})"
            f" ORDER BY {key} {order}, number {order} LIMIT 1",
            [*values, number, number],
        ).fetchone()
        found[name] = row and row[0]
    (found["place"],) = connection.execute(
        f"SELECT count(*) FROM records WHERE {where} AND ({key}, number) < ({here})",
        [*values, number, number],
    ).fetchone()
    return found


def statistics(connection: sqlite3.Connection, filters: Filters) -> dict[str, Any]:
    """Counts by facet and tag, duplicates, and histograms, of the records that pass."""
    where, values = filters.where()

    def rows(sql: str) -> list[Any]:
        return connection.execute(sql, values).fetchall()

    counts: dict[str, Any] = {}
    for name in FACETS:
        named = rows(
            f"SELECT {name}, count(*) FROM records WHERE {where} GROUP BY {name} ORDER BY 2 DESC, 1"
        )
        if any(value for value, _ in named):
            counts[name] = {"values": named[:_MOST_VALUES], "distinct": len(named)}
    tags = rows(
        f"SELECT tag, count(*) FROM tags WHERE number IN (SELECT number FROM records WHERE {where})"
        " GROUP BY tag ORDER BY 2 DESC, 1"
    )
    if tags:
        counts["tag"] = {"values": tags[:_MOST_VALUES], "distinct": len(tags)}
    copies = rows(
        "SELECT count(*), ifnull(sum(copies > 1), 0), ifnull(sum(same_prompt > 1), 0),"
        f" ifnull(sum(copies > 1 AND number > first), 0), ifnull(sum(copies = 1), 0)"
        f" FROM records WHERE {where}"
    )[0]
    characters = np.array(rows(f"SELECT characters FROM records WHERE {where}"), float).ravel()
    grades = rows(f"SELECT grade FROM records WHERE {where} AND grade IS NOT NULL")
    turns = rows(
        f"SELECT turns, count(*) FROM records WHERE {where} GROUP BY turns ORDER BY turns LIMIT 30"
    )
    return {
        "total": copies[0],
        "counts": counts,
        "duplicates": dict(zip(_DUPLICATES, copies[1:])),
        "characters": _histogram(characters, True),
        "grade": _histogram(np.array(grades, float).ravel(), False),
        "turns": turns if len(turns) > 1 else [],
    }


def _histogram(values: np.ndarray, logarithmic: bool) -> dict[str, Any] | None:
    """Edges and counts, with the mean and the quartiles; None without values."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        edges = np.unique(np.round(np.geomspace(max(low, 1), max(high, 1) + 1, _BINS + 1)))
        edges[0] = min(edges[0], low)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    if len(edges) < 2:
        edges = np.array([low, low + 1])
    quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return {
        "edges": edges.tolist(),
        "counts": np.histogram(values, edges)[0].tolist(),
        "mean": float(values.mean()),
        "quartiles": quartiles,
    }
