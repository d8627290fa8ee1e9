"""`openqwen reward score FILE`: the answers of a file with a reward model's scores."""

import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from openqwen.engine.score import RewardModel
from openqwen.evaluate.reward_report import reward_report
from openqwen.evaluate.scored_records import score_records
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
    digests = [sha256(path) for path in [*data_files(file), *sorted(folder.glob("*.safetensors"))]]
    made_from = hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
    partial = output.with_name(f".{output.name}.{made_from}.partial")
    done = _whole_lines(partial)
    with (
        disk_errors(output),
        progress("score", count_records(file), "records", done) as bar,
        open(partial, "a", encoding="utf-8") as lines,
    ):
        for record in score_records(scorer, islice(read_records(file), done, None), batch_tokens):
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.advance()
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(partial, output)
    console.print(f"scored     {bar.done:,} records in {output}")
    _print_report(output)


def _whole_lines(path: Path) -> int:
    """The number of lines in a file, after its last line is removed if it is not whole."""
    count = end = 0
    with open(path, "a+b") as file:
        file.seek(0)
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _print_report(path: Path) -> None:
    report = reward_report(read_jsonl(path))
    if not report:
        return
    total = {key: report[f"pair_accuracy_{key}"] for key in ("low", "high", "n")}
    rows = {"all pairs": {"accuracy": report["pair_accuracy"], **total}}
    rows |= report["pair_accuracy_by_task"] | report["by_criterion"]
    table = Table("ranked right", "share", "95 % interval", "pairs", box=None)
    for name, row in rows.items():
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(name, f"{row['accuracy']:.1%}", interval, f"{row['n']:,}")
    console.print(table)
    console.print(f"lists      {report['list_accuracy']:.1%} of the prompts have all pairs right")
    if "prefers_longer" in report:
        chosen = f"the chosen one is longer in {report['chosen_longer']:.1%}"
        text = f"the longer answer scores higher in {report['prefers_longer']:.1%} of the pairs"
        console.print(f"length     {text}; {chosen}")
    error = f"{report['calibration_error']:.3f} from the accuracy on average"
    console.print(f"calibrated the predicted probability is {error}")
