"""The GPU check's script and its first phases, here on the CPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GPU_CHECK_DEVICE": "cpu", "OUT": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rows"), [("parity", 8), ("verify", 12)])
def test_parity_and_proofs_hold(tmp_path, phase, rows):
    place = tmp_path / "rows.jsonl"
    phases = str(ROOT / "benchmarks" / "gpu_phases.py")
    done = run(sys.executable, phases, phase, str(place), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in place.read_text().splitlines()]
    assert len(found) == rows
    assert all(row["holds"] for row in found)


def test_a_phase_that_fails_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    driver = runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py"))
    driver["PHASES"] |= {"nothing": 300, "nowhere": 300}  # gpu_phases.py knows neither
    monkeypatch.setattr(sys, "argv", ["gpu_check", "nothing", "nowhere", "--output", str(tmp_path)])
    assert driver["main"]() == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: phase["status"] for name, phase in found.items()} == {
        "nothing": "failed (1)",
        "nowhere": "failed (1)",
    }
    assert "nowhere: failed (1)" in capsys.readouterr().out


def test_an_unknown_phase_is_named(tmp_path):
    done = run("sh", str(ROOT / "scripts" / "gpu_check.sh"), "rooves", folder=tmp_path)
    assert done.returncode == 2
    assert "unknown phases rooves" in done.stderr
