"""Programs a second in the sandbox: the references of HumanEval and MBPP, one worker.

    python benchmarks/sandbox.py --data FOLDER [--tier strict] [--rounds 5] [--bubblewrap]

FOLDER holds HumanEval.jsonl.gz and mbpp.jsonl.gz as published. Three forms of one program: with its
tests behind it in one process; with the tests in a process of their own, as the grader `code` runs
them; and with `import numpy` before it. `--bubblewrap` runs the first form under bwrap, too: a new
Python for each program, no network, the system read-only. The forms take turns; medians over the
rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from openqwen.sandbox import Pool, Program
from openqwen.tasks import Task
from openqwen.tasks.readers import read_problems

BUBBLEWRAP = (
    "bwrap --ro-bind / / --tmpfs /tmp --proc /proc --dev /dev --unshare-all --die-with-parent "
    "--new-session --clearenv"
)


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tier", default="strict")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bubblewrap", action="store_true")
    options = parser.parse_args()
    tasks = [
        *read_problems("humaneval", options.data / "HumanEval.jsonl.gz"),
        *read_problems("mbpp", options.data / "mbpp.jsonl.gz"),
    ]
    tasks = [one for one in tasks if one.origin.get("split", "test") == "test"]
    with (
        Pool(1, tier=options.tier) as pool,
        Pool(1, tier=options.tier, packages=["numpy"]) as numbers,
    ):
        forms: dict[str, Callable[[], float]] = {
            "tests in one process": lambda: rate(pool, [together(one) for one in tasks]),
            "tests in a process of their own": lambda: rate(pool, [apart(one) for one in tasks]),
            "with numpy": lambda: rate(numbers, [together(one, "import numpy\n") for one in tasks]),
        }
        if options.bubblewrap:
            forms["bubblewrap"] = lambda: bubblewrap([together(one).source for one in tasks[::5]])
        seen: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(options.rounds):
            for name, measure in forms.items():
                seen[name].append(measure())
    print(f"{len(tasks)} programs, tier {options.tier}, {os.cpu_count()} cores, one worker")
    for name, rates in seen.items():
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        print(f"{name}: {statistics.median(rates):.0f} programs a second ({spread})")


def together(task: Task, before: str = "") -> Program:
    """The reference with its tests behind it, called as HumanEval calls them."""
    source = f"{before}{solution(task)}\n{task.reference['tests']}\n"
    if "def check(" in task.reference["tests"]:
        source += f"check({task.reference['entry']})\n"
    return Program(source)


def apart(task: Task) -> Program:
    """The reference, with its tests in a process of their own."""
    reference = task.reference
    return Program(solution(task), tests=reference["tests"], entry=reference.get("entry"))


def solution(task: Task) -> str:
    """The whole program of a reference."""
    parts = (task.reference.get(key, "") for key in ("prefix", "solution", "setup"))
    return "{}{}\n{}".format(*parts)


def rate(pool: Pool, programs: list[Program]) -> float:
    """Programs a second; every one must pass."""
    start = time.perf_counter()
    verdicts = pool.run(programs)
    seconds = time.perf_counter() - start
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        raise SystemExit(f"{len(failed)} references failed, the first: {failed[0]}")
    return len(programs) / seconds


def bubblewrap(sources: list[str]) -> float:
    """Programs a second under bwrap."""
    start = time.perf_counter()
    for source in sources:
        command = [*BUBBLEWRAP.split(), sys.executable, "-I", "-"]
        subprocess.run(command, input=source.encode(), check=True, capture_output=True)
    return len(sources) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
