"""What a run made: counts, the yield at each gate, why candidates were refused."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from openqwen.support.progress import console

_REASONS = 50  # different reasons in the report


class Report:
    """Counts over finished items, in order.

    files: the kinds of records that the method makes.
    """

    def __init__(self, method: str, files: Sequence[str]):
        self.method, self.files = method, files
        self.counts: Counter[str] = Counter()
        self.gates: dict[str, list[int]] = {}
        self.reasons: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def add(self, line: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Count a finished item; yield its records and refusals, each with the name of its file.

        A record that another item has made already, but for its origin, is left out.
        """
        self.counts["items"] += line["id"] is not None  # None: the steps before all items
        self.counts["requests"] += line["calls"]
        self.counts["tokens"] += line["tokens"]
        self.counts["failures"] += line["failures"]
        for name, (passed, tried) in line["gates"].items():
            counts = self.gates.setdefault(name, [0, 0])
            counts[0] += passed
            counts[1] += tried
        for name, record in line["records"]:
            content = {key: value for key, value in record.items() if key != "origin"}
            digest = hashlib.sha256(json.dumps([name, content]).encode()).digest()[:16]
            if digest in self._seen:
                self.counts["duplicates"] += 1
                continue
            self._seen.add(digest)
            self.counts[name] += 1
            yield name, record
        for entry in line["quarantine"]:
            self.counts["quarantined"] += 1
            self.reasons[entry["reason"].partition(":")[0]] += 1
            yield "quarantine", entry

    def metrics(self) -> dict[str, float]:
        """The counts, the most important first."""
        work = ("items", "requests", "tokens", "quarantined", "duplicates", "failures")
        return {name: float(self.counts[name]) for name in (*self.files, *work)}

    def as_json(self) -> dict[str, Any]:
        """Everything, for synthesis.json."""
        gates = {
            name: {"passed": passed, "of": tried, "yield": round(passed / tried, 4)}
            for name, (passed, tried) in self.gates.items()
        }
        reasons = dict(self.reasons.most_common(_REASONS))
        return {"method": self.method, **self.metrics(), "gates": gates, "reasons": reasons}

    def show(self) -> None:
        """Print the yield at each gate."""
        for name, (passed, tried) in self.gates.items():
            share = passed / tried
            console.print(f"  {name:<14}{passed:>9,} of {tried:,} ({share:.0%})", markup=False)
