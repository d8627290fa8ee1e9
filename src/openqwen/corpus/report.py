"""What corpus.json says: what each step kept, dropped and cut, and what the corpus consists of."""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from openqwen.corpus.documents import Document, DocumentEntry, utf8_size
from openqwen.corpus.mixture import shares
from openqwen.corpus.process import DocumentVerdict, Step
from openqwen.support.files import gzip_bits_per_byte

STEPS = (
    "cap",
    "clean",
    "filter",
    "personal",
    "exact",
    "decontaminate",
    "score",
    "near",
    "paragraphs",
)
_EXAMPLES = 3  # shown for each reason
_EXCERPT = 300  # characters


class StepReport:
    """One step's account: documents and bytes kept and dropped, by reason, with a few examples."""

    def __init__(self, name: str):
        self.name = name
        self.kept = self.kept_bytes = self.dropped = self.dropped_bytes = 0
        self.reasons: dict[str, dict[str, Any]] = {}

    def count(self, verdict: DocumentVerdict, document: Document) -> None:
        """Count a verdict; `document` is as the step left it."""
        if cut := verdict.cut:
            self._lose(document, cut.rule, cut.text, cut.bytes, cut.why)
        size = utf8_size(document["text"])
        if verdict.rule is None:
            self.kept += 1
            self.kept_bytes += size
        else:
            self.dropped += 1
            self._lose(document, verdict.rule, document["text"], size, verdict.why)

    def _lose(self, document: Document, reason: str, text: str, size: int, why: str) -> None:
        self.dropped_bytes += size
        entry = self.reasons.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += size
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append({"id": document["id"], "excerpt": text[:_EXCERPT], "why": why})

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the account of later documents, as `json` made it."""
        for field in ("kept", "dropped", "kept_bytes", "dropped_bytes"):
            setattr(self, field, getattr(self, field) + other[field])
        for reason, more in other["reasons"].items():
            entry = self.reasons.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
            entry["documents"] += more["documents"]
            entry["bytes"] += more["bytes"]
            entry["examples"] = (entry["examples"] + more["examples"])[:_EXAMPLES]

    def json(self) -> dict[str, Any]:
        """The step as it stands in corpus.json, the most frequent reason first."""
        order = sorted(self.reasons.items(), key=lambda item: (-item[1]["documents"], item[0]))
        fields = ("name", "kept", "dropped", "kept_bytes", "dropped_bytes")
        return {field: getattr(self, field) for field in fields} | {"reasons": dict(order)}


class Account:
    """The reports of all steps, in their order, but of those that do not run.

    record: called with each document and verdict.
    """

    def __init__(
        self,
        record: Callable[[Document, DocumentVerdict], None],
        left_out: Container[str] = (),
    ) -> None:
        self._record = record
        self.steps = {name: StepReport(name) for name in STEPS if name not in left_out}

    def kept(self, document: Document, steps: Iterable[Step]) -> Document | None:
        """Take a document through the steps until one drops it; None if one does."""
        for step in steps:
            verdict, document = step(document)
            self.steps[verdict.step].count(verdict, document)
            self._record(document, verdict)
            if not verdict.kept:
                return None
        return document

    def merge(self, steps: Mapping[str, Any]) -> None:
        """Add the account of later documents, as `json` made it."""
        for name, report in self.steps.items():
            if name in steps:
                report.merge(steps[name])

    def json(self) -> dict[str, Any]:
        """The reports by name."""
        return {name: step.json() for name, step in self.steps.items()}

    def reasons(self) -> Counter[str]:
        """How many documents each reason dropped or cut."""
        counts: Counter[str] = Counter()
        for step in self.steps.values():
            for reason, entry in step.reasons.items():
                counts[reason] += entry["documents"]
        return counts


def mixture_report(
    entries: Iterable[DocumentEntry],
    held: Container[str],
    heldout: Iterable[Document],
    weights: dict[str, float],
) -> dict[str, Any]:
    """Documents, bytes, share of training, and gzip's bits for a held-out byte, of each source.

    held: ids of the held-out documents. heldout: those documents. entries: read twice.
    """
    sources: dict[str, dict[str, Any]] = {}
    names = ("documents", "bytes", "heldout_documents", "heldout_bytes")
    for in_held in (False, True):
        prefix = "heldout_" if in_held else ""
        for entry in entries:
            if (entry.id in held) == in_held:
                source = sources.setdefault(entry.source, dict.fromkeys(names, 0))
                source[f"{prefix}documents"] += 1
                source[f"{prefix}bytes"] += entry.size
    train_bytes = {name: source["bytes"] for name, source in sources.items()}
    for name, share in shares(train_bytes, weights).items():
        sources[name]["weight"] = share
    texts: list[str] = []
    texts_of: dict[str, list[str]] = defaultdict(list)
    for document in heldout:
        texts.append(document["text"])
        texts_of[document["source"]].append(document["text"])
    for name, of_source in texts_of.items():
        sources[name]["gzip_bits_per_byte"] = gzip_bits_per_byte(of_source)
    return {"sources": sources, "gzip_bits_per_byte": gzip_bits_per_byte(texts)}


def flat_metrics(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of corpus.json as the stage's metrics."""
    metrics: dict[str, float] = {}
    for name in ("documents", "bytes", "heldout_documents", "heldout_bytes"):
        metrics[name] = sum(source[name] for source in report["sources"].values())
    metrics["gzip_bits_per_byte"] = report["gzip_bits_per_byte"]
    metrics |= {f"read_{name}": value for name, value in report["read"].items()}
    metrics["skipped"] = sum(entry["count"] for entry in report["skipped"].values())
    for step in report["steps"]:
        metrics[f"{step['name']}_dropped"] = step["dropped"]
        metrics[f"{step['name']}_dropped_bytes"] = step["dropped_bytes"]
    return metrics
