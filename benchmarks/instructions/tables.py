"""Tables and a picture of what steps.sh made in a folder: FOLDER/tables.md and FOLDER/coverage.svg.

    python benchmarks/instructions/tables.py FOLDER

With Playwright's Chromium it also photographs the reports of the tags and of the selection.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openqwen.instruct.collaborate.pool import read_pool
from openqwen.instruct.collaborate.select import coverage
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl, write_text
from openqwen.support.generators import Generators

sys.path.append(str(Path(__file__).parent.parent))
from evidence import interval_plot

DRAWS = 200
SIZES = (0.1, 0.25, 0.5, 1.0)  # shares of the selection


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def times(folder: Path) -> str:
    """Seconds of each step, over all attempts that were not killed by SIGKILL."""
    seconds: Counter[str] = Counter()
    for line in (folder / "times.txt").read_text(encoding="utf-8").splitlines():
        name, spent = line.split()
        seconds[name] += int(spent)
    rows = [*seconds.items(), ("all", seconds.total())]
    return table(["step", "seconds"], rows)


def gates(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How many candidates passed each gate of a run of synthesis."""
    return [
        (name, f"{gate['passed']:,} of {gate['of']:,} ({gate['yield']:.0%})")
        for name, gate in report["gates"].items()
    ]


def tags(folder: Path) -> str:
    """What the model wrote, and the tags before and after each step of the aggregation."""
    steps = read_json(folder / "tree.json")["steps"]
    columns = ("step", "tags", "uses", "instructions")
    rows = [
        [f"{step[name]:,}" if name != "step" else step[name] for name in columns] for step in steps
    ]
    report = read_json(folder / "synthesis.json")
    found = table(["answers", "passed"], gates(report))
    return f"{found}\n{table(['after', *columns[1:]], rows)}"


def selection(tagged: Path, chosen: Path) -> tuple[str, str]:
    """The coverage of the selection beside random ones of its size: a table and a picture."""
    own_tags = {one.id: list(one.tags) for one in read_pool(tagged / "instructions.jsonl")}
    scores = list(read_jsonl(chosen / "scores.jsonl"))
    tags = [own_tags[row["id"]] for row in scores]
    place = {row["id"]: n for n, row in enumerate(scores)}
    picked = [place[one.id] for one in read_pool(chosen / "instructions.jsonl")]
    candidates = [n for n, row in enumerate(scores) if "dropped" not in row]
    rng = Generators(0)["random selections"]
    draws = [rng.permutation(candidates)[: len(picked)].tolist() for _ in range(DRAWS)]
    own, random = coverage(tags, picked), np.array([coverage(tags, draw) for draw in draws])
    rows, plotted = [], []
    for size in dict.fromkeys(max(1, round(share * len(picked))) for share in SIZES):
        mine, others = own[size - 1], random[:, size - 1]
        low, high = np.quantile(others, [0.025, 0.975])
        spread = f"{others.mean():.1%} ± {100 * others.std():.1f} [{low:.1%}, {high:.1%}]"
        rows.append((size, f"{mine:.1%}", spread))
        plotted.append((f"{size} selected", 100 * mine, 100 * mine, 100 * mine))
        plotted.append((f"{size} at random", 100 * others.mean(), 100 * low, 100 * high))
    head = ["instructions", "selected", f"at random: mean ± deviation [95 %] of {DRAWS}"]
    title = "tags of the pool that a selection has, in percent (95% of random ones)"
    return table(head, rows), interval_plot(title, plotted)


def evolution(folder: Path) -> str:
    """The share of failed evolutions, why they failed, and the gates by stage and operator."""
    report = read_json(folder / "synthesis.json")
    all_ = report["gates"]["evolved"]
    failed = all_["of"] - all_["passed"]
    rows = [("failed", f"{failed:,} of {all_['of']:,} ({failed / all_['of']:.0%})")]
    rows += [(f"failed: {why}", f"{n:,}") for why, n in report["reasons"].items()]
    return table(["evolutions", "number"], [*rows, *gates(report)[1:]])


def photograph(folder: Path) -> None:
    """Pictures of the reports, where there is a browser."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        return
    try:
        with sync_playwright() as playwright:
            path = os.environ.get("CHROMIUM") or shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 900, "height": 700})
            for name in ("tagged", "chosen"):
                page.goto((folder / name / "report.html").resolve().as_uri())
                page.screenshot(path=folder / f"{name}.png", full_page=True)
    except Error as error:
        print(f"no pictures of the reports: {str(error).splitlines()[0]}")


def main() -> None:
    """Write tables.md and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    chosen, picture = selection(folder / "tagged", folder / "chosen")
    parts = {
        "Time": times(folder),
        "Tags": tags(folder / "tagged"),
        "Coverage": chosen,
        "Evolution": evolution(folder / "harder"),
        "Responses": table(["gate", "passed"], gates(read_json(folder / "tasks/synthesis.json"))),
    }
    text = "\n".join(f"## {title}\n\n{part}" for title, part in parts.items())
    write_text(folder / "tables.md", text)
    write_text(folder / "coverage.svg", picture)
    photograph(folder)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except OpenQwenError as error:
        raise SystemExit(str(error)) from None
