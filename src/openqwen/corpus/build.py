"""The corpus stage: read, cap, clean, filter, deduplicate, hold out, and account for it all.

    files → raw chunks → mapped chunks → decisions over all → final chunks → Parquet

Documents are streamed through files in chunks; work.py says what is done with one. The chunks are
worked on in this process, in several, or on a Ray cluster: the corpus is the same to the byte. A
run that was killed goes on with the chunks that are not finished.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from openqwen.corpus.config import CorpusConfig
from openqwen.corpus.decide import CorpusComparison, check_classifier
from openqwen.corpus.decisions import DECISIONS, Decisions
from openqwen.corpus.decontaminate import read_items
from openqwen.corpus.deduplicate import exact_key
from openqwen.corpus.documents import (
    HELDOUT,
    TRAIN,
    Document,
    DocumentEntry,
    read_documents,
    write_documents,
)
from openqwen.corpus.mixture import beyond_cap, heldout
from openqwen.corpus.read import QUARANTINE, Skips
from openqwen.corpus.report import Account, flat_metrics, mixture_report
from openqwen.corpus.work import (
    EXTRA,
    FINAL,
    MAPPED,
    PLAN,
    RAW,
    MapItem,
    ReadUnit,
    applying,
    begin_work,
    entries_of,
    make_reader,
    mapping,
    new_account,
    reading,
    write_compact,
    write_documents_jsonl,
)
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import fresh_folder, read_json, read_jsonl, whole_file, write_json
from openqwen.support.progress import progress
from openqwen.support.workers import joined_ray, map_in_order

_UNIT_BYTES = 8_000_000  # of files that are read together
_UNIT_FILES = 2_000


def build_corpus(
    config: CorpusConfig,
    extra_documents: Iterable[Document],
    folder: Path,
    seed: int = 0,
    scratch: Path | None = None,
) -> dict[str, float]:
    """Write a corpus into `folder`: its documents, its report and its decisions.

    The files are train.parquet, heldout.parquet, corpus.json, decisions.parquet and
    quarantine.jsonl.

    Args:
        extra_documents: ready documents (the multi-task instruction data that Qwen2 mixes in). They
            go through exact deduplication and the held-out split, but not through the filters and
            near-deduplication, because their templates look alike.
        seed: decides which documents are held out, and which stay where a source is capped.
        scratch: holds the chunks. A later call with the same arguments goes on from what is there.
            By default a folder that is removed.

    Raises:
        OpenQwenError: where nothing is left to train on, or more than `max_quarantined` of the
            input could not be read.

    Memory: one chunk for each worker, and 40 bytes for each document while keys are sorted.
    """
    if scratch is None:
        with TemporaryDirectory(prefix=".", dir=folder) as name:
            return build_corpus(config, extra_documents, folder, seed, Path(name))
    with ExitStack() as stack:
        if config.engine == "ray":  # one cluster for all steps
            stack.enter_context(joined_ray(config.workers))
        return _Build(config, folder, scratch, seed).run(extra_documents)


class _Build:
    """One run of the stage; its steps are in the order of `run`."""

    def __init__(self, config: CorpusConfig, folder: Path, scratch: Path, seed: int):
        self.config, self.folder, self.scratch, self.seed = config, folder, scratch, seed
        self.account: Account = new_account(config)

    def run(self, extra_documents: Iterable[Document]) -> dict[str, float]:
        check_classifier(self.config)
        if self.config.decontaminate:
            read_items(self.config.decontaminate)  # an error is better now than in a worker
        chunks, read = self._read()
        self._all("filter", mapping, self._map_items(chunks), len(chunks))
        for name in chunks:
            self.account.merge(self._json(MAPPED, name)["steps"])
        if not any(self._json(MAPPED, name)["entries"] for name in chunks):
            what = "Every document was filtered out."
            raise _nothing_left(what, self.config, self.account.reasons())
        chunks = [*chunks, *self._extra(extra_documents)]
        comparison = CorpusComparison(self.config, chunks, self.scratch)
        comparison.run()
        if count := comparison.duplicate_ids():
            read["read"]["duplicate_ids"] = count
        self._all("deduplicate", applying, comparison.fates(), len(chunks))
        for name in chunks:
            self.account.merge(self._json(FINAL, name)["steps"])
        entries = _Entries(self.scratch / FINAL, chunks)
        held = self._held_out(entries)
        for part, in_part in ((TRAIN, False), (HELDOUT, True)):
            documents = (d for d in self._final(chunks) if (d["id"] in held) == in_part)
            write_documents(self.folder / part, documents)
        with Decisions(self.folder / DECISIONS) as decisions:
            for name in chunks:
                decisions.add(self._decisions(name))
        report = {
            **read,
            "steps": [step.json() for step in self.account.steps.values()],
            **mixture_report(
                entries, held, read_documents(self.folder / HELDOUT), self.config.weights
            ),
        }
        write_json(self.folder / "corpus.json", report)
        self._refuse_damage(report)
        return flat_metrics(report)

    def _all(
        self,
        label: str,
        make: Callable[..., Callable[[Any], None]],
        items: Iterable[Any],
        total: int,
        *arguments: Any,
    ) -> None:
        """Work on all items by the workers that the configuration names."""
        function = partial(begin_work, make, self.config, self.scratch, *arguments)
        with progress(label, total, "chunks") as bar:
            work = map_in_order(function, items, self.config.engine, self.config.workers)
            for _ in work:
                bar.advance()

    def _read(self) -> tuple[list[str], dict[str, Any]]:
        """Read all files; returns the chunks' names and corpus.json's part on reading."""
        reader = make_reader(self.config)
        units = list(_units(reader.listing()))
        self._begin(units)
        self._all("read", reading, units, len(units), self.seed)
        chunks: list[str] = []
        files = size = 0
        skips = reader.skips  # what the listing met
        with whole_file(self.folder / QUARANTINE) as quarantine:
            for skip in skips.listed:
                quarantine.write(json.dumps(skip) + "\n")
            for unit in units:
                done = read_json(self.scratch / RAW / f"{unit.number:08}.unit.json")
                chunks += done["chunks"]
                files, size = files + done["files"], size + done["bytes"]
                skips.merge(done["skipped"])
                lines = self.scratch / RAW / f"{unit.number:08}.quarantine"
                quarantine.write(lines.read_text(encoding="utf-8"))
        count = sum(len(self._json(RAW, name)) for name in chunks)
        if not count:
            reasons = {reason: entry["count"] for reason, entry in skips.reasons.items()}
            what = "The corpus has no document that can be read."
            raise _nothing_left(what, self.config, reasons)
        read = {"files": files, "documents": count, "bytes": size}
        return chunks, {"read": read, "skipped": skips.reasons}

    def _begin(self, units: Sequence[ReadUnit]) -> None:
        """Keep the scratch folder if it is of the same input and settings; else empty it."""
        stamps = []
        for unit in units:
            for path, name in unit.files:
                status = path.stat() if path.exists() else None
                stamps.append([name, status and status.st_size, status and status.st_mtime_ns])
        settings = self.config.model_dump(mode="json")
        text = json.dumps([settings, self.seed, stamps], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        plan = self.scratch / PLAN
        if not plan.exists() or read_json(plan) != digest:
            for name in (RAW, MAPPED, FINAL):
                fresh_folder(self.scratch / name)
            write_json(plan, digest)

    def _map_items(self, chunks: Sequence[str]) -> Iterator[MapItem]:
        entries = _Entries(self.scratch / RAW, chunks)
        left_out = np.zeros(0, bool)
        if self.config.max_bytes:
            left_out = beyond_cap(entries, self.config.max_bytes, self.seed)
        start = 0
        for name in chunks:
            count = len(self._json(RAW, name))
            mine = left_out[start : start + count]
            yield MapItem(name, frozenset(np.flatnonzero(mine).tolist()))
            start += count

    def _extra(self, documents: Iterable[Document]) -> list[str]:
        """Write the extra documents as a mapped chunk."""
        given = list(documents)
        if not given:
            return []
        exact = b"".join(exact_key(document["text"]) for document in given)
        keys: dict[str, Any] = {
            "exact": np.frombuffer(exact, np.uint64).reshape(-1, 2),
            "numbers": np.arange(len(given)),
            "owners": np.zeros(0, np.int64),
            "spans": np.zeros((0, 2), np.int64),
            "given": np.zeros(0, np.uint64),
        }
        folder = self.scratch / MAPPED
        if not (self.scratch / FINAL / f"{EXTRA}.json").exists():
            write_documents_jsonl(folder / f"{EXTRA}.jsonl", given)
        with whole_file(folder / f"{EXTRA}.npz", "wb") as file:
            np.savez(file, **keys)
        entries = list(map(DocumentEntry.of, given))
        empty: dict[str, Any] = {"contaminated": {}, "scores": {}, "decisions": []}
        write_compact(folder / f"{EXTRA}.json", {"entries": entries, **empty})
        return [EXTRA]

    def _held_out(self, entries: "_Entries") -> set[str]:
        held = heldout(entries, self.config.heldout_share, self.config.heldout_max_bytes, self.seed)
        if held:
            return held
        count = sum(1 for _ in entries)
        raise OpenQwenError(
            f"No document could be held out: the corpus has {count} after filtering.",
            where=self.config.folder,
            do="give more than one document, and not all of them above "
            f"{self.config.heldout_max_bytes:,} bytes (heldout_max_bytes): scores are taken on "
            "documents that training never saw",
        )

    def _final(self, chunks: Sequence[str]) -> Iterator[Document]:
        for name in chunks:
            yield from read_jsonl(self.scratch / FINAL / f"{name}.jsonl")

    def _decisions(self, name: str) -> list[dict[str, Any]]:
        """All rows about a chunk's documents, in their order."""
        both = self._json(MAPPED, name)["decisions"] + self._json(FINAL, name)["decisions"]
        return [row for _, row in sorted(both, key=lambda pair: pair[0])]

    def _json(self, folder: str, name: str) -> Any:
        return read_json(self.scratch / folder / f"{name}.json")

    def _refuse_damage(self, report: Mapping[str, Any]) -> None:
        """Raise OpenQwenError if too much could not be read. All is done, and kept in scratch."""
        bad = Skips.quarantined(report["skipped"])
        share = bad / (bad + report["read"]["documents"])
        if share > self.config.max_quarantined:
            raise OpenQwenError(
                f"{bad:,} files or records could not be read, {share:.1%} of all; the limit is "
                f"{self.config.max_quarantined:.1%}.",
                where=self.folder / QUARANTINE,
                do="mend or remove them, or raise max_quarantined and run the same command again: "
                "it goes on from what is done",
            )


class _Entries:
    """The entries of all documents of chunks, read from their files each time."""

    def __init__(self, folder: Path, chunks: Sequence[str]):
        self._folder, self._chunks = folder, chunks

    def __iter__(self) -> Iterator[DocumentEntry]:
        for name in self._chunks:
            yield from entries_of(self._folder / f"{name}.json")


def _units(files: Iterable[tuple[Path, str]]) -> Iterator[ReadUnit]:
    """Consecutive files that are read together: 8 MB of them, or one larger file."""
    number = size = 0
    unit: list[tuple[Path, str]] = []
    for file in files:
        unit.append(file)
        size += file[0].stat().st_size if file[0].exists() else 0
        if size >= _UNIT_BYTES or len(unit) == _UNIT_FILES:
            yield ReadUnit(number, unit)
            number, size, unit = number + 1, 0, []
    if unit:
        yield ReadUnit(number, unit)


def _nothing_left(what: str, config: CorpusConfig, reasons: Mapping[str, int]) -> OpenQwenError:
    common = sorted(((count, reason) for reason, count in reasons.items()), reverse=True)[:4]
    listed = ", ".join(f"{count} x {reason}" for count, reason in common) or "no files"
    return OpenQwenError(
        what,
        where=config.folder or "this Python's standard library",
        do="give a folder with .txt, .md, .rst, .html, .warc, .jsonl, .parquet or code files that "
        f"pass the rules (--help shows every threshold); found: {listed}",
    )
