"""`metrics.jsonl`: one line for each optimizer step, and the summary of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from openqwen.train.validation import HELD_OUT

METRICS = "metrics.jsonl"
Entry = dict[str, float]
_OLD_NAMES = {"peak_share": "mfu"}  # in the logs of runs before MFU had its name
# What the summary does not average: it is summed up in another way, or of no use at the end.
_NOT_AVERAGED = {
    "step",
    "seconds",
    "tokens",
    "tokens_per_second",
    "flops_per_second",
    "learning_rate",
    "gradient_norm",
    "peak_memory",
    "skipped",
    "clipped",
    HELD_OUT,
}


def to_line(entry: Entry) -> str:
    """One line of the log. JSON has no NaN, so a value that is not finite is null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in entry.items()}) + "\n"


def read_metrics(path: Path, before: int) -> list[Entry]:
    """The entries of the steps before step `before`; a killed run may have logged later ones."""
    if not path.exists():
        return []
    entries = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:before])
    return [
        {_OLD_NAMES.get(k, k): math.nan if v is None else v for k, v in entry.items()}
        for entry in entries
    ]


def has_targets(entry: Entry) -> bool:
    """Whether the step had something to learn from; an online stage may find nothing."""
    return entry["tokens"] > 0


def updated(entry: Entry) -> bool:
    """Whether the step changed the weights."""
    return has_targets(entry) and "skipped" not in entry


def summarize(metrics: Sequence[Entry]) -> Entry:
    """Means over the last twentieth of the steps, and totals of the run; the loss comes first.

    Steps that did not change the weights are counted, and are not part of a mean.
    """
    updates, count = list(filter(updated, metrics)), max(1, len(metrics) // 20)
    tail = list(filter(updated, metrics[-count:])) or updates[-count:] or metrics[-count:]
    averaged = [name for name in tail[-1] if name not in _NOT_AVERAGED]
    summary = {name: sum(m.get(name, 0.0) for m in tail) / len(tail) for name in averaged}
    summary["clipped_share"] = sum("clipped" in m for m in updates) / max(1, len(updates))
    if skipped := sum("skipped" in m for m in metrics):
        summary["skipped_steps"] = skipped
    if empty := sum(not has_targets(m) for m in metrics):
        summary["empty_steps"] = empty
    tokens, seconds = sum(m["tokens"] for m in metrics), sum(m["seconds"] for m in metrics)
    summary["tokens_per_second"] = tokens / max(seconds, 1e-9)
    summary |= {"tokens": tokens, "steps": len(metrics)}
    if HELD_OUT in metrics[-1]:
        summary[HELD_OUT] = metrics[-1][HELD_OUT]
        summary[f"best_{HELD_OUT}"] = min(m.get(HELD_OUT, math.inf) for m in metrics)
    return summary
