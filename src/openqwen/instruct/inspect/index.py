"""The index of a source: where each record lies, and what the page filters and searches by.

It is an SQLite file in the user's cache, made once for each state of the source's files. Records
of JSON Lines stay where they are. Those of other files (.gz, .zst, .json, Parquet) have no place
that can be read alone; they are unpacked into JSON Lines beside the index.
"""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from openqwen.instruct.inspect.describe import RecordParts, describe, facets, grade, tags
from openqwen.instruct.inspect.settings import InspectConfig
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import open_binary, parse_json, refuse_pointer
from openqwen.support.hub import HUB
from openqwen.support.progress import Progress, progress
from openqwen.support.records import Record, data_files, read_records

FACETS = ("form", "method", "model", "kind", "source", "language", "grader", "reason")
_VERSION = 1
_LINES = (".jsonl", ".ndjson")
_PACKED_LINES = tuple(ending + packed for ending in _LINES for packed in (".gz", ".zst"))
_FOLDER_FILES = (*_LINES, *_PACKED_LINES, ".parquet")
_MOST_FILES = 10_000
_SEARCHED = 1_000_000  # characters of a record that can be searched
_BEGINNING = 1 << 16  # bytes of a line that is too long to be read
_PREVIEW = 200
_UNUSED = 30 * 24 * 3600.0  # seconds after which an index is removed
_TABLES = f"""
CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT, spool TEXT, size INT, modified INT);
CREATE TABLE records (
    number INTEGER PRIMARY KEY, file INT, line INT, start INT, size INT, checksum INT, fault TEXT,
    {", ".join(f"{name} TEXT" for name in FACETS)},
    grade REAL, characters INT, turns INT, preview TEXT,
    text_key INT, prompt_key INT, copies INT DEFAULT 1, first INT, same_prompt INT DEFAULT 1
);
CREATE TABLE tags (tag TEXT, number INT);
CREATE VIRTUAL TABLE words USING fts5(
    text, content='', tokenize='unicode61 remove_diacritics 2'
);
"""
_PLACE = ("number", "file", "line", "start", "size", "checksum", "fault")
_COLUMNS = ", ".join(
    (*_PLACE, *FACETS, "grade", "characters", "turns", "preview", "text_key", "prompt_key")
)
# Copies are counted once, when all records are in.
_COUNT = """
CREATE TEMP TABLE counts AS
    SELECT {key} AS key, count(*) AS count, min(number) AS first FROM records
    GROUP BY {key} HAVING count(*) > 1;
CREATE INDEX temp.counts_by_key ON counts (key);
UPDATE records SET {set} FROM temp.counts WHERE records.{key} = counts.key;
DROP TABLE temp.counts;
"""
_INDICES = """
CREATE INDEX tags_by_tag ON tags (tag, number);
CREATE INDEX records_by_characters ON records (characters);
"""
# Scripts without spaces between words: each character becomes a word of its own.
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
                       "\U00020000-\U0003ffff])")  # fmt: skip


class Entry(NamedTuple):
    """Where a record lies.

    path: the file that is read. original: the source's file. fault: why it cannot be read as a
    record; "" where it can.
    """

    path: Path
    original: Path
    line: int
    start: int
    size: int
    checksum: int
    fault: str


def spaced(text: str) -> str:
    """The text with spaces around the characters of scripts that have none between words."""
    return _UNSPACED.sub(r" \1 ", text)


def source_files(source: str) -> list[Path]:
    """The files of a source: a file, `hub:owner/name:split`, or all data files of a folder."""
    folder = Path(source)
    if source.startswith(HUB) or not folder.is_dir():
        return data_files(source)
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(_FOLDER_FILES) and path.is_file() and not path.name.startswith(".")
    ]
    if not found:
        do = f"give a file, or a folder with {', '.join(_FOLDER_FILES)}"
        raise OpenQwenError("This folder has no data files.", folder, do)
    return found[:_MOST_FILES]


class RecordIndex:
    """An index that is ready to be read, from any thread."""

    def __init__(self, folder: Path):
        self.folder = folder
        with closing(self.connect()) as connection:
            rows = connection.execute("SELECT path, size, modified FROM files ORDER BY id")
            self.files = [(Path(path), size, modified) for path, size, modified in rows]
            (self.count,) = connection.execute("SELECT count(*) FROM records").fetchone()

    def connect(self, seconds: float | None = None) -> sqlite3.Connection:
        """A connection for reading. seconds: after them a query raises sqlite3.OperationalError."""
        path = f"file:{self.folder / 'index.sqlite'}?mode=ro&immutable=1"
        connection = sqlite3.connect(path, uri=True, check_same_thread=False)
        if seconds is not None:
            end = time.monotonic() + seconds
            connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        return connection

    def changed(self) -> str:
        """How the source has changed since it was indexed: "", "grown", "changed" or "gone"."""
        found = set()
        for path, size, modified in self.files:
            try:
                now = path.stat()
            except OSError:
                return "gone"
            if (now.st_size, now.st_mtime_ns) != (size, modified):
                found.add("grown" if now.st_size > size else "changed")
        return max(found, default="", key=["", "grown", "changed"].index)

    def entry(self, number: int) -> Entry | None:
        """Where record `number` lies; None where there is no such record."""
        with closing(self.connect()) as connection:
            row = connection.execute(
                "SELECT spool, path, line, start, records.size, checksum, fault FROM records"
                " JOIN files ON files.id = records.file WHERE number = ?",
                [number],
            ).fetchone()
        if row is None:
            return None
        spool, path, *place = row
        return Entry(self.folder / spool if spool else Path(path), Path(path), *place)

    def read(self, entry: Entry) -> bytes:
        """The bytes of a record; of one that is too long only its beginning.

        Raises OpenQwenError where the file is gone or holds something else there by now.
        """
        try:
            with open(entry.path, "rb") as file:
                file.seek(entry.start)
                raw = file.read(entry.size if entry.checksum >= 0 else _BEGINNING)
        except OSError as error:
            what = f"The file cannot be read any more: {error.strerror}."
            raise OpenQwenError(what, entry.path, "read it again") from None
        if entry.checksum >= 0 and zlib.crc32(raw) != entry.checksum:
            what = "The file has changed: at this place is another record now."
            raise OpenQwenError(what, entry.path, "read it again")
        return raw


def open_index(source: str, config: InspectConfig) -> RecordIndex:
    """The index of a source, from the cache where the files have not changed since."""
    files = source_files(source)
    stats = [(path, path.stat()) for path in files]
    state = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    identity = json.dumps([_VERSION, config.longest, state]).encode()
    cache = config.cache or _cache()
    folder = cache / hashlib.sha256(identity).hexdigest()[:24]
    if not (folder / "index.sqlite").is_file():
        _build(files, folder, config)
    os.utime(folder)
    _remove_unused(cache)
    return RecordIndex(folder)


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "openqwen" / "inspect"


def _remove_unused(cache: Path) -> None:
    for folder in cache.iterdir():
        if time.time() - folder.stat().st_mtime > _UNUSED:
            shutil.rmtree(folder, ignore_errors=True)


def _build(files: Sequence[Path], folder: Path, config: InspectConfig) -> None:
    """Make the index aside, then rename it: one that was interrupted is never found."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    with disk_errors(aside):
        aside.mkdir(parents=True, mode=0o700)
    try:
        with disk_errors(aside), closing(sqlite3.connect(aside / "index.sqlite")) as connection:
            connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + _TABLES)
            plain = all(path.name.endswith(_LINES) for path in files)
            total = sum(path.stat().st_size for path in files) / 1e6 if plain else None
            with progress("index", total, "MB") as bar:
                builder = _Builder(connection, aside, config.longest, bar)
                for path in files:
                    builder.add_file(path)
            builder.finish()
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Builder:
    """Reads files and fills the tables."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, longest: int, bar: Progress):
        self.connection, self.folder, self.longest, self.bar = connection, folder, longest, bar
        self.number = self.file = 0

    def add_file(self, path: Path) -> None:
        """Add the records of one file."""
        self.file += 1
        stat, plain = path.stat(), path.name.endswith(_LINES)
        spool = "" if plain else f"{self.file}.jsonl"
        self.connection.execute(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?)",
            [self.file, str(path.absolute()), spool, stat.st_size, stat.st_mtime_ns],
        )
        if plain:
            self._add_lines(path, None)
            return
        with open(self.folder / spool, "wb") as copy:
            if path.name.endswith(_PACKED_LINES):
                self._add_lines(path, copy)
                return
            start = 0
            for line, (_, record) in enumerate(read_records(path), 1):
                raw = json.dumps(record, ensure_ascii=False, default=str).encode()
                copy.write(raw + b"\n")
                self._add_line(line, start, raw, len(raw))
                start += len(raw) + 1

    def _add_lines(self, path: Path, copy: IO[bytes] | None) -> None:
        """Add the lines of a file, and write them to `copy` where there is one."""
        refuse_pointer(path)
        line = start = 0
        try:
            with open_binary(path) as file:
                for line, (raw, size) in enumerate(_lines(file, self.longest), 1):
                    text = raw.rstrip(b"\r\n") if len(raw) == size else raw
                    if text.strip():
                        self._add_line(line, start, text, size - len(raw) + len(text))
                    start += len(raw) if copy else size
                    if copy:
                        copy.write(raw)
        except OSError as error:  # a damaged archive: what came before is shown
            self._insert(line + 1, start, b"", 0, None, f"The file cannot be read on: {error}")

    def _add_line(self, line: int, start: int, raw: bytes, size: int) -> None:
        """Add one line. raw: its bytes, or their beginning where it is too long."""
        record, fault = None, ""
        if len(raw) < size:
            fault = f"This line has {size:,} bytes, more than {self.longest:,} (--longest)."
        else:
            try:
                record = parse_json(raw)
            except ValueError as error:
                fault = f"This line is not JSON: {error}."
            if not fault and not isinstance(record, dict):
                record, fault = None, "This line is JSON but not an object."
        self._insert(line, start, raw, size, record, fault)
        self.bar.advance(size / 1e6, records=f"{self.number:,}")

    def _insert(
        self, line: int, start: int, raw: bytes, size: int, record: Record | None, fault: str
    ) -> None:
        self.number += 1
        parts = describe(record) if record is not None else RecordParts("broken")
        values = facets(record or {}, parts.form)
        text = "\n".join(parts.texts()) or raw.decode("utf-8", "replace")
        prompt = parts.prompt() or text
        row: list[Any] = [self.number, self.file, line, start, size]
        row += [zlib.crc32(raw) if len(raw) == size else -1, fault]
        row += [values[name] for name in FACETS]
        row += [grade(record or {}), len(text), len(parts.messages)]
        row += [" ".join(prompt[: 2 * _PREVIEW].split())[:_PREVIEW], _key(text), _key(prompt)]
        marks = ", ".join("?" * len(row))
        self.connection.execute(f"INSERT INTO records ({_COLUMNS}) VALUES ({marks})", row)
        found = [(tag, self.number) for tag in tags(record or {})]
        self.connection.executemany("INSERT INTO tags VALUES (?, ?)", found)
        words = f"{(record or {}).get('id', '')}\n{text[:_SEARCHED]}"
        self.connection.execute(
            "INSERT INTO words (rowid, text) VALUES (?, ?)", [self.number, spaced(words)]
        )

    def finish(self) -> None:
        """Count copies and make the indices."""
        self.connection.executescript(
            _COUNT.format(key="text_key", set="copies = counts.count, first = counts.first")
            + _COUNT.format(key="prompt_key", set="same_prompt = counts.count")
            + _INDICES
        )
        self.connection.commit()


def _lines(file: IO[bytes], longest: int) -> Iterator[tuple[bytes, int]]:
    """(a line with its newline, its bytes); of a line over `longest` bytes only the beginning."""
    while line := file.readline(longest + 1):
        size = len(line)
        if size <= longest or line.endswith(b"\n"):
            yield line, size
            continue
        beginning, rest = line[:_BEGINNING], line
        while not rest.endswith(b"\n") and (rest := file.readline(1 << 20)):
            size += len(rest)
        yield beginning, size


def _key(text: str) -> int:
    """A hash of the text without regard to case and white space, as SQLite's signed integer."""
    return xxhash.xxh3_64_intdigest(" ".join(text.lower().split()).encode()) - (1 << 63)
