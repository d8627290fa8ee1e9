"""Records of data files: JSON Lines, a JSON list, Parquet, data sets on the Hugging Face hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import open_binary, parse_json, read_jsonl, refuse_pointer
from openqwen.support.hub import DATA_SUFFIXES, HUB, dataset_files

Record = dict[str, Any]


def read_records(source: str | Path) -> Iterator[tuple[str, Record]]:
    """Yield each record with its place, "FILE, record N", counted from 1.

    source: a file or `hub:owner/name[@revision][:split]`. Raises OpenQwenError that names the file
    and the line or record that cannot be read.
    """
    for path in data_files(source):
        for number, record in enumerate(_reader(path)(path), 1):
            yield f"{path}, record {number}", record


def count_records(source: str | Path) -> int | None:
    """The number of records, for a progress line; None where that would mean to parse them."""
    total = 0
    for path in data_files(source):
        try:
            if path.suffix == ".parquet":
                total += pq.read_metadata(path).num_rows
            elif _reader(path) is _list:
                return None
            else:
                with open_binary(path) as file:
                    total += sum(1 for line in file if line.strip())
        except (pa.ArrowException, OSError):
            return None  # reading it says what is wrong
    return total


def data_files(source: str | Path) -> list[Path]:
    """The files of a source, in order: the file itself, or those of a split, downloaded."""
    if str(source).startswith(HUB):
        return dataset_files(str(source))
    path = Path(source)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        do = f"give a file ({', '.join(DATA_SUFFIXES)}) or {HUB}owner/name:split"
        raise OpenQwenError(f"This {kind}.", path, do)
    return [path]


def _reader(path: Path) -> Any:
    if path.suffix == ".parquet":
        return _parquet
    return _list if path.name.endswith((".json", ".json.gz", ".json.zst")) else read_jsonl


def _list(path: Path) -> Iterator[Record]:
    """Records of a JSON list, as in Alpaca's file, or of JSON Lines with the ending .json."""
    try:
        with open_binary(path) as file:
            text = file.read()
    except OSError as error:
        raise OpenQwenError(f"This file cannot be read: {error}", where=path) from None
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from read_jsonl(path)
        return
    try:
        records = parse_json(text)
    except ValueError as error:
        raise OpenQwenError(f"This file is not JSON: {error}.", where=path) from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            where = f"{path}, record {number}"
            raise OpenQwenError("This is not an object.", where, "give a list of objects")
        yield record


def _parquet(path: Path) -> Iterator[Record]:
    try:
        refuse_pointer(path)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist(maps_as_pydicts="lossy"):
                    yield _present(record)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise OpenQwenError(f"This Parquet file cannot be read: {error}", where=path) from None


def _present(value: Any) -> Any:
    """The value without null fields: Parquet stores a field that a record lacks as null."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
