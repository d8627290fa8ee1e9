"""Run each phase of `gpu_phases.py` in its own process; print a table and write a JSON file.

Each phase has a time limit. A phase that fails or takes too long does not stop the next. `scripts/gpu_check.sh` calls this.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Name and most seconds, the cheapest and most telling first.
PHASES = {
    "roofs": 40,
    "parity": 90,
    "verify": 60,
    "train": 150,
    "experts": 40,
    "dual_chunk": 60,
    "decode": 100,
    "serving": 90,
}


def main() -> int:
    """Returns 0 where every phase passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "phases", nargs="*", help=f"phases to run; all by default: {', '.join(PHASES)}"
    )
    parser.add_argument("--seconds", type=float, default=480, help="time for all phases together")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    options = parser.parse_args()
    unknown = set(options.phases) - set(PHASES)
    if unknown:
        parser.error(f"unknown phases {', '.join(sorted(unknown))}; known: {', '.join(PHASES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    end = time.monotonic() + options.seconds
    for name in options.phases or PHASES:
        left = end - time.monotonic()
        if left < 10:
            found[name] = {"status": "no time left", "rows": []}
            continue
        found[name] = run(name, min(PHASES[name], left), found.get("roofs"), options.output)
        (options.output / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return int(any(phase["status"] != "passed" for phase in found.values()))


def run(name: str, seconds: float, roofs: dict[str, Any] | None, output: Path) -> dict[str, Any]:
    """One phase in a process; what it had found when it failed or ran out of time is kept."""
    print(f"== {name} (at most {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    rows = output / f"{name}.jsonl"
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu_phases.py"), name, str(rows)]
    environment = os.environ | {"GPU_ROOFS": json.dumps((roofs or {}).get("rows", []))}
    try:
        done = subprocess.run(command, timeout=seconds, env=environment)
        status = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
    lines = rows.read_text().splitlines() if rows.exists() else []
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "rows": [json.loads(line) for line in lines],
    }


def table(found: dict[str, Any]) -> str:
    """All rows, one line each."""
    lines = []
    for name, phase in found.items():
        lines.append(f"{name}: {phase['status']}, {phase.get('seconds', 0)} s")
        for row in phase["rows"]:
            values = "  ".join(f"{key} {value}" for key, value in row.items() if key != "what")
            lines.append(f"  {row['what']:<44} {values}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
