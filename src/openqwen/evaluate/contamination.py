"""Questions that training data holds, and the scores on the others.

Two criteria of the Qwen2 report's section on contamination: a question counts as contaminated where
one of its texts shares 13 words in a row with the data (its analysis of scores), or where it is
found by the rule by which training data was dropped (the longest common subsequence).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openqwen.corpus.decontaminate import EvaluationIndex
from openqwen.evaluate.benchmark_run import Row, mean_score
from openqwen.evaluate.items import BenchmarkItem, record_texts
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json
from openqwen.support.hub import DATA_SUFFIXES
from openqwen.support.progress import Progress, progress
from openqwen.support.records import read_records

RUNS, RULE = "13 words in a row", "longest common subsequence"
Found = dict[str, dict[str, set[str]]]  # benchmark -> criterion -> ids of items


def find_contaminated(
    items: Mapping[str, Sequence[BenchmarkItem]], folder: Path, cache: Path
) -> Found:
    """The items of benchmarks that the data in a folder holds, by each criterion.

    Args:
        items: by benchmark. Generated ones have no texts that could stand anywhere.
        folder: documents, demonstrations or other records: every text in them is read.
        cache: a folder; the same items and files are compared once.

    Raises:
        OpenQwenError: the folder has no such files.
    """
    texts = {
        json.dumps([name, item.id, number]): text
        for name, each in items.items()
        for item in each
        for number, text in enumerate(item.texts)
    }
    kinds = (*DATA_SUFFIXES, ".txt")
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(kinds))
    if not files:
        do = f"name a folder with files of {', '.join(DATA_SUFFIXES)} or .txt"
        raise OpenQwenError("There is no training data here.", folder, do)
    known = cache / f"contamination-{_digest(texts, files)}.json"
    if known.is_file():
        keys = read_json(known)
    else:
        with progress("contamination", len(files), "files") as bar:
            runs, rule = EvaluationIndex(texts).analysis(_texts(files, bar))
        keys = {RUNS: sorted(runs), RULE: sorted(rule)}
        cache.mkdir(parents=True, exist_ok=True)
        write_json(known, keys)
    compared = [name for name, each in items.items() if any(item.texts for item in each)]
    found: Found = {name: {RUNS: set(), RULE: set()} for name in compared}
    for criterion, wheres in keys.items():
        for where in wheres:
            name, item, _ = json.loads(where)
            found[name][criterion].add(item)
    return found


def mark_contaminated(
    scores: dict[str, Any], rows: Sequence[Row], found: Mapping[str, set[str]]
) -> None:
    """Add to each row the criteria that it meets, and to the scores those of the clean part.

    scores["contamination"]: by criterion the number of contaminated items, their share, and
    `clean`, the score of the others with its interval and `n`; None where there are no others.
    """
    kept = [row for row in rows if row["status"] != "infra"]
    asked = {row["id"] for row in kept}
    scores["contamination"] = {}
    for row in rows:
        row["contaminated"] = [name for name, ids in found.items() if row["id"] in ids]
    for criterion, ids in found.items():
        clean = [row for row in kept if row["id"] not in ids]
        mean = mean_score(clean) | {"n": len(asked - ids)} if clean else None
        met = len(asked & ids)
        share = met / max(1, len(asked))
        scores["contamination"][criterion] = {"n": met, "share": share, "clean": mean}


def _texts(files: Sequence[Path], bar: Progress) -> Iterator[str]:
    for path in files:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8", errors="replace")
        else:
            for _, record in read_records(path):
                yield from record_texts(record)
        bar.advance()


def _digest(texts: Mapping[str, str], files: Sequence[Path]) -> str:
    total = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for path in files:
        status = path.stat()
        total.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]
