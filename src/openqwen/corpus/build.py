"""The corpus stage: read, cap, clean, filter, deduplicate, hold out, and account for it all.

Documents are streamed: between two passes they lie in a file, not in memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from openqwen.corpus.clean import long_pieces
from openqwen.corpus.config import CorpusConfig, ScoreConfig
from openqwen.corpus.decisions import DECISIONS, Decisions
from openqwen.corpus.decontaminate import Contamination, EvaluationIndex, read_items
from openqwen.corpus.deduplicate import exact_key, near_duplicates, signatures
from openqwen.corpus.documents import (
    HELDOUT,
    TRAIN,
    Document,
    DocumentEntry,
    read_documents,
    write_documents,
)
from openqwen.corpus.installation import InstallationReader
from openqwen.corpus.mixture import beyond_cap, heldout
from openqwen.corpus.process import (
    Result,
    Step,
    apply_filters,
    cap,
    clean,
    cut_repeats,
    drop_contaminated,
    drop_exact,
    drop_low_score,
    drop_near,
    treat_personal,
)
from openqwen.corpus.quality import QualityClassifier
from openqwen.corpus.read import FolderReader
from openqwen.corpus.report import Account, flat_metrics, mixture_report
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl, write_json, write_jsonl
from openqwen.support.progress import progress
from openqwen.tokenizer.fast import text_batches


class _Passes(NamedTuple):
    """The files that hold the documents between the passes."""

    raw: Path
    filtered: Path
    final: Path


def build_corpus(
    config: CorpusConfig, extra_documents: Iterable[Document], folder: Path, seed: int = 0
) -> dict[str, float]:
    """Write a corpus into `folder`: its documents, its report and its decisions.

    The files are train.parquet, heldout.parquet, corpus.json and decisions.parquet.

    Args:
        extra_documents: ready documents (the multi-task instruction data that Qwen2 mixes in). They
            go through exact deduplication and the held-out split, but not through the filters and
            near-deduplication, because their templates look alike.
        folder: during the build it also holds the files between the passes.
        seed: decides which documents are held out, and which stay where a source is capped.

    Raises:
        OpenQwenError: where nothing is left to train on.

    Memory: about 2 KB for every document, and one row group of texts (at most 64 MB).
    """
    with (
        TemporaryDirectory(prefix=".", dir=folder) as scratch,
        Decisions(folder / DECISIONS) as decisions,
    ):
        runs = {
            "personal": config.personal != "keep",
            "decontaminate": config.decontaminate,
            "score": config.classifier,
        }
        account = Account(decisions.add, [name for name, given in runs.items() if not given])
        files = _Passes(*(Path(scratch) / f"{name}.jsonl" for name in _Passes._fields))
        entries, read = _read(config, files.raw)
        entries = _process(config, account, files, entries, extra_documents, seed)
        held = _held_out(entries, config, seed)
        for part, in_part in ((TRAIN, False), (HELDOUT, True)):
            documents = (d for d in read_jsonl(files.final) if (d["id"] in held) == in_part)
            write_documents(folder / part, documents)
    report = {
        **read,
        "steps": [step.json() for step in account.steps.values()],
        **mixture_report(entries, held, read_documents(folder / HELDOUT), config.weights),
    }
    write_json(folder / "corpus.json", report)
    return flat_metrics(report)


def _process(
    config: CorpusConfig,
    account: Account,
    files: _Passes,
    entries: list[DocumentEntry],
    extra_documents: Iterable[Document],
    seed: int,
) -> list[DocumentEntry]:
    """Take the documents of `files.raw` through all steps; returns those of `files.final`."""
    first_with: dict[bytes, str] = {}  # exact key of a text -> id of the first document with it

    def exact(document: Document) -> Result:
        first = first_with.setdefault(exact_key(document["text"]), document["id"])
        return drop_exact(document, first)

    steps = [*_filter_steps(entries, config, seed), exact]
    documents = _with_progress("filter", read_jsonl(files.raw), len(entries))
    entries = _spill(files.filtered, account.kept(documents, steps))
    if not entries:
        raise _nothing_left("Every document was filtered out.", config, account.reasons())
    steps = []
    if config.decontaminate:
        steps.append(_decontamination_step(files.filtered, entries, config.decontaminate))
    if config.classifier:
        steps.append(_score_step(files.filtered, entries, config.score, config.classifier))
    steps += [_near_step(files.filtered, entries, config), _paragraph_step(config)]
    documents = account.kept(read_jsonl(files.filtered), steps)
    extra = account.kept(extra_documents, [exact])
    return _spill(files.final, chain(documents, extra))


def _read(config: CorpusConfig, path: Path) -> tuple[list[DocumentEntry], dict[str, Any]]:
    """Write all documents to `path`; returns their entries and corpus.json's part on reading."""
    if config.folder is None:
        reader: FolderReader = InstallationReader(config.max_document_bytes)
    else:
        reader = FolderReader(config.folder, config.max_document_bytes)

    def documents() -> Iterator[Document]:
        for document in _with_progress("read", reader):
            if document["source"] in config.profiles:
                document["meta"]["profile"] = config.profiles[document["source"]]
            yield document

    entries = _spill(path, documents())
    if not entries:
        skips = {reason: entry["count"] for reason, entry in reader.skips.reasons.items()}
        raise _nothing_left("The corpus has no document that can be read.", config, skips)
    read = {"files": reader.files, "documents": len(entries), "bytes": reader.bytes}
    return entries, {"read": read, "skipped": reader.skips.reasons}


def _spill(path: Path, documents: Iterable[Document]) -> list[DocumentEntry]:
    """Write documents to a file between two passes; returns the entry of each."""
    entries: list[DocumentEntry] = []

    def listed() -> Iterator[Document]:
        for document in documents:
            entries.append(DocumentEntry.of(document))
            yield document

    write_jsonl(path, listed())
    return entries


def _filter_steps(entries: list[DocumentEntry], config: CorpusConfig, seed: int) -> list[Step]:
    """The limits of the sources, cleaning and the filters."""
    left_out = beyond_cap(entries, config.max_bytes, seed)
    steps: list[Step] = [
        lambda document: cap(document, left_out, config.max_bytes),
        lambda document: clean(document, config.filters),
        lambda document: apply_filters(document, config.filters),
    ]
    if (action := config.personal) != "keep":
        steps.append(lambda document: treat_personal(document, action))
    return steps


def _decontamination_step(path: Path, entries: list[DocumentEntry], sets: list[Path]) -> Step:
    """Decontamination of the documents in `path`: reads them all."""
    index = EvaluationIndex(read_items(sets))
    with progress("decontaminate", len(entries), "documents") as bar:
        matches: dict[str, Contamination] = {}
        texts = (document["text"] for document in read_jsonl(path))
        for entry, match in zip(entries, index.contamination(texts), strict=True):
            if match:
                matches[entry.id] = match
            bar.advance()
    return lambda document: drop_contaminated(document, matches.get(document["id"]))


def _score_step(
    path: Path, entries: list[DocumentEntry], config: ScoreConfig, folder: Path
) -> Step:
    """Filtering of the documents in `path` by a classifier of quality: reads them all."""
    classifier = QualityClassifier.load(folder)
    weights = _score_weights(classifier.dimensions, config.weights)
    ratings: dict[str, dict[str, float]] = {}
    scores: dict[str, float] = {}
    of_source: dict[str, list[float]] = {}
    with progress("score", len(entries), "documents") as bar:
        texts = (document["text"] for document in read_jsonl(path))
        for entry, row in zip(entries, classifier.scores(texts), strict=True):
            ratings[entry.id] = row
            scores[entry.id] = float(np.average(list(row.values()), weights=weights))
            of_source.setdefault(entry.source, []).append(scores[entry.id])
            bar.advance()
    least = {source: _least_score(values, source, config) for source, values in of_source.items()}

    def step(document: Document) -> Result:
        name = document["id"]
        return drop_low_score(document, ratings[name], scores[name], least[document["source"]])

    return step


def _score_weights(dimensions: Sequence[str], given: Mapping[str, float]) -> list[float]:
    """The weight of each dimension in a document's score."""
    weights = [given.get(name, 1.0) for name in dimensions]
    if unknown := sorted(given.keys() - set(dimensions)):
        what = f"The classifier has no dimension '{unknown[0]}'."
    elif sum(weights) <= 0:
        what = "The weights of the dimensions do not add up to more than 0."
    else:
        return weights
    raise OpenQwenError(what, "score.weights", f"its dimensions are {', '.join(dimensions)}")


def _least_score(scores: list[float], source: str, config: ScoreConfig) -> float:
    """The lowest score of a source's documents that are kept."""
    least = -math.inf if config.least is None else config.least
    if dropped := int(len(scores) * (1 - config.keep.get(source, 1.0))):
        least = max(least, sorted(scores)[min(dropped, len(scores) - 1)])
    return least


def _near_step(path: Path, entries: list[DocumentEntry], config: CorpusConfig) -> Step:
    """Near-deduplication of the documents in `path`: reads them all for their signatures."""
    with progress("deduplicate", len(entries), "documents") as bar:
        texts = (document["text"] for document in read_jsonl(path))
        parts = []
        for batch in text_batches(texts):
            parts.append(signatures(batch, config.minhash))
            bar.advance(len(batch))
    clusters = near_duplicates(np.concatenate(parts), config.minhash)
    first = {entry.id: entries[cluster].id for entry, cluster in zip(entries, clusters)}
    return lambda document: drop_near(document, first[document["id"]])


def _paragraph_step(config: CorpusConfig) -> Step:
    """Cutting of what an earlier document has; the last step, so that no only copy is lost."""
    seen: set[int] = set()

    def step(document: Document) -> Result:
        code = document["meta"]["profile"] == "code"
        pieces = long_pieces(document["text"], code, config.paragraph_characters)
        repeated = [span for span, key in pieces if key in seen]
        seen.update(key for _, key in pieces)
        return cut_repeats(document, repeated)

    return step


def _held_out(entries: list[DocumentEntry], config: CorpusConfig, seed: int) -> set[str]:
    held = heldout(entries, config.heldout_share, config.heldout_max_bytes, seed)
    if held:
        return held
    raise OpenQwenError(
        f"No document could be held out: the corpus has {len(entries)} after filtering.",
        where=config.folder,
        do="give more than one document, and not all of them above "
        f"{config.heldout_max_bytes:,} bytes (heldout_max_bytes): scores are taken on documents "
        "that training never saw",
    )


def _with_progress(
    label: str, documents: Iterable[Document], total: int | None = None
) -> Iterator[Document]:
    with progress(label, total, "documents") as bar:
        for document in documents:
            yield document
            bar.advance()


def _nothing_left(what: str, config: CorpusConfig, reasons: Mapping[str, int]) -> OpenQwenError:
    common = sorted(((count, reason) for reason, count in reasons.items()), reverse=True)[:4]
    listed = ", ".join(f"{count} x {reason}" for count, reason in common) or "no files"
    return OpenQwenError(
        what,
        where=config.folder or "this Python's standard library",
        do="give a folder with .txt, .md, .rst, .html, .jsonl, .parquet or code files that pass "
        f"the rules (--help shows every threshold); found: {listed}",
    )
