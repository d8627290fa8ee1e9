"""`openqwen reward score FILE`: the answers of a file with a reward model's scores."""

import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro
from rich.table import Table

from openqwen.engine.score import RewardModel
from openqwen.evaluate.reward_report import reward_report
from openqwen.evaluate.scored_records import REWARD, SIDES, rewards, score_records
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import read_jsonl, sha256
from openqwen.support.hub import local
from openqwen.support.progress import console, progress
from openqwen.support.records import count_records, data_files, read_records


def reward_score(
    file: Annotated[str, tyro.conf.Positional],
    model: str,
    output: Path | None = None,
    batch_tokens: int = 8_192,
) -> None:
    """Score the answers of a file with a reward model.

    Writes every record with its scores, and prints how many preferences are ranked right. The same
    command continues a run that was interrupted.

    Args:
        file: Conversations, preferences or lists of answers: .jsonl, .json, .parquet or
            hub:owner/name:split.
        model: The reward model: a folder or a hub id.
        output: The file to write; default: NAME.scored.jsonl in the current folder.
        batch_tokens: Tokens of one forward call; a longer answer goes alone.
    """
    name = file.rpartition("/")[2].partition(".")[0].replace(":", "-")
    output = output or Path(f"{name}.scored.jsonl")
    if output.exists():
        raise OpenQwenError("This file exists already.", output, "remove it, or give --output")
    folder = local(model)
    scorer = RewardModel.load(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Its name says what it is made from: other data or another model begin anew.
    partial = output.with_name(f".{output.name}.{_digest(file, folder)}.partial")
    done = _whole_lines(partial)
    with (
        disk_errors(output),
        open(partial, "a", encoding="utf-8") as lines,
        progress("score", count_records(file), "records", done) as bar,
    ):
        for record in score_records(scorer, islice(read_records(file), done, None), batch_tokens):
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.advance()
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(partial, output)
    _print_summary(output)


def _digest(file: str, model: Path) -> str:
    """What the scores depend on. Of the model's files the sizes and times are enough."""
    seen: list[Any] = [sha256(path) for path in data_files(file)]
    for path in sorted(model.iterdir()) if model.is_dir() else [model]:
        status = path.stat()
        seen.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:12]


def _whole_lines(path: Path) -> int:
    """The number of lines in a file, after its last line is removed if it is not whole."""
    if not path.is_file():
        return 0
    count = end = 0
    with open(path, "r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _print_summary(path: Path) -> None:
    total = too_long = 0
    found: list[float] = []
    for record in read_jsonl(path):
        ends = SIDES if REWARD + SIDES[0] in record else [""]
        scores = [score for end in ends for score in rewards(record, end)]
        total, too_long = total + 1, too_long + (None in scores)
        found += [score for score in scores if score is not None]
    mean_score = f", mean score {mean(found):.3f}" if found else ""
    console.print(f"scored     {total:,} records in {path}{mean_score}")
    if too_long:
        text = "with an answer beyond the model's window, which has no score"
        console.print(f"too long   {too_long:,} records {text}")
    report = reward_report(read_jsonl(path))
    if not report:
        return
    best = f"{report['list_accuracy']:.1%}" if "list_accuracy" in report else "unknown"
    console.print(f"best       a chosen answer scores highest in {best} of the records")
    names = {"accuracy": "pair_accuracy"} | {k: f"pair_accuracy_{k}" for k in ("low", "high", "n")}
    rows = {"all": {key: report[name] for key, name in names.items()}}
    if len(report["pair_accuracy_by_task"]) > 1:
        rows |= report["pair_accuracy_by_task"]
    table = Table("pairs", "ranked right", "95 % interval", "number", box=None)
    for name, row in (rows | report["by_criterion"]).items():
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(name, f"{row['accuracy']:.1%}", interval, f"{row['n']:,}")
    console.print(table)
    if "prefers_longer" in report:
        longer = f"{report['prefers_longer']:.1%} of the pairs, and is the chosen one in"
        longer += f" {report['chosen_longer']:.1%}"
        console.print(f"length     the longer answer scores higher in {longer}")
    error = report["calibration_error"]
    console.print(f"calibrated to {error:.3f}: mean difference of predicted and actual accuracy")
