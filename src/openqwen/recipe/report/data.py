"""What happened to text: the corpus, demonstrations and preferences, and samples of answers."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from openqwen.recipe.report.run import EVALUATE, Run

# How much of each kind the page shows; it says so where there is more.
REASONS, EXAMPLES, SKIPPED_EXAMPLES, KINDS, PROMPTS = 40, 3, 5, 16, 12

_TASKLESS = "–"


def corpus_total(report: dict[str, Any]) -> tuple[int, int]:
    """(documents, bytes) of the finished corpus, its held-out part included."""
    sources = report["sources"].values()
    documents = sum(found["documents"] + found["heldout_documents"] for found in sources)
    return documents, sum(found["bytes"] + found["heldout_bytes"] for found in sources)


def corpus(run: Run) -> dict[str, Any] | None:
    """The funnel of documents and bytes, the reasons of each step, skipped inputs, sources and the
    mixture.
    """
    report = run.json("corpus", "corpus.json")
    if report is None:
        return None
    skipped = [
        {
            "reason": reason,
            "count": found["count"],
            "examples": found["examples"][:SKIPPED_EXAMPLES],
        }
        for reason, found in sorted(
            report["skipped"].items(), key=lambda item: (-item[1]["count"], item[0])
        )
    ]
    return {
        "read": report["read"],
        "total": corpus_total(report),
        "funnel": _funnel(report),
        "steps": [
            {**step, "reasons": _reasons(step["reasons"])}
            for step in report["steps"]
            if step["reasons"]
        ],
        "skipped": skipped,
        "sources": _sources(run, report["sources"]),
    }


def _funnel(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was read, what each step kept, and the finished corpus, as shares of the bytes read.

    joined: documents that a step had beyond what the one before it kept, such as instruction data,
    which meets only some of the steps; negative where documents pass by it.
    """
    read, (documents, size) = report["read"], corpus_total(report)
    rows = [
        {"name": "read", "kept": read["documents"], "kept_bytes": read["bytes"]},
        *report["steps"],
    ]
    rows.append({"name": "corpus", "kept": documents, "kept_bytes": size})
    whole = read["bytes"] or 1
    before = read["documents"]
    funnel = []
    for row in rows:
        joined = row["kept"] + row.get("dropped", 0) - before
        funnel.append(
            {"dropped": None, **row, "share": row["kept_bytes"] / whole, "joined": joined}
        )
        before = row["kept"]
    return funnel


def _reasons(reasons: dict[str, Any]) -> list[dict[str, Any]]:
    """Most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1]["documents"], item[0]))[:REASONS]
    return [
        {**found, "name": name, "examples": found["examples"][:EXAMPLES]} for name, found in ordered
    ]


def _sources(run: Run, sources: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = run.json("tokens", "tokens.json") or {}
    statistics = run.json("tokenizer", "statistics.json") or {}
    density = statistics.get("bytes_per_token") or {}
    weights = sum(found.get("weight") or 0 for found in sources.values()) or 1
    return [
        {
            "name": name,
            **found,
            "share": (found.get("weight") or 0) / weights,
            "tokens": (tokens.get(name) or {}).get("tokens"),
            "bytes_per_token": density.get(name),
        }
        for name, found in sorted(sources.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    ]


def demonstrations(run: Run) -> dict[str, Any] | None:
    """Counts by task and method, how many sampled answers were right, and one example of each
    kind.
    """
    stage = run.stage("instruct")
    if stage is None:
        return None
    records = stage.jsonl("demonstrations.jsonl")
    acceptance = (stage.json("instruct.json") or {}).get("acceptance") or {}
    methods = sorted({_kind(record)[0] for record in records})
    return {
        "total": len(records),
        "prompts": len(stage.jsonl("prompts.jsonl")),
        "methods": methods,
        "rows": _by_task([[r for r in records if _kind(r)[0] == method] for method in methods]),
        "acceptance": acceptance,
        "rates": acceptance.get("by_task") or {},
        "examples": _one_each(records),
    }


def preferences(run: Run) -> dict[str, Any] | None:
    """Counts by task, who wrote the answers, and one pair of each kind."""
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
    """The kinds of task in a record: a preference has one, a conversation one a turn."""
    origin = record.get("origin") or {}
    return [str(task) for task in origin.get("tasks") or [origin.get("task") or _TASKLESS]]


def _by_task(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each task, how many records of each group are about it; the most frequent task first."""
    counts = [Counter(task for record in group for task in _tasks(record)) for group in groups]
    together = sum(counts, Counter[str]())
    most = max(together.values(), default=1)
    return [
        {"task": task, "counts": [found[task] for found in counts], "share": total / most}
        for task, total in sorted(together.items(), key=lambda item: (-item[1], item[0]))
    ]


def _one_each(records: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The first record of each (method, task), in the order of the file."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        first.setdefault(_kind(record), record)
    return [
        (" · ".join(part for part in kind if part != _TASKLESS), r)
        for kind, r in list(first.items())[:KINDS]
    ]


def samples(run: Run) -> list[dict[str, Any]]:
    """For each kind of prompt, the prompts, and for each prompt what each evaluated stage
    answered.
    """
    kinds: dict[str, dict[str, dict[str, str]]] = {}
    for name in run.evaluated:
        for sample in run.json(EVALUATE + name, "samples.json") or []:
            prompts = kinds.setdefault(sample["kind"], {})
            prompts.setdefault(sample["prompt"], {})[name] = sample["answer"]
    return [
        {
            "kind": kind,
            "prompts": [
                {"prompt": p, "answers": answers} for p, answers in list(prompts.items())[:PROMPTS]
            ],
        }
        for kind, prompts in kinds.items()
    ]
