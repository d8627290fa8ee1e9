"""Files that are either whole or absent, digests, and JSON Lines with errors that name the line."""

import gzip
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from openqwen.support.errors import OpenQwenError, disk_errors

_CHUNK = 2**20


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one, never half."""
    aside = path.with_name(f".{path.name}.aside")
    with disk_errors(path):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; an error names the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OpenQwenError("A file is missing.", where=path, do="check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OpenQwenError(f"This file is not valid JSON: {error}", where=path) from None


def open_binary(path: Path) -> io.BufferedReader:
    """Open for reading, unpacking .gz and .zst on the way; a truncated archive raises OSError when it is read."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _CHUNK)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file (.gz and .zst too), split on newline bytes only.

    str.splitlines() would also cut at U+2028 and U+0085 inside a string.
    """
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path}:{number}")
    except OSError as error:
        raise OpenQwenError(f"This file cannot be read: {error}", where=path) from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OpenQwenError(f"This line is not JSON: {error}", where=where) from None
    if not isinstance(record, dict):
        raise OpenQwenError("This line is JSON but not an object.", where=where)
    return record


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records atomically, one JSON object a line; returns how many."""
    count = 0
    aside = path.with_name(f".{path.name}.aside")
    with disk_errors(path):
        with open(aside, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return count


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(aside: Path, target: Path) -> None:
    """Put a finished folder in its place, flushed to the disk first; `target` must not exist."""
    with disk_errors(target):
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.rename(aside, target)
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def fresh_folder(path: Path) -> Path:
    """An empty folder at `path`, whatever stood there before."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits that `gzip -9` needs for a byte of the texts, packed as one stream: what a language model must beat.

    Raises OpenQwenError where there is no text.
    """
    raw = "".join(texts).encode()
    if not raw:
        raise OpenQwenError("There is no held-out text.", do="give a corpus whose held-out split is not empty")
    return 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)
