"""What a worker does with one part of a corpus: read files, map a chunk, apply what was decided.

All three take a description of the part and leave files that are named after it, written aside and
then renamed. Their bytes depend on the input, the settings and the seed alone: not on which worker
makes them, or how often. So a part that is there is finished, after a kill too.

    raw/NAME.jsonl     documents as they were read; raw/NAME.json: their ids and sizes
    mapped/NAME.jsonl  those that the steps on single documents keep; NAME.json: the account of
                       these steps; NAME.npz: keys by which documents are compared
    final/NAME.jsonl   those that stay; NAME.json: the account of the other steps
"""

import json
import socket
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from openqwen.corpus.clean import Span, long_pieces
from openqwen.corpus.config import CorpusConfig
from openqwen.corpus.decisions import decision_rows
from openqwen.corpus.decontaminate import EvaluationIndex, read_items
from openqwen.corpus.deduplicate import band_keys, exact_key, signatures
from openqwen.corpus.documents import Document, DocumentEntry, utf8_size
from openqwen.corpus.identify import identify
from openqwen.corpus.installation import InstallationReader
from openqwen.corpus.mixture import in_sample
from openqwen.corpus.process import (
    DocumentVerdict,
    Step,
    apply_filters,
    apply_preset,
    cap,
    clean,
    cut_repeats,
    drop_contaminated,
    drop_exact,
    drop_low_score,
    drop_near,
    treat_personal,
)
from openqwen.corpus.published import PublishedFilters
from openqwen.corpus.quality import QualityClassifier
from openqwen.corpus.read import FolderReader
from openqwen.corpus.report import Account
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl, whole_file, write_text
from openqwen.tokenizer.fast import text_batches

RAW, MAPPED, FINAL = "raw", "mapped", "final"
PLAN = "plan.json"  # what a run's scratch folder is for; it is there before the first part
EXTRA = "extra"  # name of the chunk of documents that are given, not read
_CHUNK_BYTES = 4_000_000  # of text, or so many documents
_CHUNK_DOCUMENTS = 2_000


@dataclass(frozen=True)
class ReadUnit:
    """Consecutive files of the corpus: (path, name in ids)."""

    number: int
    files: list[tuple[Path, str]]


@dataclass(frozen=True)
class MapItem:
    """A raw chunk. left_out: the documents, by number, that a source's limit leaves out."""

    name: str
    left_out: frozenset[int]


@dataclass(frozen=True)
class Fates:
    """What was decided about the documents of a chunk, by their number in it.

    exact, near: of duplicates the id of the first document. contaminated: (where, value).
    scores: (ratings, score, least score). repeated: spans that an earlier document has.
    """

    name: str
    exact: dict[int, str] = field(default_factory=dict)
    contaminated: dict[int, tuple[str, int]] = field(default_factory=dict)
    scores: dict[int, tuple[dict[str, float], float, float]] = field(default_factory=dict)
    near: dict[int, str] = field(default_factory=dict)
    repeated: dict[int, list[Span]] = field(default_factory=dict)


def make_reader(config: CorpusConfig) -> FolderReader:
    """The reader of the corpus folder, or of Python's library."""
    if config.folder is None:
        return InstallationReader(config.max_document_bytes)
    return FolderReader(config.folder, config.max_document_bytes)


def begin_work(
    make: Callable[..., Callable[[Any], None]], config: CorpusConfig, folder: Path, *arguments: Any
) -> Callable[[Any], None]:
    """The function of a worker, which may be on another machine.

    Raises OpenQwenError where that machine does not see the files.
    """
    for what, path in (("run", folder / PLAN), ("corpus", config.folder)):
        if path is not None and not path.exists():
            raise OpenQwenError(
                f"The machine {socket.gethostname()} does not see the folder of the {what}.",
                where=path,
                do="give absolute paths of a file system that all machines of the cluster share",
            )
    return make(config, folder, *arguments)


def reading(config: CorpusConfig, folder: Path, seed: int) -> Callable[[ReadUnit], None]:
    """The function that reads a unit into raw chunks."""
    reader = make_reader(config)

    def read(unit: ReadUnit) -> None:
        done = folder / RAW / f"{unit.number:08}.unit.json"
        if done.exists():
            return
        chunks: list[str] = []
        with whole_file(folder / RAW / f"{unit.number:08}.quarantine") as quarantine:
            reader.begin(lambda skip: quarantine.write(json.dumps(skip) + "\n"))
            documents = (d for path, name in unit.files for d in reader.documents(path, name))
            wanted = (d for d in documents if in_sample(seed, config.sample, d["id"]))
            for number, chunk in enumerate(_chunks(map(_profiled, wanted))):
                name = f"{unit.number:08}-{number:06}"
                chunks.append(name)
                if not (folder / RAW / f"{name}.json").exists():
                    _write_raw(folder / RAW, name, chunk)
        counts = {"files": reader.files, "bytes": reader.bytes, "skipped": reader.skips.reasons}
        write_compact(done, {"chunks": chunks, **counts})

    def _profiled(document: Document) -> Document:
        if document["source"] in config.profiles:
            document["meta"]["profile"] = config.profiles[document["source"]]
        if preset(config, document) == "code":
            document["meta"]["profile"] = "code"
        return document

    return read


def preset(config: CorpusConfig, document: Document) -> str | None:
    """The published filters that a document gets in place of its profile's, if any."""
    return config.presets.get(document["source"], config.presets.get("*"))


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += utf8_size(document["text"])
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_raw(folder: Path, name: str, chunk: list[Document]) -> None:
    write_documents_jsonl(folder / f"{name}.jsonl", chunk)
    write_compact(folder / f"{name}.json", list(map(DocumentEntry.of, chunk)))


def write_documents_jsonl(path: Path, documents: list[Document]) -> None:
    """Write the documents of a chunk."""
    with whole_file(path) as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def write_compact(path: Path, value: Any) -> None:
    """JSON in one line."""
    write_text(path, json.dumps(value, ensure_ascii=False))


def entries_of(path: Path) -> Iterator[DocumentEntry]:
    """The entries that stand in a chunk's file."""
    found = read_json(path)
    for values in found["entries"] if isinstance(found, dict) else found:
        yield DocumentEntry(*values)


def new_account(config: CorpusConfig, rows: list[dict[str, Any]] | None = None) -> Account:
    """An account of the steps that run; rows: gets what they decided."""
    runs = {
        "personal": config.personal != "keep",
        "decontaminate": bool(config.decontaminate),
        "score": bool(config.classifier),
    } | dict.fromkeys(config.leave_out, False)

    def record(document: Document, verdict: DocumentVerdict) -> None:
        if rows is not None:
            rows.extend(decision_rows(document, verdict))

    return Account(record, [name for name, given in runs.items() if not given])


def mapping(config: CorpusConfig, folder: Path) -> Callable[[MapItem], None]:
    """The function that takes a raw chunk through the steps on single documents."""
    published = PublishedFilters(config.filters.published)
    index = EvaluationIndex(read_items(config.decontaminate)) if config.decontaminate else None
    classifier = QualityClassifier.load(config.classifier) if config.classifier else None

    def steps(number: int, left_out: Container[int]) -> Iterator[Step]:
        yield lambda document: cap(document, number in left_out, config.max_bytes)
        yield lambda document: clean(document, config.filters, _preset(document) is not None)
        if "filter" not in config.leave_out:
            yield filtered
        if (action := config.personal) != "keep":
            yield lambda document: treat_personal(document, action)

    def _preset(document: Document) -> str | None:
        name = preset(config, document)
        return None if document["meta"]["profile"] == "code" else name

    def filtered(document: Document) -> tuple[DocumentVerdict, Document]:
        if config.folder is not None and config.identify:
            document = identify(document)
        if name := _preset(document):
            return apply_preset(document, published, name)  # type: ignore[arg-type]
        return apply_filters(document, config.filters)

    def run(item: MapItem) -> None:
        done = folder / MAPPED / f"{item.name}.json"
        if done.exists():
            return
        decisions: list[list[Any]] = []  # [number in the chunk, row]
        rows: list[dict[str, Any]] = []
        account = new_account(config, rows)
        kept: list[Document] = []
        numbers = []
        for number, document in enumerate(read_jsonl(folder / RAW / f"{item.name}.jsonl")):
            left = account.kept(document, steps(number, item.left_out))
            decisions += [[number, row] for row in rows]
            rows.clear()
            if left is not None:
                kept.append(left)
                numbers.append(number)
        keys = document_keys(config, kept)
        found: dict[str, Any] = {"contaminated": {}, "scores": {}}
        texts = [document["text"] for document in kept]
        if index:
            for position, match in enumerate(index.contamination(texts)):
                if match:
                    found["contaminated"][str(position)] = [str(match), match.common]
        if classifier:
            found["scores"] = {str(i): row for i, row in enumerate(classifier.scores(texts))}
        write_documents_jsonl(folder / MAPPED / f"{item.name}.jsonl", kept)
        with whole_file(folder / MAPPED / f"{item.name}.npz", "wb") as file:
            arrays: dict[str, Any] = {"numbers": np.array(numbers, np.int64), **keys}
            np.savez(file, **arrays)
        entries = list(map(DocumentEntry.of, kept))
        steps_done = {"steps": account.json(), "decisions": decisions, "entries": entries}
        write_compact(done, {**steps_done, **found})
        (folder / RAW / f"{item.name}.jsonl").unlink()

    return run


def document_keys(config: CorpusConfig, documents: list[Document]) -> dict[str, np.ndarray]:
    """What the documents of a chunk are compared by with all others.

    exact: uint64 [N, 2]. bands: uint64 [N, bands]. pieces: uint64 [P], one for each long paragraph;
    spans: int64 [P, 2], where it stands; owners: int64 [P], its document. given: uint64, one for
    each id that a record came with.
    """
    texts = [document["text"] for document in documents]
    exact = np.frombuffer(b"".join(map(exact_key, texts)), np.uint64).reshape(-1, 2)
    bands = [band_keys(signatures(b, config.minhash), config.minhash) for b in text_batches(texts)]
    ids = [d["source"] + "/" + d["meta"]["id"] for d in documents if "id" in d["meta"]]
    given = [xxhash.xxh3_64_intdigest(name.encode()) for name in ids]
    keys, spans, owners = [], [], []
    for number, document in enumerate(documents):
        code = document["meta"]["profile"] == "code"
        for span, key in long_pieces(document["text"], code, config.paragraph_characters):
            keys.append(key)
            spans.append(span)
            owners.append(number)
    return {
        "exact": exact,
        "bands": np.concatenate([np.zeros((0, config.minhash.bands), np.uint64), *bands]),
        "pieces": np.array(keys, np.uint64),
        "spans": np.array(spans, np.int64).reshape(-1, 2),
        "owners": np.array(owners, np.int64),
        "given": np.array(given, np.uint64),
    }


def applying(config: CorpusConfig, folder: Path) -> Callable[[Fates], None]:
    """The function that does with the documents of a mapped chunk what was decided."""

    def steps(fates: Fates, number: int) -> Iterator[Step]:
        if "exact" not in config.leave_out:
            first = fates.exact.get(number)
            yield lambda document: drop_exact(document, first or str(document["id"]))
        if fates.name == EXTRA:
            return
        if config.decontaminate:
            yield lambda document: drop_contaminated(document, fates.contaminated.get(number))
        if config.classifier:
            yield lambda document: drop_low_score(document, *fates.scores[number])
        if "near" not in config.leave_out:
            like = fates.near.get(number)
            yield lambda document: drop_near(document, like or str(document["id"]))
        if "paragraphs" not in config.leave_out:
            yield lambda document: cut_repeats(document, fates.repeated.get(number, []))

    def run(fates: Fates) -> None:
        done = folder / FINAL / f"{fates.name}.json"
        if done.exists():
            return
        rows: list[dict[str, Any]] = []
        decisions: list[list[Any]] = []
        account = new_account(config, rows)
        kept: list[Document] = []
        with np.load(folder / MAPPED / f"{fates.name}.npz") as keys:
            numbers = keys["numbers"].tolist()
        documents = read_jsonl(folder / MAPPED / f"{fates.name}.jsonl")
        for position, document in enumerate(documents):
            left = account.kept(document, steps(fates, position))
            decisions += [[numbers[position], row] for row in rows]
            rows.clear()
            if left is not None:
                kept.append(left)
        write_documents_jsonl(folder / FINAL / f"{fates.name}.jsonl", kept)
        entries = list(map(DocumentEntry.of, kept))
        write_compact(done, {"steps": account.json(), "decisions": decisions, "entries": entries})
        (folder / MAPPED / f"{fates.name}.jsonl").unlink()

    return run
