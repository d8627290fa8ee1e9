"""Files that are either whole or absent, digests, and JSON Lines with errors that name the line."""

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
_DEEPEST = 100  # levels of JSON; what walks through a value later recurses a few times a level


@contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file (UTF-8, or "wb") to write aside, then flushed to the disk and renamed, or removed
    where something fails.

    A reader sees the old file or the new one, never half.
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
    """Whether git-lfs has left its few lines of text here in place of the file itself."""
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def refuse_pointer(path: Path) -> None:
    """OpenQwenError where the file is a git-lfs pointer; OSError where it cannot be opened."""
    if is_pointer(path):
        raise OpenQwenError(
            "This is a git-lfs pointer: the file itself was not fetched.",
            where=path,
            do="run `git lfs pull` in its folder, or fetch the file again",
        )


def parse_json(text: str | bytes) -> Any:
    """The value of strict JSON, which can be written again, rendered and encoded.

    Raises ValueError, in plain words. Besides what Python refuses: NaN and infinite numbers,
    integers of thousands of digits, more than 100 levels, and surrogates that stand alone, which
    are no text.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"it has more than {_DEEPEST} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    except ValueError:  # of an integer
        raise ValueError("an integer has thousands of digits") from None
    _check(value, _DEEPEST)
    return value


def _check(value: Any, levels: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds a lone surrogate, half of a character") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a number of JSON; write null")
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"it has more than {_DEEPEST} levels")
        for inner in value:
            _check(inner, levels - 1)
            if isinstance(value, dict):
                _check(value[inner], levels - 1)


def read_json(path: Path) -> Any:
    """The value in a JSON file; an error names the file and the line."""
    try:
        refuse_pointer(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OpenQwenError("A file is missing.", where=path, do="check the path") from None
    except (ValueError, RecursionError) as error:
        raise OpenQwenError(f"This file is not valid JSON: {error}", where=path) from None


def open_binary(path: Path) -> io.BufferedReader:
    """Open for reading, unpacking .gz and .zst on the way; a truncated archive raises OSError when
    it is read.
    """
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _CHUNK)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file (.gz and .zst too), split on newline bytes only.

    str.splitlines() would also cut at U+2028 and U+0085 inside a string.
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
        raise OpenQwenError(
            f"This line is not JSON: {error}.", where, "write one object a line"
        ) from None
    if not isinstance(record, dict):
        raise OpenQwenError(
            "This line is JSON but not an object.", where, "write one object a line"
        )
    return record


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records atomically, one JSON object a line; returns how many."""
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
    """Put a finished folder in the place of what stands there, if anything does, flushed to the
    disk first.

    A kill on the way leaves what stood there as `.NAME.old`.
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
    """An empty folder at `path`, whatever stood there before."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits that `gzip -9` needs for a byte of the texts, packed as one stream: what a language
    model must beat.

    Raises OpenQwenError where there is no text.
    """
    raw = "".join(texts).encode()
    if not raw:
        raise OpenQwenError(
            "There is no held-out text.", do="give a corpus whose held-out split is not empty"
        )
    return 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)
