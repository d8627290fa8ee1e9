"""Print the tables of docs/expected.md from runs of the tiny recipe with several seeds.

    for seed in 1 2 3; do openqwen run tiny --seed $seed --output runs/tiny-$seed; done
    python benchmarks/tiny_seeds.py runs/tiny-1 runs/tiny-2 runs/tiny-3

Square brackets hold the 95 % interval over the problems of one run. "mean" is the mean over the
runs, followed by the smallest and the largest of them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from openqwen.recipe.report.run import Run, load_run
from openqwen.recipe.report.scores import TEMPERATURES
from openqwen.support.page.text import duration, signed

STAGES = ("pretrain", "extend", "sft", "dpo", "online-dpo", "grpo")
SCORES = (
    ("bits per byte, development", "bits_per_byte"),
    ("bits per byte, test", "test_bits_per_byte"),
    ("checked tasks, development, greedy", "checked_accuracy"),
    ("checked tasks, development, at 1.0", "sampled_accuracy"),
    *((f"test, {title}", f"{key}_accuracy") for title, key in TEMPERATURES),
    *((f"style, {title}", f"{key}_style") for title, key in TEMPERATURES),
    ("win rate on its start, by the reward model", "win_rate"),
)
PAIRS = (
    ("pairs ranked right, test", "test_pair_accuracy"),
    ("near misses, test", "test_near_accuracy"),
)


def plain(value: float) -> str:
    """Bits per byte."""
    return f"{value:.3f}"


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of two shares in points."""
    return signed(100 * value, 1)


def cell(runs: list[dict[str, Any]], key: str, show: Callable[[float], str]) -> str:
    """Every run's value with its interval; with several runs their mean and range too."""
    found = [scores for scores in runs if key in scores]
    values = [scores[key] for scores in found]
    told = []
    for scores in found:
        ends = [show(scores[f"{key}_{end}"]) for end in ("low", "high") if f"{key}_{end}" in scores]
        told.append(show(scores[key]) + (f" [{', '.join(ends)}]" if ends else ""))
    if len(values) > 1:
        told.append(f"mean {show(mean(values))} ({show(min(values))} to {show(max(values))})")
    return "; ".join(told)


def main(folders: list[Path]) -> None:
    """Print the tables."""
    runs: list[Run] = [load_run(folder) for folder in folders]
    times = ", ".join(f"{run.name} {duration(run.seconds)}" for run in runs)
    print(
        f"In all: {times}.\n\n| stage | score | {', '.join(run.name for run in runs)} "
        "|\n|---|---|---|"
    )
    for stage in STAGES:
        scores = [run.scores(stage) for run in runs]
        for title, key in SCORES:
            if text := cell(scores, key, plain if "bits" in key else share):
                print(f"| {stage} | {title} | {text} |")
    for title, key in PAIRS:
        print(f"| reward | {title} | {cell([run.scores('reward') for run in runs], key, share)} |")
    print("\n| gain on the own start, points | greedy | at 0.7 | at 1.0 |\n|---|---|---|---|")
    control = cell([run.scores("sft") for run in runs], "test_cooler_gain", points)
    print(f"| sft at 0.9, on itself at 1.0 (control) | | | {control} |")
    for stage in ("dpo", "online-dpo", "grpo"):
        scores = [run.scores(stage) for run in runs]
        gains = [cell(scores, f"{key}_gain", points) for _, key in TEMPERATURES]
        print(f"| {stage}, on {scores[0].get('start')} | {' | '.join(gains)} |")
    print("\n| stage | time |\n|---|---|")
    for stage in (stage.name for stage in runs[0].stages):
        made = [found.seconds for run in runs if (found := run.stage(stage))]
        print(f"| {stage} | {', '.join(map(duration, made))} |")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
