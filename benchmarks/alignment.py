"""Run a recipe with several seeds, and print what each stage gained on its own start.

    python benchmarks/alignment.py tiny --output runs/alignment
    python benchmarks/alignment.py tiny --output runs/alignment --print

A seed's run is `openqwen run RECIPE --seed N --output OUTPUT/seed-N`. The same command continues
where it was interrupted; `--print` starts nothing and prints the seeds that are finished. What
stands behind `--` goes to `openqwen run`. The output is Markdown for docs/expected.md.

Square brackets hold 95 % intervals. They are over seeds and problems: another seed would train
another model, and another test would ask other problems. The variance of a mean over both is that
over seeds, plus that over problems, minus that of both together, which the two share (Cameron,
Gelbach and Miller 2011). Three seeds say little about their own spread; Student's t with
Satterthwaite's degrees of freedom takes account of that. With one seed the interval is over
problems alone.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openqwen.recipe.report.run import EVALUATE, Run, load_run
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.page.text import duration, signed
from openqwen.tasks.checkable import generate_tasks

# How tasks are answered -> the field of an answer in test.jsonl.
DECODING = {"greedy": "correct", "at 0.7": "correct_at_0.7", "at 1.0": "sampled_correct"}
# The same of the style: whether an answer stands alone.
STYLE = {
    "style, greedy": "style",
    "style, at 0.7": "style_at_0.7",
    "style, at 1.0": "sampled_style",
}


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values_SN: np.ndarray, problems: Sequence[str]) -> Interval:
    """The mean of values by seed and item, with its interval over seeds and problems.

    problems: one for each item; items of one problem are not independent.
    """
    values_SN = np.asarray(values_SN, float)
    seeds, items = values_SN.shape
    _, owner_N = np.unique(problems, return_inverse=True)
    count = owner_N.max() + 1
    rest_SN = values_SN - values_SN.mean()
    totals_SG = np.stack([np.bincount(owner_N, row, count) for row in rest_SN])
    by_seed = _variance(totals_SG.sum(1), seeds * items)
    by_problem = _variance(totals_SG.sum(0), seeds * items)
    both = _variance(totals_SG.ravel(), seeds * items)
    variance = max(by_seed + by_problem - both, by_seed, by_problem)
    parts = by_seed**2 / max(seeds - 1, 1) + by_problem**2 / max(count - 1, 1)
    half = t_quantile(variance**2 / parts) * math.sqrt(variance) if parts else 0.0
    mean = float(values_SN.mean())
    return Interval(mean, mean - half, mean + half)


def _variance(totals: np.ndarray, items: int) -> float:
    """The variance of a mean of `items` values, from the sums over independent groups."""
    groups = len(totals)
    return float((totals**2).sum()) / items**2 * groups / (groups - 1) if groups > 1 else 0.0


def t_quantile(freedom: float, share: float = 0.975) -> float:
    """Student's t below which a share of the distribution lies, to four digits."""

    def below(t: float) -> float:
        x = np.linspace(0, t, 2_001)
        constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = np.exp(constant - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
        density /= math.sqrt(freedom * math.pi)
        weights = np.where(np.arange(len(x)) % 2, 4, 2)  # Simpson's rule
        weights[[0, -1]] = 1
        return 0.5 + float(weights @ density) * (x[1] - x[0]) / 3

    low, high = 0.0, 1.0
    while below(high) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return high


def right(runs: Sequence[Run], stage: str, field: str) -> np.ndarray:
    """Which test answers of a stage are right, or what else a field says, by seed and item."""
    rows = []
    for run in runs:
        evaluation = run.stage(EVALUATE + stage)
        answers = evaluation.jsonl("test.jsonl") if evaluation else []
        rows.append([float(answer[field]) for answer in answers])
    return np.array(rows)


def problems_of(run: Run, stage: str) -> list[str]:
    """The problem of each test item: several items put one problem in different words."""
    evaluation = run.stage(EVALUATE + stage)
    asked = [answer["prompt"] for answer in evaluation.jsonl("test.jsonl")]
    tasks = generate_tasks(Generators(0)["test"], len(asked), split="test")
    if [task.prompt for task in tasks] != asked:  # of another version
        return list(map(str, asked))
    return [task.origin["problem"] for task in tasks]


def tables(runs: Sequence[Run]) -> str:
    """The results of runs that differ in their seeds, as Markdown."""
    tested = [name for name in runs[0].evaluated if "test_accuracy" in runs[0].scores(name)]
    stages = [name for name in tested if all(name in run.evaluated for run in runs)]
    if not stages:
        raise OpenQwenError("No stage of this run was tested.", runs[0].folder, "run it up to sft")
    problems = problems_of(runs[0], stages[0])
    lines = _shares(runs, stages, DECODING, "answers that are right", problems)
    lines += ["", *_shares(runs, stages, STYLE, "answers that stand alone", problems)]
    lines += ["", "| reward model | each seed, % |", "|---|---|"]
    pairs = (("pairs ranked right", "test_pair_accuracy"), ("near misses", "test_near_accuracy"))
    scores = [run.scores("reward") for run in runs]
    for name in scores[0].get("test_by_criterion", {}):
        rows = [one["test_by_criterion"][name]["accuracy"] for one in scores]
        lines.append(f"| pairs that differ in {name} | {', '.join(map(_percent, rows))} |")
    for title, key in pairs:
        found = [one[key] for one in scores if key in one]
        if found:
            lines.append(f"| {title} | {', '.join(map(_percent, found))} |")
    return "\n".join(lines)


def _shares(
    runs: Sequence[Run],
    stages: Sequence[str],
    fields: dict[str, str],
    title: str,
    problems: Sequence[str],
) -> list[str]:
    """A table of the shares of answers with these fields, and of the gains on the start."""
    lines = [
        f"| stage | {title} | each seed, % | mean, % | gain on its start, points | each seed |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for stage in stages:
        start = runs[0].scores(stage).get("start")
        for decoding, field in fields.items():
            values_SN = right(runs, stage, field)
            told = _told(values_SN, problems, _percent)
            cells = [stage, decoding, _each(values_SN, _percent), told]
            if start:
                gain_SN = values_SN - right(runs, start, field)
                gain = _told(gain_SN, problems, _points)
                cells += [f"{gain} on {start}", _each(gain_SN, _points)]
            else:
                means = 100 * values_SN.mean(1)
                far = float(np.abs(means - means.mean()).max())
                cells += [f"seeds lie within ±{far:.1f} of their mean", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _told(values_SN: np.ndarray, problems: Sequence[str], show) -> str:
    mean, low, high = interval(values_SN, problems)
    return f"{show(mean)} [{show(low)}, {show(high)}]"


def _each(values_SN: np.ndarray, show) -> str:
    return ", ".join(show(float(row.mean())) for row in values_SN)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return signed(100 * value, 1)


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a tested model."""
    return any(folder.glob(f"{EVALUATE}*/test.jsonl"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished, and print the tables."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--print", action="store_true", help="start nothing")
    options = parser.parse_args(arguments[:cut])
    folders = [options.output / f"seed-{seed}" for seed in options.seeds]
    for seed, folder in zip(options.seeds, folders):
        if not options.print:
            command = [sys.executable, "-m", "openqwen.cli", "run", options.recipe]
            command += ["--seed", str(seed), "--output", str(folder), *arguments[cut + 1 :]]
            if subprocess.run(command).returncode:
                raise SystemExit(f"seed {seed} did not finish; the same command continues it")
    runs = [load_run(folder) for folder in folders if is_finished(folder)]
    if not runs:
        raise SystemExit(f"no finished run in {options.output}")
    times = ", ".join(f"{run.name} {duration(run.seconds)}" for run in runs)
    print(f"`{options.recipe}`: {times}.\n\n{tables(runs)}")


if __name__ == "__main__":
    main()
