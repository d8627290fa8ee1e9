"""A new stage is one file and one line of the graph: everything else finds it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import openqwen

FILE = '''"""The `echo` stage."""

from pydantic import Field

from openqwen.support.stage import CORPUS, Effort, Stage, StageRun
from openqwen.train.parallel import join
from openqwen.train.trainer import TrainingConfig


class EchoConfig(TrainingConfig):
    """What to say."""

    words: int = Field(3, gt=0, description="how many words to say")


def run_echo(run: StageRun) -> dict[str, float]:
    """A corpus → an echo."""
    (run.output / "echo.txt").write_text("echo " * run.config.words)
    return {"ranks": join().total([1.0])[0]}


STAGE = Stage(
    name="echo",
    help="Say it again.",
    config=EchoConfig,
    inputs={"corpus": CORPUS},
    outputs=["echo"],
    run=run_echo,
    trains_on_ranks=True,
    estimate=lambda recipe, roles: Effort(rows={64: 1000.0 * recipe.echo.words}, micro_tokens=64, longest=64),
)
'''
LINE = '    ("echo", "openqwen.train.echo", {"corpus": "corpus"}),\n'
BEFORE = '    ("tokenizer", '
SETTINGS = "corpus: {task_documents: 20, heldout_share: 0.2}\necho: {words: 4}\n"
# Reads command lines as JSON, runs them in one process, and prints for each its exit status and its
# words.
SCRIPT = """
import contextlib, io, json, sys
from openqwen.cli import main

for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, out.getvalue()]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the package and one stage more, a recipe, and raw text."""
    place = tmp_path_factory.mktemp("echo")
    shutil.copytree(Path(openqwen.__file__).parent, place / "openqwen")
    (place / "openqwen" / "train" / "echo.py").write_text(FILE)
    graph = place / "openqwen" / "recipe" / "graph.py"
    text = graph.read_text()
    assert text.count(BEFORE) == 1
    graph.write_text(text.replace(BEFORE, LINE + BEFORE))
    (place / "small.yaml").write_text(SETTINGS)
    (place / "raw").mkdir()
    for n in range(20):
        lines = [
            f"def f_{a}_{n}(x):\n    return x + {a * n}  # adds {a * n} to x\n" for a in range(20)
        ]
        (place / "raw" / f"m{n}.py").write_text("\n".join(lines))
    return place


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(place), "COLUMNS": "200"}


def test_one_file_and_one_line_are_enough(place):
    run = ["run", "small.yaml", "--corpus", "raw", "--output", "run"]
    commands = [
        ["--help"],
        ["echo", "--help"],
        [*run, "--dry-run"],
        [*run, "--until", "echo", "--echo.words", "5"],
        ["echo", "--corpus", "run/corpus", "--output", "alone", "--recipe", "small.yaml"],
        ["plan", "small.yaml", "--gpus", "8xH100"],
        ["run", "small.yaml", "--echo.words", "none"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(commands), cwd=place, env=environment(place), capture_output=True, text=True, check=True,
    )  # fmt: skip
    statuses, words = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    assert list(statuses) == [0, 0, 0, 0, 0, 0, 2], words
    overview, about, planned, _, _, devices, _ = words
    assert re.search(r"^  echo +Say it again\.$", overview, re.M)
    assert all(
        text in about
        for text in ("--corpus", "A corpus artifact.", "--words", "how many words to say")
    )
    lines = [line.split() for line in planned.splitlines() if line.split()]
    (shown,) = (line for line in lines if line[0] == "echo")
    assert shown[-1].startswith("~")
    assert "20 of 20 to make" in planned
    assert [line.split()[0] for line in devices.splitlines() if " as written " in line][:2] == [
        "echo",
        "pretrain",
    ]
    assert (place / "run" / "echo" / "echo.txt").read_text() == "echo " * 5
    assert (place / "alone" / "echo.txt").read_text() == "echo " * 4
    page = (place / "run" / "report.html").read_text()
    assert page.index(">corpus<") < page.index(">echo<")


@pytest.mark.slow
def test_every_rank_joins_a_new_stage(place):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "openqwen.cli"]
    command = ["echo", "--corpus", str(place / "raw"), "--output", str(place / "ranks")]
    done = subprocess.run(
        [sys.executable, *launch, *command], env=environment(place), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "ranks" / "manifest.json").read_text())["metrics"] == {"ranks": 2.0}
