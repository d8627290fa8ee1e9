"""The recipe under torchrun, two processes: the same stages, the same numbers up to rounding,
resumable alone.
"""

import json
import subprocess
import sys

import pytest

LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
LAUNCH += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "openqwen.cli"]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(place, command, run):
    alone = command("ranks")
    done = subprocess.run([sys.executable, *LAUNCH, *alone[3:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line)
        for line in (place / "ranks" / "online-dpo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(steps) == 4
    assert sum(step["tokens"] for step in steps) > 0
    logs = [
        (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()
        for folder in (place / "ranks", run)
    ]
    ours, theirs = ([json.loads(line) for line in log] for log in logs)
    assert [entry["tokens"] for entry in ours] == [entry["tokens"] for entry in theirs]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert ours[0]["gradient_norm"] == pytest.approx(theirs[0]["gradient_norm"], rel=1e-4)
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-2)
    finished = subprocess.run(alone, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "0 made" in finished.stdout
