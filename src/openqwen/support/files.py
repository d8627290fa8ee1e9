"""Files: atomic writing, strict JSON and JSON Lines, digests, folders."""

import gzip
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa

from openqwen.support.errors import OpenQwenError, disk_errors

_CHUNK = 2**20
_POINTER = b"version https://git-lfs.github.com/spec/"
# Most levels of JSON. Code that walks through a value recurses a few times per level, and Python
# allows about a thousand calls.
_DEEPEST = 100


@contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file (UTF-8, or "wb") for writing, atomically: a reader sees the old file or the new.

    The block writes to a temporary file, which is then flushed to the disk and renamed. Where the
    block fails it is removed.
    """
    aside = path.with_name(f".{path.name}.aside")
    try:
        with disk_errors(path):
            with open(aside, mode, encoding=None if mode == "wb" else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer: a few lines of text in place of the real content."""
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def refuse_pointer(path: Path) -> None:
    """Raise OpenQwenError if the file is a git-lfs pointer, OSError if it cannot be opened."""
    if is_pointer(path):
        raise OpenQwenError(
            "This is a git-lfs pointer: the file itself was not fetched.",
            where=path,
            do="run `git lfs pull` in its folder, or fetch the file again",
        )


def parse_json(text: str | bytes) -> Any:
    """The value of strict JSON; whatever it returns can be written as JSON in UTF-8 again.

    Raises ValueError with a plain message. It also refuses what Python's parser accepts: NaN and
    infinite numbers, more than 100 levels, and lone surrogates, which UTF-8 cannot encode.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"it has more than {_DEEPEST} levels") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"byte 0x{byte:02x} at {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    except ValueError:  # the parser's own limit for integers
        raise ValueError("an integer has thousands of digits") from None
    _check(value, _DEEPEST)
    return value


def _check(value: Any, levels: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a text has a lone surrogate, half of a character") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a number in JSON; write null")
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"it has more than {_DEEPEST} levels")
        for inner in value:
            _check(inner, levels - 1)
            if isinstance(value, dict):
                _check(value[inner], levels - 1)


def read_json(path: Path) -> Any:
    """The value in a JSON file. OpenQwenError names the file and the line."""
    try:
        refuse_pointer(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OpenQwenError("A file is missing.", where=path, do="check the path") from None
    except (ValueError, RecursionError) as error:
        raise OpenQwenError(f"This file is not valid JSON: {error}", where=path) from None


def open_binary(path: Path) -> io.BufferedReader:
    """Open for reading; .gz and .zst are unpacked. Reading a truncated archive raises OSError."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _CHUNK)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file (.gz and .zst too).

    Lines end at newline bytes only: str.splitlines() would also cut at U+2028 and U+0085, which may
    occur inside a string.
    """
    for _, record in numbered_jsonl(path):
        yield record


def numbered_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place ("FILE:LINE")."""
    try:
        refuse_pointer(path)
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _object(line, where)
    except OSError as error:
        raise OpenQwenError(f"This file cannot be read: {error}", where=path) from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        what = f"This line is not JSON: {error}."
        raise OpenQwenError(what, where, "write one object per line") from None
    if not isinstance(record, dict):
        what = "This line is JSON but not an object."
        raise OpenQwenError(what, where, "write one object per line")
    return record


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records atomically, one JSON object per line; returns their number."""
    count = 0
    with whole_file(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(aside: Path, target: Path) -> None:
    """Move a finished folder to `target`, where it replaces an older one.

    Its files are flushed to the disk first. If the process is killed in between, the older folder
    remains as `.NAME.old`.
    """
    old = target.with_name(f".{target.name}.old")
    with disk_errors(target):
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(aside, target)
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def fresh_folder(path: Path) -> Path:
    """Make an empty folder at `path`; anything that was there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of the texts, compressed by `gzip -9` as one stream.

    A language model should need fewer. Raises OpenQwenError where there is no text.
    """
    raw = "".join(texts).encode()
    if not raw:
        raise OpenQwenError(
            "There is no held-out text.", do="give a corpus whose held-out split is not empty"
        )
    return 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)
