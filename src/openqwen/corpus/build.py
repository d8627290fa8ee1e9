"""The corpus stage: read, cap, clean, filter, deduplicate, hold out, and say what became of
everything.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openqwen.corpus.clean import RepeatedParagraphs, c4_lines, normalize
from openqwen.corpus.config import CorpusConfig
from openqwen.corpus.deduplicate import exact_key, near_duplicates, signatures
from openqwen.corpus.documents import write_documents
from openqwen.corpus.filters import first_failure
from openqwen.corpus.installation import InstallationReader
from openqwen.corpus.measure import Measured
from openqwen.corpus.mixture import beyond_cap, heldout, shares
from openqwen.corpus.read import Document, FolderReader, Skips
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import gzip_bits_per_byte, write_json
from openqwen.support.progress import progress

_EXAMPLES = 3  # shown for each reason
_EXCERPT = 300  # characters


def build_corpus(
    config: CorpusConfig, extra_documents: Iterable[Document], folder: Path, seed: int = 0
) -> dict[str, float]:
    """Write train.parquet, heldout.parquet and corpus.json into `folder`; returns flat metrics.

    extra_documents: ready documents (the multi-task instruction data that Qwen2 mixes in) that meet
    exact deduplication and the held-out split, but neither the filters nor near-deduplication:
    templates look alike.
    seed: decides which documents are held out, and which stay where a source is capped.
    Raises OpenQwenError where nothing is left to train on. Memory: about four times the text.
    """
    documents, read, skips = _read(config)
    _require(documents, "The corpus has no document that can be read.", config, _main_skips(skips))
    steps = [
        Step("cap"),
        Step("clean"),
        Step("filter"),
        Step("exact"),
        Step("near"),
        Step("paragraphs"),
    ]
    cap, clean, filtering, exact, near, paragraphs = steps
    documents = _cap(documents, config, seed, cap)
    documents = _clean_and_filter(documents, config, clean, filtering)
    _require(documents, "Every document was filtered out.", config, _main_reasons(clean, filtering))
    documents, extra = _exact(documents, extra_documents, exact)
    documents = _near(documents, config, near)
    documents = _cut_repeats(documents, config, paragraphs) + extra
    train, held = _split(documents, config, seed)
    report = {
        "read": read,
        "skipped": skips.reasons,
        "steps": [step.report() for step in steps],
        **_mixture(train, held, config),
    }
    write_documents(folder / "train.parquet", train)
    write_documents(folder / "heldout.parquet", held)
    write_json(folder / "corpus.json", report)
    return _metrics(report)


class Step:
    """One step's account: documents and bytes kept and dropped, and for each reason how much and a
    few examples.
    """

    def __init__(self, name: str):
        self.name = name
        self.kept = self.kept_bytes = self.dropped = self.dropped_bytes = 0
        self.reasons: dict[str, dict[str, Any]] = {}

    def keep(self, text: str) -> None:
        """Count a document that goes on to the next step, as it is now."""
        self.kept += 1
        self.kept_bytes += _size(text)

    def drop(self, document: Document, reason: str, why: str) -> None:
        """Count a document that ends here."""
        self.dropped += 1
        self._lose(document, reason, _size(document["text"]), document["text"], why)

    def cut(self, document: Document, reason: str, piece: str, size: int) -> None:
        """Count `size` bytes cut out of a document that stays."""
        self._lose(document, reason, size, piece, f"{size:,} bytes cut")

    def _lose(self, document: Document, reason: str, size: int, text: str, why: str) -> None:
        self.dropped_bytes += size
        entry = self.reasons.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += size
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append({"id": document["id"], "excerpt": text[:_EXCERPT], "why": why})

    def report(self) -> dict[str, Any]:
        """The step as it stands in corpus.json, the commonest reason first."""
        order = sorted(self.reasons.items(), key=lambda item: (-item[1]["documents"], item[0]))
        fields = ("name", "kept", "dropped", "kept_bytes", "dropped_bytes")
        return {field: getattr(self, field) for field in fields} | {"reasons": dict(order)}


def _size(text: str) -> int:
    return len(text.encode("utf-8"))


def _read(config: CorpusConfig) -> tuple[list[Document], dict[str, int], Skips]:
    reader: FolderReader | InstallationReader
    if config.folder is None:
        reader = InstallationReader(config.max_document_bytes)
    else:
        reader = FolderReader(config.folder, config.max_document_bytes)
    documents = []
    with progress("read", unit="documents") as bar:
        for document in reader:
            if document["source"] in config.profiles:
                document["meta"]["profile"] = config.profiles[document["source"]]
            documents.append(document)
            bar.advance()
    return (
        documents,
        {"files": reader.files, "documents": len(documents), "bytes": reader.bytes},
        reader.skips,
    )


def _cap(documents: list[Document], config: CorpusConfig, seed: int, step: Step) -> list[Document]:
    left_out = beyond_cap(documents, [_size(d["text"]) for d in documents], config.max_bytes, seed)
    kept = []
    for position, document in enumerate(documents):
        if position in left_out:
            source = document["source"]
            step.drop(
                document, f"{source} limit", f"source limited to {config.max_bytes[source]:,} bytes"
            )
        else:
            step.keep(document["text"])
            kept.append(document)
    return kept


def _clean_and_filter(
    documents: list[Document], config: CorpusConfig, clean: Step, filtering: Step
) -> list[Document]:
    kept = []
    with progress("filter", len(documents), "documents") as bar:
        for document in documents:
            bar.advance()
            text = normalize(document["text"])
            profile = document["meta"]["profile"]
            if profile == "web" and not Measured(text).unspaced:
                before = _size(text)
                text, lines = c4_lines(text, config.filters.web.c4)
                if lines:
                    clean.cut(document, "c4 lines", "\n".join(lines), before - _size(text))
            if not text.strip():
                clean.drop(document, "empty", "nothing left after cleaning")
                continue
            document = {**document, "text": text}
            clean.keep(text)
            if failure := first_failure(text, profile, config.filters):
                filtering.drop(document, *failure)
            else:
                filtering.keep(text)
                kept.append(document)
    return kept


def _exact(
    documents: list[Document], extra: Iterable[Document], step: Step
) -> tuple[list[Document], list[Document]]:
    """The first of each set of equal texts, for the filtered documents and for the extra ones."""
    seen: dict[bytes, str] = {}

    def fresh(candidates: Iterable[Document]) -> list[Document]:
        kept = []
        for document in candidates:
            first = seen.setdefault(exact_key(document["text"]), document["id"])
            if first == document["id"]:
                step.keep(document["text"])
                kept.append(document)
            else:
                step.drop(document, "exact duplicate", f"same text as {first}")
        return kept

    return fresh(documents), fresh(extra)


def _near(documents: list[Document], config: CorpusConfig, step: Step) -> list[Document]:
    with progress("deduplicate", len(documents), "documents") as bar:
        signature = signatures((d["text"] for d in documents), config.minhash, bar.advance)
    kept = []
    for position, first in enumerate(near_duplicates(signature, config.minhash)):
        document = documents[position]
        if first == position:
            step.keep(document["text"])
            kept.append(document)
        else:
            step.drop(document, "near-duplicate", f"like {documents[first]['id']}")
    return kept


def _cut_repeats(documents: list[Document], config: CorpusConfig, step: Step) -> list[Document]:
    """Licence headers and stock paragraphs, cut from every document but the first; last, so that
    none is lost.
    """
    repeats = RepeatedParagraphs(config.paragraph_characters)
    kept = []
    for document in documents:
        code = document["meta"]["profile"] == "code"
        text, cut = repeats.cut(document["text"], code)
        if cut:
            reason = "repeated comment" if code else "repeated paragraph"
            step.cut(document, reason, cut[0], _size(document["text"]) - _size(text))
            document = {**document, "text": text}
        if text.strip():
            step.keep(text)
            kept.append(document)
        else:
            step.drop(document, "nothing else", "every paragraph stands in an earlier document")
    return kept


def _split(
    documents: list[Document], config: CorpusConfig, seed: int
) -> tuple[list[Document], list[Document]]:
    sizes = [_size(d["text"]) for d in documents]
    out = heldout(documents, sizes, config.heldout_share, config.heldout_max_bytes, seed)
    if not out:
        raise OpenQwenError(
            f"No document could be held out: the corpus has {len(documents)} after filtering.",
            where=config.folder,
            do=f"give more than one document, none of them all above {config.heldout_max_bytes:,} "
            "bytes "
            "(heldout_max_bytes): scores are taken on documents that training never saw",
        )
    train = [document for position, document in enumerate(documents) if position not in out]
    return train, [documents[position] for position in sorted(out)]


def _mixture(train: list[Document], held: list[Document], config: CorpusConfig) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {}
    for prefix, documents in (("", train), ("heldout_", held)):
        for document in documents:
            names = ("documents", "bytes", "heldout_documents", "heldout_bytes")
            entry = sources.setdefault(document["source"], dict.fromkeys(names, 0))
            entry[f"{prefix}documents"] += 1
            entry[f"{prefix}bytes"] += _size(document["text"])
    for source, share in shares(
        {s: e["bytes"] for s, e in sources.items()}, config.weights
    ).items():
        sources[source]["weight"] = share
    texts: dict[str, list[str]] = defaultdict(list)
    for document in held:
        texts[document["source"]].append(document["text"])
    for source, own in texts.items():
        sources[source]["gzip_bits_per_byte"] = gzip_bits_per_byte(own)
    return {"sources": sources, "gzip_bits_per_byte": gzip_bits_per_byte(d["text"] for d in held)}


def _metrics(report: dict[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in ("documents", "bytes", "heldout_documents", "heldout_bytes"):
        metrics[name] = sum(entry[name] for entry in report["sources"].values())
    metrics["gzip_bits_per_byte"] = report["gzip_bits_per_byte"]
    metrics |= {f"read_{name}": value for name, value in report["read"].items()}
    metrics["skipped"] = sum(entry["count"] for entry in report["skipped"].values())
    for step in report["steps"]:
        metrics[f"{step['name']}_dropped"] = step["dropped"]
        metrics[f"{step['name']}_dropped_bytes"] = step["dropped_bytes"]
    return metrics


def _require(documents: list[Document], what: str, config: CorpusConfig, found: str) -> None:
    if documents:
        return
    raise OpenQwenError(
        what,
        where=config.folder or "this Python's standard library",
        do="give a folder with .txt, .md, .rst, .html, .jsonl, .parquet or code files that pass "
        "the rules"
        f" (--help shows every threshold); found: {found}",
    )


def _main_skips(skips: Skips) -> str:
    counts = sorted(
        ((entry["count"], reason) for reason, entry in skips.reasons.items()), reverse=True
    )
    return ", ".join(f"{count} x {reason}" for count, reason in counts[:4]) or "no files"


def _main_reasons(*steps: Step) -> str:
    counts = sorted(
        ((e["documents"], reason) for step in steps for reason, e in step.reasons.items()),
        reverse=True,
    )
    return ", ".join(f"{count} x {reason}" for count, reason in counts[:4])
