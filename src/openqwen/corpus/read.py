"""Documents from a folder of files, in a fixed order; what is skipped is counted, with the reason.

A document is {"id", "text", "source", "language", "meta"}. `id` is the path inside the folder, with
`#number` for one record among many; `source` is the name of the top-level subfolder, or
"documents"; meta["profile"] names the rules by which it is filtered.
"""

import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text

from openqwen.corpus.documents import Document, utf8_size
from openqwen.corpus.streams import (
    PACKED,
    HostileFileError,
    bounded,
    decode,
    lines,
    open_bounded,
    panics_named,
)
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import is_pointer

_CODE = """
    py pyi pyx c h cc cpp cxx hpp hh cu java kt scala cs go rs swift js jsx mjs ts tsx rb php pl pm
    lua r jl hs ml clj ex exs erl dart sh bash zsh ps1 sql m mm asm s f f90 f95 zig nim v vhd proto
    cmake mk el lisp scm vim"""
_PROFILES = {
    **{f".{suffix}": "code" for suffix in _CODE.split()},
    **dict.fromkeys(("", ".txt", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "web"),
}
_RECORDS = {".jsonl", ".ndjson"}
_KINDS = {*_RECORDS, ".parquet", ".warc", ".zip"}
_PAGES = {"text/html", "application/xhtml+xml", "text/plain"}  # types in web archives
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError)  # RuntimeError: a password
_IGNORED_FOLDERS = {"__pycache__", ".git", ".hg", ".svn", "node_modules"}
_CONTAINER = re.compile(
    r"<(/?)(?:div|span|section|article|blockquote|table|ul|ol|font|center)\b", re.IGNORECASE
)
_MAX_DEPTH = 2000  # browsers stop at 512; the time of extraction grows with the square of the depth
_EXAMPLES = 3  # shown for each reason
QUARANTINE = "quarantine.jsonl"  # of a corpus artifact: what was not read, and why
# What any folder has beside texts.
_NO_FAULT = {"unknown file type", "no page", "empty", "folder linked again", "broken link"}


class Skips:
    """What was not read, and why: a count for each reason, with a few examples.

    record: called with each; by default they are in `listed`.
    """

    def __init__(self, record: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.reasons: dict[str, dict[str, Any]] = {}
        self.listed: list[dict[str, Any]] = []
        self._record = record or self.listed.append

    def add(self, reason: str, file: str, line: int | None = None, why: str = "") -> None:
        """Count one skipped file, or the record in its line `line` (from 1)."""
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append({"file": file, "line": line, "why": why})
        place = file if line is None else f"{file}#{line}"
        self._record({"id": place, "reason": reason, "text": why})

    def merge(self, reasons: Mapping[str, Any]) -> None:
        """Add the counts of files that come later."""
        for reason, more in reasons.items():
            entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += more["count"]
            entry["examples"] = (entry["examples"] + more["examples"])[:_EXAMPLES]

    @staticmethod
    def quarantined(reasons: Mapping[str, Any]) -> int:
        """How many were skipped for a fault, not because they are no text."""
        return sum(e["count"] for reason, e in reasons.items() if reason not in _NO_FAULT)


class FolderReader:
    """Iterates over the documents of a folder.

    Afterwards `skips`, `files` and `bytes` hold what was skipped and read.

    Args:
        max_bytes: of a document; longer files and lines are skipped and never held in memory.
        exclude: names of folders that are left out and not counted.
        repair: whether texts in other encodings than UTF-8, and misread ones, are mended.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        exclude: frozenset[str] = frozenset(),
        repair: bool = True,
    ):
        if not folder.exists():
            raise OpenQwenError(
                "The corpus folder does not exist.",
                where=folder,
                do="check the path given as --corpus",
            )
        if not folder.is_dir():
            raise OpenQwenError(
                "The corpus is not a folder.",
                where=folder,
                do="give the folder that holds the file",
            )
        self.folder, self.max_bytes, self.exclude = folder, max_bytes, exclude | _IGNORED_FOLDERS
        self.repair = repair
        self.skips = Skips()
        self.files = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[Document]:
        for path, name in self.listing():
            yield from self.documents(path, name)

    def begin(self, record: Callable[[dict[str, Any]], Any]) -> None:
        """Count anew; record: called with what is skipped."""
        self.skips, self.files, self.bytes = Skips(record), 0, 0

    def documents(self, path: Path, name: str) -> Iterator[Document]:
        """The documents of one entry of the listing."""
        yield from self.read(path, name)

    def listing(self) -> list[tuple[Path, str]]:
        """Regular files in the order of their names, each with its name in ids.

        A folder that links lead to again is entered once.
        """
        return list(self._walk(self.folder, "", set()))

    def _walk(
        self, folder: Path, name: str, entered: set[tuple[int, int]]
    ) -> Iterator[tuple[Path, str]]:
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            self.skips.add("unreadable folder", name, why=error.strerror or str(error))
            return
        if (status.st_dev, status.st_ino) in entered:
            self.skips.add(
                "folder linked again", name, why="a link leads to a folder that was read before"
            )
            return
        entered.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith(".") or entry.name in self.exclude:
                continue
            # A file name need not be UTF-8, an id must be.
            shown = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            inner = f"{name}/{shown}" if name else shown
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                self.skips.add("broken link", inner, why=error.strerror or str(error))
                continue
            if stat.S_ISDIR(mode):
                yield from self._walk(Path(entry.path), inner, entered)
            elif stat.S_ISREG(mode):
                yield Path(entry.path), inner
            else:  # opening a pipe would wait forever
                self.skips.add("not a regular file", inner, why=f"mode {stat.filemode(mode)}")

    def read(self, path: Path, name: str) -> Iterator[Document]:
        """The documents of one file; a fault in it is counted in `skips`."""
        kind = _kind(path.name)
        if kind not in _KINDS and kind not in _PROFILES:
            self.skips.add("unknown file type", name, why=f"no reader for {path.suffix.lower()}")
            return
        self.files += 1
        try:
            if is_pointer(path):
                self.skips.add("git-lfs pointer", name, why="the file itself was not fetched")
                return
            self.bytes += path.stat().st_size
            if kind == ".parquet":
                yield from self._parquet(path, name)
            elif kind == ".zip":
                yield from self._zip(path, name)
            else:
                with open_bounded(path) as stream:
                    yield from self._stream(stream, name, kind)
        except HostileFileError as error:
            self.skips.add(error.reason, name, why=error.why)
        except (OSError, EOFError, pa.ArrowException, UnicodeDecodeError, *_ZIP_ERRORS) as error:
            # The system's errors have a number; those of a damaged archive have none.
            from_system = getattr(error, "errno", None) is not None
            packed = path.suffix.lower() in (*PACKED, ".parquet", ".zip", ".warc")
            reason = "damaged file" if packed and not from_system else "unreadable file"
            why = getattr(error, "strerror", None) or str(error).split("\n")[0]
            self.skips.add(reason, name, why=why)

    def _stream(self, stream: IO[bytes], name: str, kind: str) -> Iterator[Document]:
        if kind in _RECORDS:
            yield from self._jsonl(stream, name)
        elif kind == ".warc":
            yield from self._warc(stream, name)
        else:
            yield from self._text(stream, name, _PROFILES[kind])

    def _zip(self, path: Path, name: str) -> Iterator[Document]:
        """The files in an archive, but for archives in it."""
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                kind = _kind(member.filename)
                inner = f"{name}/{member.filename.encode('utf-8', 'replace').decode('utf-8')}"
                if member.is_dir():
                    continue
                if kind not in _PROFILES and kind not in _RECORDS:
                    self.skips.add("unknown file type", inner, why=f"no reader for {kind}")
                    continue
                try:
                    with archive.open(member) as packed:
                        stream = bounded(packed, member.compress_size)
                        yield from self._stream(stream, inner, kind)
                except HostileFileError as error:
                    self.skips.add(error.reason, inner, why=error.why)
                except _ZIP_ERRORS as error:
                    self.skips.add("damaged file", inner, why=str(error))

    def _warc(self, stream: IO[bytes], name: str) -> Iterator[Document]:
        """Pages of a web archive: answers with status 200, and texts made from them (WET)."""
        kinds = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
        records = iter(ArchiveIterator(stream, record_types=kinds, auto_decode="all"))
        number = 0
        while True:
            with panics_named():
                record = next(records, None)
            if record is None:
                return
            number += 1
            status = record.http_headers.status_code if record.http_headers else None
            kind = (record.http_content_type or record.headers.get("Content-Type") or "").lower()
            kind = kind.partition(";")[0].strip()
            if status not in (None, 200) or kind not in _PAGES:
                why = f"status {status}, {kind or 'no type'}"
                self.skips.add("no page", name, number, why)
                continue
            with panics_named():
                raw = record.reader.read(self.max_bytes + 1)
            given = {"url": record.headers.get("WARC-Target-URI"), "date": record.record_date}
            meta = {key: str(value) for key, value in given.items() if value}
            profile = "text" if kind == "text/plain" and status else "web"
            yield from self._page(raw, name, number, profile, kind != "text/plain", meta)

    def _text(self, stream: IO[bytes], name: str, profile: str) -> Iterator[Document]:
        raw = stream.read(self.max_bytes + 1)
        yield from self._page(raw, name, None, profile, profile == "web", {})

    def _page(
        self,
        raw: bytes,
        name: str,
        number: int | None,
        profile: str,
        markup: bool,
        meta: dict[str, Any],
    ) -> Iterator[Document]:
        """The document of a file or of an archive's record; markup: it is HTML."""
        if len(raw) > self.max_bytes:
            self.skips.add("too long", name, number, f"more than {self.max_bytes:,} bytes")
            return
        wide = self.repair and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        if b"\0" in raw and not wide:
            self.skips.add("binary file", name, number, f"zero byte at {raw.index(0)}")
            return
        try:
            text, encoding = decode(raw, self.repair)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            why = f"byte 0x{raw[error.start]:02x} at {error.start}"
            self.skips.add("invalid UTF-8", name, number or line, why)
            return
        if encoding != "utf-8":
            meta["encoding"] = encoding
        if markup:
            if (depth := html_depth(text)) > _MAX_DEPTH:
                why = f"{depth:,} elements deep, limit {_MAX_DEPTH:,}"
                self.skips.add("nested too deeply", name, number, why)
                return
            text = html_text(text)
        for document in self._document(text, name, number, profile, {}):
            document["meta"] |= meta
            yield document

    def _jsonl(self, stream: IO[bytes], name: str) -> Iterator[Document]:
        for number, line in enumerate(lines(stream, self.max_bytes), 1):
            if line is None:
                self.skips.add("too long", name, number, f"line over {self.max_bytes:,} bytes")
            elif line.strip():
                yield from self._record(line, name, number)

    def _record(self, line: bytes, name: str, number: int) -> Iterator[Document]:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            why = f"byte 0x{line[error.start]:02x} at {error.start} of the line"
            self.skips.add("invalid UTF-8", name, number, why)
            return
        # RecursionError and some ValueErrors: nesting and numbers that Python refuses to read.
        except (ValueError, RecursionError) as error:
            self.skips.add("not JSON", name, number, str(error))
            return
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            yield from self._document(record["text"], name, number, "web", record)
            return
        is_object = isinstance(record, dict)
        what = f"fields {sorted(record)[:8]}" if is_object else f"a {type(record).__name__}"
        why = f"wanted an object with a string 'text', found {what}"
        self.skips.add("no text", name, number, why)

    def _parquet(self, path: Path, name: str) -> Iterator[Document]:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                self.skips.add("no text", name, why=f"no column 'text' among {names[:8]}")
                return
            columns = [column for column in ("id", "text", "language") if column in names]
            batches = file.iter_batches(batch_size=64, columns=columns)
            records = (record for batch in batches for record in batch.to_pylist())
            for number, record in enumerate(records, 1):
                text = record["text"]
                if isinstance(text, str):
                    yield from self._document(text, name, number, "web", record)
                else:
                    self.skips.add("no text", name, number, f"'text' is a {type(text).__name__}")

    def _document(
        self, text: str, name: str, number: int | None, profile: str, record: dict[str, Any]
    ) -> Iterator[Document]:
        try:
            size = utf8_size(text)
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but not text
            why = f"lone surrogate at character {error.start}"
            self.skips.add("invalid Unicode", name, number, why)
            return
        if size > self.max_bytes:
            self.skips.add("too long", name, number, f"{size:,} bytes, limit {self.max_bytes:,}")
            return
        if not text.strip():
            self.skips.add("empty", name, number)
            return
        language = record.get("language")
        meta: dict[str, Any] = {"profile": profile}
        if isinstance(record.get("id"), str | int):
            meta["id"] = str(record["id"]).encode("utf-8", "replace").decode("utf-8")
        if isinstance(record.get("origin"), dict):  # how a synthetic text came to be
            meta["origin"] = record["origin"]
        yield {
            "id": name if number is None else f"{name}#{number}",
            "text": text,
            "source": _source(name),
            "language": language if isinstance(language, str) and language.isascii() else "",
            "meta": meta,
        }


def html_text(page: str) -> str:
    """The main content of a web page as plain text: no markup, menus, scripts or forms."""
    return extract_plain_text(
        page, main_content=True, alt_texts=False, links=False, form_fields=False
    )


def html_depth(page: str) -> int:
    """How deep the containers of a page are nested.

    Elements whose end tag may be left out are not counted.
    """
    depth = deepest = 0
    for tag in _CONTAINER.finditer(page):
        depth += -1 if tag[1] else 1
        deepest = max(deepest, depth)
    return deepest


def _source(name: str) -> str:
    """The top-level subfolder as a word that can be a file name; "documents" for files in none."""
    top, slash, _ = name.partition("/")
    word = re.sub(r"[^\w-]+", "_", top) if slash else "documents"
    return "tokens_" if word == "tokens" else word  # tokens.json is the table of all shards


def _kind(name: str) -> str:
    """The ending by which a file is read, in lower case and without that of its packing."""
    lower = Path(name.lower())
    return Path(lower.stem).suffix if lower.suffix in PACKED else lower.suffix
