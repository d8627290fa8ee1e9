"""The report's sections on data: corpus, demonstrations, preferences, sampled answers."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from openqwen.recipe.report.run import EVALUATE, Run

# The most entries of each kind that the page shows; it says where there are more.
REASONS, EXAMPLES, SKIPPED_EXAMPLES, KINDS, PROMPTS = 40, 3, 5, 16, 12

_TASKLESS = "–"


def corpus_total(report: dict[str, Any]) -> tuple[int, int]:
    """Return (documents, bytes) of the finished corpus, including its held-out part."""
    sources = report["sources"].values()
    documents = sum(source["documents"] + source["heldout_documents"] for source in sources)
    return documents, sum(source["bytes"] + source["heldout_bytes"] for source in sources)


def corpus(run: Run) -> dict[str, Any] | None:
    """Return what was read, dropped (by step and reason) and skipped, and the corpus's sources."""
    report = run.json("corpus", "corpus.json")
    if report is None:
        return None
    skipped = []
    by_count = lambda item: (-item[1]["count"], item[0])  # noqa: E731
    for reason, inputs in sorted(report["skipped"].items(), key=by_count):
        examples = inputs["examples"][:SKIPPED_EXAMPLES]
        skipped.append({"reason": reason, "count": inputs["count"], "examples": examples})
    steps = [step for step in report["steps"] if step["reasons"]]
    return {
        "read": report["read"],
        "total": corpus_total(report),
        "funnel": _funnel(report),
        "steps": [{**step, "reasons": _reasons(step["reasons"])} for step in steps],
        "skipped": skipped,
        "sources": _sources(run, report["sources"]),
    }


def _funnel(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was read, what each step kept, and the finished corpus, as shares of the bytes.

    joined: documents that a step received beyond those that the step before it kept. Instruction
    data, for one, passes through some of the steps only; then `joined` may be negative too.
    """
    read, (documents, size) = report["read"], corpus_total(report)
    rows = [{"name": "read", "kept": read["documents"], "kept_bytes": read["bytes"]}]
    rows += [*report["steps"], {"name": "corpus", "kept": documents, "kept_bytes": size}]
    before = read["documents"]
    funnel = []
    for row in rows:
        joined = row["kept"] + row.get("dropped", 0) - before
        share = row["kept_bytes"] / (read["bytes"] or 1)
        funnel.append({"dropped": None, **row, "share": share, "joined": joined})
        before = row["kept"]
    return funnel


def _reasons(reasons: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the reasons, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1]["documents"], item[0]))[:REASONS]
    return [
        {**dropped, "name": name, "examples": dropped["examples"][:EXAMPLES]}
        for name, dropped in ordered
    ]


def _sources(run: Run, sources: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = run.json("tokens", "tokens.json") or {}
    statistics = run.json("tokenizer", "statistics.json") or {}
    density = statistics.get("bytes_per_token") or {}
    weights = sum(source.get("weight") or 0 for source in sources.values()) or 1
    return [
        {
            "name": name,
            **source,
            "share": (source.get("weight") or 0) / weights,
            "tokens": (tokens.get(name) or {}).get("tokens"),
            "bytes_per_token": density.get(name),
        }
        for name, source in sorted(sources.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    ]


def demonstrations(run: Run) -> dict[str, Any] | None:
    """Return counts by task and method, and one example of a kind."""
    stage = run.stage("instruct")
    if stage is None:
        return None
    records = stage.jsonl("demonstrations.jsonl")
    methods = sorted({_kind(record)[0] for record in records})
    return {
        "total": len(records),
        "prompts": len(stage.jsonl("prompts.jsonl")),
        "methods": methods,
        "rows": _by_task([[r for r in records if _kind(r)[0] == method] for method in methods]),
        "examples": _one_each(records),
    }


def preferences(run: Run) -> dict[str, Any] | None:
    """Return counts by task, the authors of answers, and one pair of each kind."""
    stage = run.stage("prefer")
    if stage is None:
        return None
    records, heldout = stage.jsonl("preferences.jsonl"), stage.jsonl("heldout.jsonl")
    report = stage.json("prefer.json") or {}
    return {
        "total": len(records),
        "heldout": len(heldout),
        "rows": _by_task([records, heldout]),
        "written_by": report.get("by_author") or {},
        "sampled_accuracy": report.get("sampled_accuracy"),
        "examples": _one_each(records),
    }


def _kind(record: dict[str, Any]) -> tuple[str, str]:
    origin = record.get("origin") or {}
    return str(origin.get("method") or _TASKLESS), _tasks(record)[0]


def _tasks(record: dict[str, Any]) -> list[str]:
    """Return the tasks of a record: a preference has one, a conversation has one for each turn."""
    origin = record.get("origin") or {}
    return [str(task) for task in origin.get("tasks") or [origin.get("task") or _TASKLESS]]


def _by_task(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return for each task its number of records in each group; the most frequent task first."""
    counts = [Counter(task for record in group for task in _tasks(record)) for group in groups]
    totals = sum(counts, Counter[str]())
    most = max(totals.values(), default=1)
    return [
        {"task": task, "counts": [group[task] for group in counts], "share": total / most}
        for task, total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    ]


def _one_each(records: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the first record of each (method, task), in the order of the file."""
    first: dict[str, dict[str, Any]] = {}
    for record in records:
        kind = " · ".join(part for part in _kind(record) if part != _TASKLESS)
        first.setdefault(kind, record)
    return list(first.items())[:KINDS]


def samples(run: Run) -> list[dict[str, Any]]:
    """Return for each kind of prompt its prompts, with the answer of each evaluated stage."""
    kinds: dict[str, dict[str, dict[str, str]]] = {}
    for name in run.evaluated:
        for sample in run.json(EVALUATE + name, "samples.json") or []:
            prompts = kinds.setdefault(sample["kind"], {})
            prompts.setdefault(sample["prompt"], {})[name] = sample["answer"]
    shown = []
    for kind, prompts in kinds.items():
        first = list(prompts.items())[:PROMPTS]
        answered = [{"prompt": prompt, "answers": answers} for prompt, answers in first]
        shown.append({"kind": kind, "prompts": answered})
    return shown
