"""Time and memory of reading and writing a Hugging Face folder, beside transformers.

    python benchmarks/checkpoint.py [--size qwen2.5-0.5b] [--repeat 3] [--threads 1]

Makes a folder of random bfloat16 weights of that size, then reads it in both dtypes and writes it,
each in a fresh process, in turn, medians. "first use" reads every weight once: what was only mapped
until then comes from the file.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class NoTokenizer:
    """Weights alone are measured."""

    eos_id, endoftext_id = 151_645, 151_643

    def save(self, folder: Path) -> None:
        """Nothing."""


def make(size: str, folder: Path) -> None:
    """A folder of random weights."""
    from openqwen.model import ModelConfig, Qwen2, save_checkpoint

    model = Qwen2(ModelConfig.named(size)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    save_checkpoint(model, NoTokenizer(), folder)


def loader(side: str, dtype: str) -> Callable[[Path], Any]:
    """The function that reads a folder."""
    if side == "ours":
        from openqwen.model import load_model

        return lambda folder: load_model(folder, dtype)
    from transformers import AutoModelForCausalLM

    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def peak_memory() -> int:
    """Return this process's peak memory in bytes (on Linux, ru_maxrss starts at the parent's)."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure(side: str, dtype: str, folder: Path, target: Path) -> dict[str, float]:
    """One round in this process."""
    load = loader(side, dtype)
    before = peak_memory()
    clock = [time.perf_counter()]
    model = load(folder)
    clock.append(time.perf_counter())
    sum(float(parameter.detach().view(torch.int8).amax()) for parameter in model.parameters())
    clock.append(time.perf_counter())
    peak = peak_memory()
    if side == "ours":
        from openqwen.model.weights import save_weights

        save_weights(model, target)
    else:
        model.save_pretrained(target)
    clock.append(time.perf_counter())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    times = {
        name: b - a for name, a, b in zip(("load s", "first use s", "save s"), clock, clock[1:])
    }
    return times | {"memory / weights": (peak - before) / weights}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="qwen2.5-0.5b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.step:
        side, dtype, folder, target = options.step
        print(json.dumps(measure(side, dtype, Path(folder), Path(target))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, target = Path(place) / "folder", Path(place) / "target"
        target.mkdir()
        make(options.size, folder)
        runs: dict[tuple[str, str], list[dict[str, float]]] = {
            (dtype, side): []
            for dtype in ("bfloat16", "float32")
            for side in ("ours", "transformers")
        }
        for _ in range(options.repeat):
            for (dtype, side), results in runs.items():
                step = [side, dtype, str(folder), str(target)]
                command = [
                    sys.executable,
                    __file__,
                    "--threads",
                    str(options.threads),
                    "--step",
                    *step,
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    names = list(next(iter(runs.values()))[0])
    print(f"{options.size}, stored in bfloat16   " + "".join(f"{name:>18}" for name in names))
    for (dtype, side), results in runs.items():
        medians = [statistics.median(result[name] for result in results) for name in names]
        print(f"{side + ' to ' + dtype:<36}" + "".join(f"{value:>18.2f}" for value in medians))


if __name__ == "__main__":
    main()
