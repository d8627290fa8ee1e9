"""DPO in float32 and in bfloat16 on a CPU: whether the loss curves differ by more than their noise.

    python benchmarks/precision_curve.py --data hh_harmless_base_test.jsonl.gz --model MODEL \
        --output FOLDER

Both runs start from MODEL (a folder of float32 weights), train all of them on the same short pairs
of Anthropic's HH in the same order, one a step, and are kept in FOLDER: the same command goes on
where it was. It prints, for each window of steps, the mean loss of float32, the mean difference of
bfloat16's to it with its standard error, and the largest difference. The last line is of the last
half of the steps.
"""

import re
import statistics
import subprocess
import sys
from pathlib import Path

import tyro

from openqwen.support.files import read_json, read_jsonl, write_json, write_jsonl
from openqwen.support.records import Record

_WINDOW = 25  # steps


def main(data: Path, model: Path, output: Path, steps: int = 200, rate: float = 2e-6) -> None:
    """Train twice and compare.

    Args:
        data: HH's preferences, as published.
        model: A folder of a checkpoint.
        output: Where the runs are kept.
        steps: Pairs, one a step.
        rate: The learning rate.
    """
    output.mkdir(parents=True, exist_ok=True)
    pairs = output / "pairs.jsonl"
    write_jsonl(pairs, short_pairs(data, steps))
    losses = {}
    for precision in ("float32", "bfloat16"):
        kept = output / f"{precision}.json"
        if not kept.exists():
            write_json(kept, trained(model, pairs, output / precision, precision, rate))
        losses[precision] = read_json(kept)
    print("steps | float32 | bfloat16 − float32 | largest")
    half = len(losses["float32"]) // 2
    windows = [(start, start + _WINDOW) for start in range(0, 2 * half, _WINDOW)]
    for start, end in [*windows, (half, 2 * half)]:
        exact = losses["float32"][start:end]
        gaps = [b - a for a, b in zip(exact, losses["bfloat16"][start:end])]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        spread = statistics.stdev(exact) / len(exact) ** 0.5
        print(
            f"{start + 1} to {end} | {statistics.mean(exact):.4f} ± {spread:.4f} | "
            f"{statistics.mean(gaps):+.4f} ± {error:.4f} | {max(map(abs, gaps)):.4f}"
        )


def short_pairs(data: Path, count: int) -> list[Record]:
    """The first pairs whose question and two answers have less than 600 characters together."""
    pairs = []
    for row in read_jsonl(data):
        asked, chosen = _turns(row["chosen"])
        _, rejected = _turns(row["rejected"])
        if asked and chosen and rejected and len(asked + chosen + rejected) < 600:
            says = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            prompt = [{"role": "user", "content": asked}]
            pairs.append({"prompt": prompt, "chosen": says[0], "rejected": says[1]})
        if len(pairs) == count:
            break
    return pairs


def _turns(text: str) -> tuple[str, str]:
    """The question and the answer of a conversation of one turn; empty texts for a longer one."""
    parts = re.split(r"\n\n(?:Human|Assistant): ?", text)[1:]
    return (parts[0].strip(), parts[1].strip()) if len(parts) == 2 else ("", "")


def trained(model: Path, pairs: Path, output: Path, precision: str, rate: float) -> list[float]:
    """The losses of the steps of one run."""
    words = ["dpo", "--model", model, "--preferences", pairs, "--output", output, "--batch", 1]
    words += ["--epochs", 1, "--train.precision", precision, "--train.learning-rate", rate]
    words += ["--train.schedule", "constant"]
    subprocess.run([sys.executable, "-m", "openqwen.cli", *map(str, words)], check=True)
    return [entry["loss"] for entry in read_jsonl(output / "metrics.jsonl")]


if __name__ == "__main__":
    tyro.cli(main)
