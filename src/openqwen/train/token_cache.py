"""Records as token ids: encoded once, over all ranks, and kept on the disk beside the states.

    scratch/demonstrations/
        index.json       what the samples were made from, counts, and the digest of each other file
        0.tokens         the tokens of rank 0's samples end to end, little-endian uint32
        0.samples.npy    of each of them: the number of its record, from 1, and its tokens
        1.tokens  ...    the same of rank 1

The highest bit of a token says whether it is learned. Rank r of n encodes records r, r + n, … A
reader maps the files into memory and restores the order of the records: it is the same, whatever
the number of ranks was. What stays in memory is three numbers for each sample.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import fresh_folder, read_json, replace_folder, sha256, write_json
from openqwen.support.progress import notice, progress
from openqwen.support.records import Record, count_records, data_files, read_records
from openqwen.tokenizer import Tokenizer
from openqwen.train.packed_batch import Sample
from openqwen.train.parallel import World, join

# The samples of a record. Arguments: the record, its place for errors, what to count in.
Encode = Callable[[Record, str, Counter[str]], Sequence[Sample]]

_FORMAT = 1  # raise it when the files change: caches with another number are rebuilt
_INDEX = "index.json"
_LEARNED = np.uint32(2**31)


class TokenCache:
    """Samples in memory-mapped files, in the order of their records.

    records: the number of each sample's record, from 1, [samples]. lengths: its tokens, [samples].
    counts: "records", and what `encode` counted.
    """

    def __init__(self, folder: Path):
        index = read_json(folder / _INDEX)
        self.counts: Counter[str] = Counter(index["counts"])
        self._files, tables = [], []
        for part in range(index["parts"]):
            records_N, lengths_N = np.load(folder / f"{part}.samples.npy").T
            starts_N = lengths_N.cumsum() - lengths_N
            tables.append([records_N, lengths_N, starts_N, np.full(len(records_N), part)])
            path = folder / f"{part}.tokens"
            empty = np.empty(0, np.uint32)  # an empty file cannot be mapped
            self._files.append(np.memmap(path, "<u4", "r") if len(records_N) else empty)
        table = np.concatenate(tables, axis=1)
        # Stable: samples of one record stay in their order.
        order = np.argsort(table[0], kind="stable")
        self.records, self.lengths, self._starts, self._parts = table[:, order]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A sample's token ids, int64 [tokens], and which are learned, bool [tokens]."""
        start, length = self._starts[index], self.lengths[index]
        tokens = self._files[self._parts[index]][start : start + length]
        return (tokens & ~_LEARNED).astype(np.int64), tokens >= _LEARNED


def encode_records(
    source: Path,
    tokenizer: Tokenizer,
    encode: Encode,
    folder: Path,
    label: str,
    settings: Mapping[str, Any] | None = None,
) -> TokenCache:
    """The samples of a source (see `read_records`): from the cache in `folder`, or encoded now.

    A cache of other data, another tokenizer or other settings, and one that is damaged, is made
    anew. Every rank calls this.

    Args:
        folder: a folder that all ranks share; it is written aside, then renamed.
        label: of the progress line.
        settings: what else `encode` depends on, as JSON holds it.

    Raises:
        OpenQwenError: on every rank, for the first record that cannot be encoded.
    """
    world = join()
    made_from: dict[str, Any] = {}
    if world.main:
        digests = [sha256(path) for path in data_files(source)]
        settings = dict(settings or {})
        made_from = {"format": _FORMAT, "data": digests, "settings": settings}
        made_from["tokenizer"] = _digest(tokenizer)
    if not world.broadcast(world.main and _is_current(folder, made_from)):
        _make(source, encode, folder, label, made_from, world)
    return TokenCache(folder)


def _digest(tokenizer: Tokenizer) -> str:
    # All that a copy is built from decides the ids: vocabulary, merges, added tokens, templates.
    return hashlib.sha256(repr(tokenizer.__reduce__()).encode()).hexdigest()


def _is_current(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether the folder holds what would be made now, undamaged."""
    if not folder.exists():
        return False
    try:
        index = read_json(folder / _INDEX)
        if index["made_from"] != made_from:
            return False
        damaged = []
        for name, digest in index["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                damaged.append(name)
    except (OpenQwenError, KeyError, TypeError, AttributeError):
        damaged = [_INDEX]
    if damaged:
        notice(f"the token cache is damaged ({', '.join(damaged)}) and is rebuilt", folder)
    return not damaged


def _make(
    source: Path,
    encode: Encode,
    folder: Path,
    label: str,
    made_from: Mapping[str, Any],
    world: World,
) -> None:
    """Encode this rank's records; rank 0 then puts the finished folder into its place."""
    aside = folder.with_name(f".{folder.name}.aside")
    if world.main:
        fresh_folder(aside)
    world.barrier()
    with disk_errors(aside):
        counts, error = _write_part(source, encode, aside, label, world)
        parts = world.gather([(counts, error)])
        # Every rank raises the same error, the one that a single process would have met.
        if errors := [error for _, error in parts if error]:
            _, what, where, do = min(errors, key=lambda error: error[0])
            raise OpenQwenError(what, where, do)
        if world.main:
            total: Counter[str] = sum((counts for counts, _ in parts), Counter())
            files = {path.name: sha256(path) for path in sorted(aside.iterdir())}
            index = {"made_from": made_from, "parts": len(parts), "counts": total, "files": files}
            write_json(aside / _INDEX, index)
            replace_folder(aside, folder)
    world.barrier()


_Fault = tuple[int, str, str | Path | None, str | None]  # records before it; what, where, do


def _write_part(
    source: Path, encode: Encode, folder: Path, label: str, world: World
) -> tuple[Counter[str], _Fault | None]:
    """Write this rank's samples. Returns its counts, and the error that ended it, if one did."""
    counts: Counter[str] = Counter()
    table, done = array("q"), 0
    total = count_records(source) if world.main else None
    try:
        with (
            open(folder / f"{world.rank}.tokens", "wb") as file,
            progress(label, total, "records") as bar,
        ):
            for number, (where, record) in enumerate(read_records(source), 1):
                if (number - 1) % world.size == world.rank:
                    counts["records"] += 1
                    for ids, mask in encode(record, where, counts):
                        learned = np.where(mask, _LEARNED, np.uint32(0))
                        file.write((np.asarray(ids, "<u4") | learned).tobytes())
                        table.extend((number, len(ids)))
                done = number
                bar.advance()
    except OpenQwenError as error:
        return counts, (done, error.what, error.where, error.do)
    np.save(folder / f"{world.rank}.samples.npy", np.array(table, np.int64).reshape(-1, 2))
    return counts, None
